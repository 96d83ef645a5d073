"""Label and confidence maps as bytes and back: grey PNG, which every tool reads, and raw zstd, which is faster."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import PngImagePlugin

from ovss_ray.errors import OvssError, SettingError

LabelMap = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
CODECS = ("png", "zstd")

_PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
_ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
_PNG_LEVEL = 6
_SMOOTH_PNG_LEVEL = 1  # level 6 saves a fifth and takes ten times as long
_ZSTD_LEVEL = 3
_STRIP_PIXELS = 1 << 18


def encode_label_map(labels: LabelMap, codec: str = "png") -> bytes:
    """Compress a label map; equal maps give equal bytes.

    Args:
        labels: [H, W] uint8 or uint16, not empty.
        codec: "png" (single-channel grey of 8 or 16 bits) or "zstd" (one frame of the row-major values,
            little-endian; a reader must know height, width and dtype).

    Raises:
        SettingError: for an unknown codec.
        ValueError: for an array that is not a label map.
    """
    _check_codec(codec)
    check_label_map(labels)
    return _encode_png(labels) if codec == "png" else _encode_zstd(labels)


def encode_confidence_map(confidence: npt.NDArray[np.floating[Any]], codec: str = "png") -> bytes:
    """Compress probabilities to 8 bits each, round(255 x probability); `decode_confidence_map` is the way back.

    Args:
        confidence: [H, W] floating point in 0..1, not empty; NaN counts as 0, what lies outside as the nearer limit.
        codec: "png" or "zstd", as for label maps.

    Raises:
        SettingError: for an unknown codec.
        ValueError: for another array.
    """
    _check_codec(codec)
    if confidence.ndim != 2 or confidence.size == 0 or not np.issubdtype(confidence.dtype, np.floating):
        raise ValueError(f"a confidence map is a non-empty [H, W] array of floats, not {_describe(confidence)}")
    values = np.empty(confidence.shape, np.uint8)
    step = max(1, _STRIP_PIXELS // confidence.shape[1])
    for top in range(0, len(values), step):  # no second float map of a large image
        strip = np.nan_to_num(confidence[top : top + step].astype(np.float32, copy=False), nan=0.0)
        values[top : top + step] = np.rint(255 * np.clip(strip, 0, 1))
    return _encode_smooth_png(values) if codec == "png" else _encode_zstd(values)


def decode_confidence_map(data: bytes, height: int, width: int) -> npt.NDArray[np.uint8]:
    """Read a confidence map back, [height, width] uint8: 255 x probability, rounded.

    Raises:
        OvssError: as `decode_label_map`.
    """
    return cast("npt.NDArray[np.uint8]", decode_label_map(data, height, width, np.uint8, what="confidence map"))


def decode_label_map(
    data: bytes, height: int, width: int, dtype: npt.DTypeLike, *, what: str = "label map"
) -> LabelMap:
    """Read a label map back, [height, width] of `dtype` (uint8 or uint16); the first bytes tell the codec.

    Args:
        what: how messages call it.

    Raises:
        OvssError: if the bytes are damaged or hold another size or dtype. A zstd frame has no checksum, so that
            not every flipped bit of one is noticed; PNG notices all.
    """
    dtype = np.dtype(dtype)
    if data.startswith(_PNG_MAGIC):
        labels = _decode_png(data, what)
    elif data.startswith(_ZSTD_MAGIC):
        labels = _decode_zstd(data, height, width, dtype, what)
    else:
        raise OvssError(f"a {what} is neither PNG nor zstd: it begins with {data[:8]!r}")
    if labels.shape != (height, width) or labels.dtype != dtype:
        raise OvssError(
            f"a {what} is {_describe(labels)} where {height} x {width} {dtype} is expected; it belongs to "
            "another image or vocabulary"
        )
    return labels


def _check_codec(codec: str) -> None:
    if codec not in CODECS:
        raise SettingError(f"label map codec {codec!r} is not one of {', '.join(CODECS)}")


def check_label_map(labels: npt.NDArray[np.generic]) -> None:
    """Raise ValueError unless `labels` is a non-empty [H, W] array of uint8 or uint16."""
    if labels.ndim != 2 or labels.size == 0 or labels.dtype not in (np.uint8, np.uint16):
        raise ValueError(f"a label map is a non-empty [H, W] array of uint8 or uint16, not {_describe(labels)}")


def _describe(labels: npt.NDArray[np.generic]) -> str:
    return f"{' x '.join(map(str, labels.shape))} {labels.dtype}"


def _encode_png(labels: LabelMap) -> bytes:
    """Filter 0 on every row and zlib's run-length strategy: as small as what Pillow writes, four times faster.

    Label maps are runs already; the row filters that libraries try out cost time and gain nothing.
    """
    height, width = labels.shape
    rows = np.zeros((height, 1 + width * labels.itemsize), np.uint8)
    rows[:, 1:] = labels.astype(labels.dtype.newbyteorder(">"), order="C", copy=False).view(np.uint8)
    return _png(rows, width, 8 * labels.itemsize, zlib.compressobj(_PNG_LEVEL, zlib.DEFLATED, 15, 9, zlib.Z_RLE))


def _encode_smooth_png(values: npt.NDArray[np.uint8]) -> bytes:
    """Every row as its difference from the one above (filter 2): about as small as Pillow's, ten times faster."""
    rows = np.full((values.shape[0], 1 + values.shape[1]), 2, np.uint8)
    rows[0, 1:] = values[0]
    np.subtract(values[1:], values[:-1], out=rows[1:, 1:])
    return _png(rows, values.shape[1], 8, zlib.compressobj(_SMOOTH_PNG_LEVEL))


def _png(rows: npt.NDArray[np.uint8], width: int, bits: int, deflate: Any) -> bytes:
    """A grey PNG of rows that begin with the number of their filter."""
    pixels = deflate.compress(rows.data) + deflate.flush()
    header = struct.pack(">IIBBBBB", width, len(rows), bits, 0, 0, 0, 0)
    return _PNG_MAGIC + _chunk(b"IHDR", header) + _chunk(b"IDAT", pixels) + _chunk(b"IEND", b"")


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))


def _decode_png(data: bytes, what: str) -> LabelMap:
    # The plugin's own class: Image.open would refuse maps of images over Pillow's pixel limit.
    try:
        PngImagePlugin.PngImageFile(io.BytesIO(data)).verify()  # the checksums, which load() does not look at
        image = PngImagePlugin.PngImageFile(io.BytesIO(data))
        pixels = np.array(image)
    except (OSError, SyntaxError, ValueError, struct.error) as error:
        raise OvssError(f"a {what}'s PNG is damaged: {error}") from error
    if image.mode == "I":  # what older Pillow versions make of 16-bit grey
        return pixels.astype(np.uint16)
    return pixels


def _encode_zstd(labels: LabelMap) -> bytes:
    little_endian = labels.astype(labels.dtype.newbyteorder("<"), order="C", copy=False)
    compressed: bytes = pa.Codec("zstd", compression_level=_ZSTD_LEVEL).compress(little_endian, asbytes=True)
    return compressed


def _decode_zstd(data: bytes, height: int, width: int, dtype: np.dtype[np.generic], what: str) -> LabelMap:
    try:
        values = pa.Codec("zstd").decompress(data, decompressed_size=height * width * dtype.itemsize)
    except OSError as error:
        raise OvssError(f"a {what} is not a zstd frame of {height} x {width} {dtype}: {error}") from error
    labels = np.frombuffer(values, dtype.newbyteorder("<")).reshape(height, width)
    return labels.astype(dtype)  # a copy in the machine's byte order that can be written to
