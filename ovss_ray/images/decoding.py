"""Image files to RGB arrays, by fixed rules: the same bytes give the same pixels on every machine."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import (
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    ImageCms,
    ImageFile,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from ovss_ray.errors import ImageError
from ovss_ray.images.formats import sniff_format

# Changes whenever the same bytes give other pixels; part of the fingerprint of a run.
DECODING_VERSION = 1

DEFAULT_MAX_PIXELS = 100_000_000


class _Tiff(TiffImagePlugin.TiffImageFile):
    def load_prepare(self) -> None:
        """Take the memory before the plugin does: it would first apply the global limit that Image.open has."""
        size = getattr(self, "_tile_size", None)  # older releases have neither this nor the limit
        if size is not None and self._im is None:
            self.im = Image.new(self.mode, size, None).im
        super().load_prepare()


# The classes themselves, not Image.open: that one tries every plugin (some start programs), and its guard against
# huge images is a global of the process.
_PLUGINS: dict[str, type[ImageFile.ImageFile]] = {
    "JPEG": JpegImagePlugin.JpegImageFile,
    "PNG": PngImagePlugin.PngImageFile,
    "GIF": GifImagePlugin.GifImageFile,
    "WEBP": WebPImagePlugin.WebPImageFile,
    "TIFF": _Tiff,
    "BMP": BmpImagePlugin.BmpImageFile,
}

_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# What Pillow says of sound files that it has no decoder for; anything else it says means damage.
_NOT_OURS = re.compile(
    r"unsupported|not supported|not available|cannot handle|unknown (pixel mode|data organization)", re.IGNORECASE
)


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> np.ndarray:
    """Decode one JPEG, PNG, WebP, TIFF, BMP or GIF file; the content decides, not a name.

    The rules, none of which looks at other pixels of the image (nothing is stretched per image):

    * orientation: the EXIF tag is applied, so that the array stands as a viewer shows it;
    * several frames or pages: the first one;
    * grey: three equal channels; 1 bit: 0 and 255; palettes: their colours;
    * alpha and transparent palette entries: laid over white; the colour key of a 16-bit RGB PNG is ignored;
    * CMYK (JPEG by Adobe's inverted convention, TIFF as stored): (255 - colour) x (255 - black) / 255, rounded; YCbCr
      by the JPEG (full range) formula; LAB to sRGB by LittleCMS; colour profiles (ICC) in files are ignored;
    * 16 bits a channel: the upper 8 bits (12-bit grey: the upper 8 of the 12); 32-bit integers: clipped to 0..65535,
      then as 16 bits; floats: 0..1 becomes 0..255, rounded, clipped, NaN is 0.

    Args:
        data: the whole file.
        max_pixels: images with more pixels are refused by their header, before memory is taken for them.

    Returns:
        uint8 [H, W, 3], RGB, contiguous and writable.

    Raises:
        ImageError: `unsupported` (no image, or of another kind), `corrupt` (damaged or cut off), `too_large`.
    """
    if not data:
        raise ImageError("corrupt", "empty file (0 bytes)")
    kind = sniff_format(data)
    plugin = _PLUGINS.get(kind or "")
    if plugin is None:
        raise ImageError(*_why_no_image(kind, data))
    try:
        with plugin(io.BytesIO(data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise ImageError("too_large", f"{width} x {height} pixels, over the limit of {max_pixels} pixels")
            return upright_rgb(image)
    except ImageError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise ImageError("too_large", f"{kind} too large to decode: {error or 'no memory left'}") from error
    except Exception as error:  # hostile bytes raise anything in Pillow, and none of it may end the run
        reason = " ".join(str(error).split()) or type(error).__name__
        if _NOT_OURS.search(reason):
            raise ImageError("unsupported", f"{kind} of a kind that cannot be read: {reason}") from error
        raise ImageError("corrupt", f"damaged {kind}: {reason}") from error


def upright_rgb(image: Image.Image) -> np.ndarray:
    """An image that Pillow has open, by the rules of `decode_image`: a copy, uint8 [H, W, 3]; Pillow's errors pass."""
    rgb = _to_rgb(image)
    # Asked for after the pixels: the TIFF plugin turns the image itself and then drops the tag.
    upright = _UPRIGHT.get(_orientation(image))
    return np.array(rgb if upright is None else rgb.transpose(upright))


def _why_no_image(kind: str | None, data: bytes) -> tuple[str, str]:
    if kind in ("HTML page", "XML document", "JSON document"):
        return "unsupported", f"{kind}, not an image; perhaps a server answered with an error instead of the file"
    if kind is not None:
        return "unsupported", f"{kind}; only {', '.join(_PLUGINS)} are read"
    if not any(data[:4096]):
        return "corrupt", f"{len(data)} bytes that begin with zeros only; no image"
    return "unsupported", "not an image, nor any other kind of file that is known"


def _to_rgb(image: Image.Image) -> Image.Image:
    deep_colour = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))  # load() empties the tiles
    image.load()
    grey = _deep_grey(image)
    if grey is not None:
        return Image.fromarray(grey).convert("RGB")
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, *profiles, outputMode="RGB")
        assert converted is not None  # only None when converted in place
        return converted
    if image.has_transparency_data and not (image.mode == "RGB" and deep_colour):
        rgba = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(rgba, mask=rgba.getchannel("A"))
        return white
    return image if image.mode == "RGB" else image.convert("RGB")  # which would copy


def _deep_grey(image: Image.Image) -> np.ndarray | None:
    """A grey image with more than 8 bits as uint8 [H, W]; None for every other image."""
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    if image.mode.startswith("I"):
        bits = 12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 16
        grey = np.clip(np.asarray(image), 0, (1 << bits) - 1) >> (bits - 8)
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0.0)
        grey = np.rint(np.clip(values, 0.0, 1.0) * 255.0)
    else:
        return None
    # Pillow heeds "0 is white" for 8 bits only.
    positive = 255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey
    return np.asarray(positive, np.uint8)


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata beside sound pixels: the image is taken as it is stored
        return 1
    return value if isinstance(value, int) else 1
