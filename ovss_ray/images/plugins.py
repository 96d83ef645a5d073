"""Which class opens a file of which format; Pillow's own, mended where they read wrongly or heed a global limit."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any

from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
    features,
)

from ovss_ray.errors import ImageError

_BITS_PER_SAMPLE, _PLANAR, _SAMPLE_FORMAT = 258, 284, 339
# Layouts with one plane per channel that come out right; found by comparing with files of known pixels.
_PLANAR_MODES = ("1", "L", "P", "I;16", "I;16B", "I", "F", "RGB", "RGBA", "CMYK")


class _WithoutLimit:
    """The module `PIL.Image` but for its guard against huge images, which is a global of the process."""

    def __getattr__(self, name: str) -> Any:
        return getattr(Image, name)

    @staticmethod
    def _decompression_bomb_check(*_: Any, **__: Any) -> None:
        return None


def _rebound(function: FunctionType, **names: Any) -> FunctionType:
    """A function with some of its module's names replaced, for itself alone."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _unlimited(plugin: type[ImageFile.ImageFile]) -> type[ImageFile.ImageFile]:
    """A plugin that doesn't heed `Image.MAX_IMAGE_PIXELS`, which stays as it is for everybody else."""
    limited = {
        name: _rebound(member, Image=_WithoutLimit())
        for name, member in vars(plugin).items()
        if isinstance(member, FunctionType) and "_decompression_bomb_check" in member.__code__.co_names
    }
    return type(plugin.__name__, (plugin,), limited)


_BaseTiff: Any = _unlimited(TiffImagePlugin.TiffImageFile)


class _Tiff(_BaseTiff):  # type: ignore[misc]
    """TIFFs, without those that Pillow decodes to garbage without a word."""

    # What Pillow itself unpacks of planes forgets how samples are packed (16 bits, bit order); libtiff does not.
    _setup_by_libtiff = _rebound(TiffImagePlugin.TiffImageFile._setup, READ_LIBTIFF=True)  # type: ignore[arg-type]

    tile: list[Any]

    def _setup(self) -> None:
        planar = self.tag_v2.get(_PLANAR, 1) == 2
        if planar:
            self._setup_by_libtiff()
        else:
            super()._setup()
        bits = self.tag_v2.get(_BITS_PER_SAMPLE, (1,))
        if 2 in self.tag_v2.get(_SAMPLE_FORMAT, ()) and 8 in bits:
            raise ImageError("unsupported", "TIFF of a kind that cannot be read: signed samples of 8 bits")
        if planar and len(bits) > 1 and self.mode not in _PLANAR_MODES:
            raise ImageError("unsupported", f"TIFF of a kind that cannot be read: {self.mode} with a plane per channel")
        if self.use_load_libtiff:
            self.tile = [_with_native_order(tile) for tile in self.tile]


# libtiff gives samples in the machine's byte order, also those that Pillow would swap once more.
_NATIVE = {"I;16BS": "I;16NS", "I;32BS": "I;32NS", "F;32BF": "F;32NF"}


def _with_native_order(tile: Any) -> Any:
    rawmode, *others = tile[3]
    make = getattr(tile, "_make", tuple)  # a plain tuple in older releases
    return make((*tile[:3], (_NATIVE.get(rawmode, rawmode), *others)))


# The classes themselves, not Image.open: that one tries every plugin (some start programs), and its guard against
# huge images is a global of the process.
PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": _unlimited(GifImagePlugin.GifImageFile),
    "WEBP": _unlimited(WebPImagePlugin.WebPImageFile),
    "TIFF": _Tiff,
    "BMP": BmpImagePlugin.BmpImageFile,
}


def _avif() -> type[ImageFile.ImageFile]:
    if "avif" not in features.modules or not features.check("avif"):
        raise ImageError("unsupported", "AVIF; reading it takes Pillow 11.3 or newer, from its wheels")
    from PIL import AvifImagePlugin

    return AvifImagePlugin.AvifImageFile


def _heic() -> type[ImageFile.ImageFile]:
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise ImageError("unsupported", "HEIC; to read it, pip install 'ovss-ray[heif]' on every node") from None
    plugin: type[ImageFile.ImageFile] = HeifImageFile
    return plugin


_LATE: dict[str, Callable[[], type[ImageFile.ImageFile]]] = {"AVIF": _avif, "HEIC": _heic}

FORMATS = (*PLUGINS, *_LATE)
"""What is read, by the names of `sniff_format`."""


def plugin_for(kind: str) -> type[ImageFile.ImageFile]:
    """The class that opens files of one of `FORMATS`.

    Raises:
        ImageError: `unsupported`, with what is to be installed.
    """
    late = _LATE.get(kind)
    return PLUGINS[kind] if late is None else late()
