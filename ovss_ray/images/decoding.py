"""Image files to RGB arrays, by fixed rules: the same bytes give the same pixels on every machine."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageFile

from ovss_ray.errors import ImageError
from ovss_ray.images.costs import STRIP_PIXELS, canvas_size, decoding_bytes
from ovss_ray.images.damage import explained
from ovss_ray.images.formats import sniff_format
from ovss_ray.images.plugins import FORMATS, plugin_for
from ovss_ray.images.tiles import tile_size

# Changes whenever the same bytes give other pixels; part of the fingerprint of a run.
DECODING_VERSION = 2

DEFAULT_MAX_PIXELS = 100_000_000


_ORIENTATION, _BITS_PER_SAMPLE, _PHOTOMETRIC = 274, 258, 262  # tags of EXIF and TIFF

Pixels = NDArray[np.uint8]

# Where the stored pixels lie in the upright image: views of it.
_STORED: dict[int, Callable[[Pixels], Pixels]] = {
    2: lambda upright: upright[:, ::-1],
    3: lambda upright: upright[::-1, ::-1],
    4: lambda upright: upright[::-1],
    5: lambda upright: upright.transpose(1, 0, 2),
    6: lambda upright: np.rot90(upright, 1),
    7: lambda upright: upright[::-1, ::-1].transpose(1, 0, 2),
    8: lambda upright: np.rot90(upright, -1),
}


@dataclass(frozen=True, eq=False)
class EncodedImage:
    """One image file whose header has been read; its pixels have not.

    Attributes:
        kind: its format, as `sniff_format` names it.
        width: in pixels, as stored.
        height: in pixels, as stored.
        file_bytes: size of the file.
        decode_bytes: memory that `decode` takes at most, its result of 3 bytes a pixel included, the file itself not.
    """

    kind: str
    width: int
    height: int
    file_bytes: int
    decode_bytes: int
    _open: Callable[[], ImageFile.ImageFile]

    def decode(self) -> Pixels:
        """Decode it, once; see `decode_image`."""
        with explained(self.kind), self._open() as image:
            return upright_rgb(image)


def read_header(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> EncodedImage:
    """Read what a file is and how large, before memory is taken for its pixels.

    Args:
        data: the whole file.
        max_pixels: images with more pixels are refused.

    Raises:
        ImageError: `unsupported` (no image, or of another kind), `corrupt` (no sound header), `too_large`.
    """
    if not data:
        raise ImageError("corrupt", "empty file (0 bytes)")
    kind = sniff_format(data)
    if kind is None or kind not in FORMATS:
        raise ImageError(*_why_no_image(kind, data))
    plugin = plugin_for(kind)
    with explained(kind):
        size = canvas_size(kind, data)
        if size is not None:
            _check_size(*size, max_pixels)
            needed = decoding_bytes(kind, data, *size)
            return EncodedImage(kind, *size, len(data), needed, partial(plugin, io.BytesIO(data)))
        image = plugin(io.BytesIO(data))
        _check_size(*image.size, max_pixels)
        if kind == "TIFF" and (tile := tile_size(data, image)) is not None:
            # Tiles of a usual size are no reason to refuse a small image.
            _check_size(*tile, max(max_pixels, STRIP_PIXELS), "a tile of ")
        needed = decoding_bytes(kind, data, *image.size, image)
        return EncodedImage(kind, *image.size, len(data), needed, lambda: image)


def decode_image(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Pixels:
    """Decode one JPEG, PNG, WebP, TIFF, BMP, GIF, AVIF or HEIC file; the content decides, not a name.

    The rules, none of which looks at other pixels of the image (nothing is stretched per image):

    * orientation: the EXIF tag is applied, so that the array stands as a viewer shows it; HEIC and AVIF by their own
      rotation and mirror, which stand above EXIF there;
    * several frames or pages: the first one; of HEIC and AVIF the primary image;
    * grey: three equal channels; 1 bit: 0 and 255; palettes: their colours;
    * alpha and transparent palette entries: laid over white; the colour key of a 16-bit RGB PNG is ignored;
    * CMYK (JPEG by Adobe's inverted convention, TIFF as stored): (255 - colour) x (255 - black) / 255, rounded; YCbCr
      by the JPEG (full range) formula; LAB to sRGB by LittleCMS; colour profiles (ICC) in files are ignored;
    * 16 bits a channel: the upper 8 bits (12-bit grey: the upper 8 of the 12); 10 and 12 bits of HEIC and AVIF as their
      libraries scale them to 8; 32-bit integers: clipped to 0..65535, then as 16 bits; floats: 0..1 becomes 0..255,
      rounded, clipped, NaN is 0.

    Args:
        data: the whole file.
        max_pixels: images with more pixels are refused by their header, before memory is taken for them.

    Returns:
        uint8 [H, W, 3], RGB, contiguous and writable.

    Raises:
        ImageError: `unsupported` (no image, or of another kind), `corrupt` (damaged or cut off), `too_large`.
    """
    return read_header(data, max_pixels=max_pixels).decode()


def upright_rgb(image: Image.Image) -> Pixels:
    """An image that Pillow has open, by the rules of `decode_image`: a copy, uint8 [H, W, 3]; Pillow's errors pass."""
    deep_colour = any(";16" in str(tile[3]) for tile in getattr(image, "tile", ()))  # load() empties the tiles
    image.load()
    convert = _conversion(image, deep_colour)
    # Asked for after the pixels: the TIFF plugin turns the image itself and then drops the tag.
    orientation = _orientation(image)
    width, height = image.size
    upright = np.empty((width, height, 3) if orientation in (5, 6, 7, 8) else (height, width, 3), np.uint8)
    stored = _STORED[orientation](upright) if orientation in _STORED else upright
    for top, strip in _strips(image):
        pixels = convert(strip)
        stored[top : top + len(pixels)] = pixels if pixels.ndim == 3 else pixels[..., None]
    return upright


def _check_size(width: int, height: int, max_pixels: int, what: str = "") -> None:
    if width * height > max_pixels:
        raise ImageError("too_large", f"{what}{width} x {height} pixels, over the limit of {max_pixels} pixels")


def _why_no_image(kind: str | None, data: bytes) -> tuple[str, str]:
    if kind in ("HTML page", "XML document", "JSON document"):
        return "unsupported", f"{kind}, not an image; perhaps a server answered with an error instead of the file"
    if kind is not None:
        return "unsupported", f"{kind}; only {', '.join(FORMATS)} are read"
    if not any(data[:4096]):
        return "corrupt", f"{len(data)} bytes that begin with zeros only; no image"
    return "unsupported", "not an image, nor any other kind of file that is known"


def _strips(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """An image in strips of whole rows: conversions then take memory for a strip, not for the image."""
    width, height = image.size
    rows = max(STRIP_PIXELS // max(width, 1), 1)
    if rows >= height:
        yield 0, image
        return
    for top in range(0, height, rows):
        # Not image.crop(), which heeds the global limit for huge images.
        yield top, image._new(image.im.crop((0, top, width, min(top + rows, height))))


def _conversion(image: Image.Image, deep_colour: bool) -> Callable[[Image.Image], np.ndarray]:
    """What makes uint8 [H, W, 3], or grey [H, W], of a strip of an image."""
    if image.mode.startswith("I") or image.mode == "F":
        return partial(_deep_grey, tags=getattr(image, "tag_v2", {}))
    if image.mode == "LAB":
        profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        transform = ImageCms.buildTransform(*profiles, "LAB", "RGB")
        return lambda strip: np.asarray(ImageCms.applyTransform(strip, transform))
    if image.has_transparency_data and not (image.mode == "RGB" and deep_colour):
        return _over_white
    return lambda strip: np.asarray(strip if strip.mode == "RGB" else strip.convert("RGB"))


def _over_white(strip: Image.Image) -> np.ndarray:
    rgba = strip.convert("RGBA")
    white = Image.new("RGB", strip.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return np.asarray(white)


def _deep_grey(strip: Image.Image, tags: Mapping[int, Any]) -> np.ndarray:
    """A grey strip with more than 8 bits as uint8 [H, W]."""
    if strip.mode == "F":
        values = np.nan_to_num(np.asarray(strip), nan=0.0)
        grey = np.rint(np.clip(values, 0.0, 1.0) * 255.0)
    else:
        bits = 12 if tags.get(_BITS_PER_SAMPLE) == (12,) else 16
        grey = np.clip(np.asarray(strip), 0, (1 << bits) - 1) >> (bits - 8)
    # Pillow heeds "0 is white" for 8 bits only.
    return np.asarray(255 - grey if tags.get(_PHOTOMETRIC) == 0 else grey, np.uint8)


def _orientation(image: Image.Image) -> int:
    if image.format == "HEIF":  # turned already, by what stands above EXIF in this format
        return 1
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged metadata beside sound pixels: the image is taken as it is stored
        return 1
    return value if isinstance(value, int) else 1
