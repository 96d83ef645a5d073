"""The memory that decoding an image takes, told by its header; the factors are measured and a little generous."""

from __future__ import annotations

import struct

from PIL import Image, ImageFile

from ovss_ray.images.tiles import tile_bytes

STRIP_PIXELS = 1 << 20
"""Pixels that are converted to RGB at a time."""

_OUTPUT = 3  # bytes a pixel of what comes out: RGB
_CONVERSION = 12  # bytes a pixel of a strip while it is converted
_STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}  # all other modes of Pillow: 4

# Of formats whose library decodes the whole image before Pillow takes it over: planes or canvases, their RGBA, the copy
# as bytes, Pillow's image, the output.
_WHOLE = {"WEBP": 20, "AVIF": 18, "HEIC": 14}

_ORIENTATION, _BITS_PER_SAMPLE = 274, 258


def canvas_size(kind: str, data: bytes) -> tuple[int, int] | None:
    """Width and height of a file whose decoder takes memory for its pixels as soon as it is opened: a WebP.

    None for other formats, whose decoders can be asked, and for a header without a size.
    """
    if kind != "WEBP":
        return None
    chunk, body = data[12:16], data[20:30]
    if chunk == b"VP8X" and len(body) == 10:
        width, height = (int.from_bytes(body[start : start + 3], "little") for start in (4, 7))
        return width + 1, height + 1
    if chunk == b"VP8L" and len(body) >= 5:
        bits = struct.unpack("<I", body[1:5])[0]
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    if chunk == b"VP8 " and body[3:6] == b"\x9d\x01\x2a" and len(body) == 10:
        width, height = struct.unpack("<HH", body[6:10])
        return width & 0x3FFF, height & 0x3FFF
    return None


def decoding_bytes(kind: str, data: bytes, width: int, height: int, image: ImageFile.ImageFile | None = None) -> int:
    """Bytes of memory that decoding takes at most, the output (3 bytes a pixel) included, the file itself not.

    Args:
        kind: the format, as `sniff_format` names it.
        data: the file.
        width: in pixels.
        height: in pixels.
        image: the file as Pillow has it open, not loaded; None for a WebP.
    """
    pixels = width * height
    strip = _CONVERSION * min(pixels, max(STRIP_PIXELS, width))
    if image is None or kind in _WHOLE:
        return _WHOLE[kind] * pixels + (len(data) if kind in _WHOLE else 0) + strip
    stored = _STORED.get(image.mode, 4) * pixels
    return stored + max(_OUTPUT * pixels + strip, _decoder_bytes(kind, data, image, stored))


def _decoder_bytes(kind: str, data: bytes, image: ImageFile.ImageFile, stored: int) -> int:
    """What the decoder holds beside Pillow's image, and lets go of before the conversion begins."""
    pixels = image.size[0] * image.size[1]
    if kind == "JPEG":
        return 2 * _coefficients(image, pixels) if _has_several_scans(image, data) else 0
    if kind == "TIFF":
        tags = image.tag_v2  # type: ignore[attr-defined]
        one_strip: int = pixels * max(sum(tags.get(_BITS_PER_SAMPLE, (1,))) // 8, 4 if image.mode == "RGB" else 1)
        return max(one_strip, tile_bytes(data, image), stored if tags.get(_ORIENTATION, 1) != 1 else 0)
    return pixels if kind in ("GIF", "BMP") else 0


def _has_several_scans(image: Image.Image, data: bytes) -> bool:
    """Whether a JPEG comes in several passes (progressive or not), so that all coefficients are held at once."""
    if image.info.get("progressive"):
        return True
    channels = len(image.layer)  # type: ignore[attr-defined]
    end = image.fp.tell()  # type: ignore[attr-defined]  # of the header of the first scan
    header = data[end - 6 - 2 * channels : end - 3 - 2 * channels]
    return header != struct.pack(">HB", 6 + 2 * channels, channels)


def _coefficients(image: ImageFile.ImageFile, pixels: int) -> int:
    """Coefficients of a JPEG: one for each sample of each channel."""
    factors = [across * down for _, across, down, *_ in image.layer]  # type: ignore[attr-defined]
    most = max(factors, default=1)
    return sum(pixels * factor // most for factor in factors)
