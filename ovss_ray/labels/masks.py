"""Masks of connected components in COCO's compressed run-length encoding, which every COCO tool reads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

MAX_MASK_RUNS = 1_000_000
"""Vertical runs in all masks of one image, a few MB as text; a mask of real objects has some hundreds."""

_Runs = tuple[npt.NDArray[np.int32], npt.NDArray[np.int64], npt.NDArray[np.int64]]  # mask, first pixel, length


def encode_masks(
    bands: Iterator[tuple[int, npt.NDArray[np.int32]]], masks: int, shape: tuple[int, ...]
) -> list[str | None]:
    """The `counts` of each mask, for `{"size": [H, W], "counts": ...}`.

    Args:
        bands: from top to bottom, the first row of a band and, for its pixels [h, W], the mask that they belong to;
            -1 for none.
        masks: how many there are.
        shape: height and width of the image.

    Returns:
        Text for each mask; None for the most ragged ones where all of them have more than `MAX_MASK_RUNS` runs.
    """
    if not masks:
        return []
    height, width = shape
    if height * width >= 2**32:
        return [None] * masks  # which the format cannot count
    mask, first, length = _joined(*_vertical_runs(bands, masks, height))
    begins = np.searchsorted(mask, np.arange(masks + 1))
    return [
        _encode(first[begin:end], length[begin:end], height, width) if begin < end else None
        for begin, end in pairwise(begins)
    ]


def _vertical_runs(bands: Iterator[tuple[int, npt.NDArray[np.int32]]], masks: int, height: int) -> _Runs:
    """The runs down the columns of each band; positions count down the columns of the image."""
    parts: list[_Runs] = []
    counts = np.zeros(masks, np.int64)
    dropped = np.zeros(masks, np.bool_)
    for top, of_pixels in bands:
        columns = np.ascontiguousarray(of_pixels.T)
        begins = np.ones(columns.shape, np.bool_)
        np.not_equal(columns[:, 1:], columns[:, :-1], out=begins[:, 1:])
        start = np.flatnonzero(begins)
        length = np.diff(start, append=columns.size)
        mask = columns.reshape(-1)[start]
        wanted = (mask >= 0) & ~dropped[mask]
        column, row = np.divmod(start[wanted], columns.shape[1])
        parts.append((mask[wanted], column * height + top + row, length[wanted]))
        counts += np.bincount(mask[wanted], minlength=masks)
        while counts.sum() > MAX_MASK_RUNS:
            ragged = int(counts.argmax())
            dropped[ragged], counts[ragged] = True, 0
            parts = [_without(part, ragged) for part in parts]
    mask, first, length = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.lexsort((first, mask))
    return mask[order], first[order], length[order]


def _without(runs: _Runs, ragged: int) -> _Runs:
    kept = runs[0] != ragged
    return runs[0][kept], runs[1][kept], runs[2][kept]


def _joined(mask: npt.NDArray[np.int32], first: npt.NDArray[np.int64], length: npt.NDArray[np.int64]) -> _Runs:
    """Runs that follow each other without a gap as one: across bands, and from one column's end to the next's start."""
    if not len(mask):
        return mask, first, length
    end = first + length
    begins = np.flatnonzero(np.append(True, (mask[1:] != mask[:-1]) | (first[1:] != end[:-1])))
    last = np.append(begins[1:], len(mask)) - 1
    return mask[begins], first[begins], end[last] - first[begins]


def _encode(first: npt.NDArray[np.int64], length: npt.NDArray[np.int64], height: int, width: int) -> str:
    end = first + length
    gaps = np.diff(first, prepend=0) - np.append(0, length[:-1])
    counts = np.stack([gaps, length], axis=1).reshape(-1)
    if end[-1] < height * width:
        counts = np.append(counts, height * width - end[-1])
    encoded = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    text: str = encoded["counts"].decode("ascii")
    return text
