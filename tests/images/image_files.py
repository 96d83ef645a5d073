"""Image files for the tests: written by Pillow, or by hand where Pillow cannot write what cameras and scanners do."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png(values: np.ndarray, bits: int, colour_type: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG written by hand: [H, W] or [H, W, C] values of `bits` each; Pillow cannot write most of these."""
    rows = values.reshape(len(values), -1)
    if bits < 8:
        planes = (rows[:, :, None] >> np.arange(bits)[::-1]) & 1
        packed = np.packbits(planes.reshape(len(rows), -1).astype(np.uint8), axis=1)
    else:
        packed = rows.astype(f">u{bits // 8}").view(np.uint8)
    data = b"".join(b"\0" + row.tobytes() for row in packed)
    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )


def tiff(
    values: np.ndarray, order: str = "<", *, photometric: int = 1, sample_format: int = 1, bits: int | None = None
) -> bytes:
    """An uncompressed TIFF written by hand from [H, W] or [H, W, C] values in their own type."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    bits = bits or values.dtype.itemsize * 8
    if bits == 12:  # two values in three bytes
        planes = (values[:, :, None] >> np.arange(12)[::-1]) & 1
        body = np.packbits(planes.reshape(height, -1).astype(np.uint8), axis=1).tobytes()
    else:
        body = values.astype(values.dtype.newbyteorder(order)).tobytes()
    depths = struct.pack(f"{order}{channels}H", *[bits] * channels)
    entries = [
        (256, 4, 1, struct.pack(f"{order}I", width)),
        (257, 4, 1, struct.pack(f"{order}I", height)),
        (258, 3, channels, depths if channels < 3 else struct.pack(f"{order}I", 8 + len(body))),
        (259, 3, 1, struct.pack(f"{order}H", 1)),
        (262, 3, 1, struct.pack(f"{order}H", photometric)),
        (273, 4, 1, struct.pack(f"{order}I", 8)),
        (277, 3, 1, struct.pack(f"{order}H", channels)),
        (278, 4, 1, struct.pack(f"{order}I", height)),
        (279, 4, 1, struct.pack(f"{order}I", len(body))),
        (339, 3, 1, struct.pack(f"{order}H", sample_format)),
    ]
    offset = 8 + len(body) + len(depths)
    padding = b"\0" * (offset % 2)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(
        struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0") for tag, kind, count, value in entries
    )
    mark = b"II*\0" if order == "<" else b"MM\0*"
    start = struct.pack(f"{order}I", offset + len(padding))
    return mark + start + body + depths + padding + directory + struct.pack(f"{order}I", 0)
