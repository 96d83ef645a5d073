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
    values: np.ndarray,
    order: str = "<",
    *,
    photometric: int = 1,
    sample_format: int = 1,
    bits: int | None = None,
    planar: bool = False,
    deflate: bool = False,
    reverse_bits: bool = False,
    without: tuple[int, ...] = (),
) -> bytes:
    """A TIFF written by hand from [H, W] or [H, W, C] values in their own type; one strip, or one for each channel."""
    height, width = values.shape[:2]
    channels = 1 if values.ndim == 2 else values.shape[2]
    bits = bits or values.dtype.itemsize * 8
    if bits == 12:  # two values in three bytes
        planes = (values[:, :, None] >> np.arange(12)[::-1]) & 1
        strips = [np.packbits(planes.reshape(height, -1).astype(np.uint8), axis=1).tobytes()]
    else:
        swapped = values.astype(values.dtype.newbyteorder(order)).reshape(height, width, channels)
        strips = [swapped[..., channel].tobytes() for channel in range(channels)] if planar else [swapped.tobytes()]
    if reverse_bits:
        strips = [np.packbits(np.unpackbits(np.frombuffer(s, np.uint8), bitorder="little")).tobytes() for s in strips]
    if deflate:
        strips = [zlib.compress(strip) for strip in strips]
    starts = [8 + sum(map(len, strips[:number])) for number in range(len(strips))]
    body = b"".join(strips)
    tables = b""

    def stored(code: str, numbers: list[int]) -> bytes:
        nonlocal tables
        packed = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        if len(packed) <= 4:
            return packed
        place = 8 + len(body) + len(tables)
        tables += packed
        return struct.pack(f"{order}I", place)

    entries = [
        (256, 4, 1, struct.pack(f"{order}I", width)),
        (257, 4, 1, struct.pack(f"{order}I", height)),
        (258, 3, channels, stored("H", [bits] * channels)),
        (259, 3, 1, struct.pack(f"{order}H", 8 if deflate else 1)),
        (262, 3, 1, struct.pack(f"{order}H", photometric)),
        (266, 3, 1, struct.pack(f"{order}H", 2 if reverse_bits else 1)),
        (273, 4, len(strips), stored("I", starts)),
        (277, 3, 1, struct.pack(f"{order}H", channels)),
        (278, 4, 1, struct.pack(f"{order}I", height)),
        (279, 4, len(strips), stored("I", [len(strip) for strip in strips])),
        (284, 3, 1, struct.pack(f"{order}H", 2 if planar else 1)),
        (339, 3, channels, stored("H", [sample_format] * channels)),
    ]
    entries = [entry for entry in entries if entry[0] not in without]
    offset = 8 + len(body) + len(tables)
    padding = b"\0" * (offset % 2)
    directory = struct.pack(f"{order}H", len(entries)) + b"".join(
        struct.pack(f"{order}HHI", tag, kind, count) + value.ljust(4, b"\0") for tag, kind, count, value in entries
    )
    mark = b"II*\0" if order == "<" else b"MM\0*"
    start = struct.pack(f"{order}I", offset + len(padding))
    return mark + start + body + tables + padding + directory + struct.pack(f"{order}I", 0)


def tiled_tiff(
    values: np.ndarray,
    tile: tuple[int, int],
    order: str = "<",
    *,
    big: bool = False,
    entries_before: tuple[tuple[int, int, int], ...] = (),
) -> bytes:
    """A TIFF written by hand from uint8 [H, W] values in one deflated tile of a width and height.

    `entries_before` (tag, type, value) come first in its directory.
    """
    height, width = values.shape
    shrink = zlib.compressobj()
    rows = (row.tobytes().ljust(tile[0], b"\0") for row in values)
    padding = (bytes(tile[0]) for _ in range(tile[1] - height))
    body = b"".join([*map(shrink.compress, rows), *map(shrink.compress, padding), shrink.flush()])
    start = 16 if big else 8
    body += b"\0" * (len(body) % 2)
    entries = [
        *entries_before,
        *((256, 4, width), (257, 4, height), (258, 3, 8), (259, 3, 8), (262, 3, 1), (277, 3, 1)),
        *((322, 4, tile[0]), (323, 4, tile[1]), (324, 4, start), (325, 4, len(body))),
    ]
    count, entry, offset = ("Q", "HHQ", "Q") if big else ("H", "HHI", "I")
    directory = struct.pack(f"{order}{count}", len(entries))
    for tag, kind, number in entries:
        packed = struct.pack(f"{order}{'H' if kind == 3 else 'Q' if kind > 4 and big else 'I'}", number)
        directory += struct.pack(f"{order}{entry}", tag, kind, 1) + packed.ljust(8 if big else 4, b"\0")
    mark = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}H", 43 if big else 42)
    sizes = struct.pack(f"{order}HH", 8, 0) if big else b""
    place = struct.pack(f"{order}{offset}", start + len(body))
    return mark + sizes + place + body + directory + struct.pack(f"{order}{offset}", 0)
