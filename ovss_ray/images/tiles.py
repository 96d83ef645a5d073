"""The tiles of a TIFF: each is unpacked whole, however little of it lies inside the image."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from PIL import ImageFile

from ovss_ray.errors import ImageError

_WIDTH, _LENGTH = 322, 323
_PHOTOMETRIC, _BITS_PER_SAMPLE, _PLANAR = 262, 258, 284
_YCBCR = 6
_READ_ALIKE = (3, 4, 16)  # SHORT, LONG and LONG8
_BIG_TIFF = 43


def tile_size(data: bytes, image: ImageFile.ImageFile) -> tuple[int, int] | None:
    """Width and height of the tiles of a TIFF in pixels; None if it has none.

    Args:
        data: the file.
        image: the file as Pillow has it open.

    Raises:
        ImageError: `corrupt` or `unsupported`, a size that Pillow and libtiff would read differently, so that what is
            counted here would not be what is unpacked there.
    """
    tags = image.tag_v2  # type: ignore[attr-defined]
    order = "<" if data.startswith(b"II") else ">"
    big = struct.unpack_from(f"{order}H", data, 2)[0] == _BIG_TIFF
    if big != tags._bigtiff:  # Pillow takes big-endian ones for classic TIFFs
        raise ImageError("unsupported", "TIFF of a kind that cannot be read: a big-endian BigTIFF")
    found = [(tag, kind) for tag, kind in _entries(data, tags.offset, order, big) if tag in (_WIDTH, _LENGTH)]
    if not found:
        return None
    width, height = tags.get(_WIDTH), tags.get(_LENGTH)
    alike = sorted(tag for tag, kind in found if kind in _READ_ALIKE) == [_WIDTH, _LENGTH] and len(found) == 2
    if not alike or not isinstance(width, int) or not isinstance(height, int):
        raise ImageError("corrupt", "damaged TIFF: the size of its tiles is missing or ambiguous")
    return width, height


def tile_bytes(data: bytes, image: ImageFile.ImageFile) -> int:
    """Bytes that the decoder holds of one tile of a TIFF; 0 without tiles. Raises as `tile_size`."""
    size = tile_size(data, image)
    if size is None:
        return 0
    tags = image.tag_v2  # type: ignore[attr-defined]
    bits = tags.get(_BITS_PER_SAMPLE, (1,))
    samples: int = max(bits) if tags.get(_PLANAR, 1) == 2 else sum(bits)
    converted = 4 if tags.get(_PHOTOMETRIC) == _YCBCR else 0  # by libtiff, to RGBA
    return size[0] * size[1] * (-(-samples // 8) + converted)


def _entries(data: bytes, offset: int, order: str, big: bool) -> Iterator[tuple[int, int]]:
    """Tag and type of each entry of the directory at an offset, which Pillow has read already."""
    count_format, entry_format = ("Q", "HH16x") if big else ("H", "HH8x")
    (count,) = struct.unpack_from(f"{order}{count_format}", data, offset)
    start = offset + struct.calcsize(f"{order}{count_format}")
    end = start + count * struct.calcsize(f"{order}{entry_format}")
    return struct.iter_unpack(f"{order}{entry_format}", memoryview(data)[start:end])
