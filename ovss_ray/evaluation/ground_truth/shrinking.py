"""The smaller size at which the full ADE20K is evaluated."""

from __future__ import annotations

from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt

Pixels = TypeVar("Pixels", bound=npt.NDArray[Any])


def shrunk_size(height: int, width: int, short_side: int) -> tuple[int, int]:
    """Height and width after shrinking an image whose short side is over `short_side` pixels to that short side.

    The long side is rounded to the nearest integer, halves to even. Smaller images keep their size.
    """
    if min(height, width) <= short_side:
        return height, width
    if width >= height:
        return short_side, round(width / height * short_side)
    return round(height / width * short_side), short_side


def nearest(pixels: Pixels, height: int, width: int) -> Pixels:
    """Resize [H, W] pixels to [height, width] by taking the pixel at floor(index * old / new).

    The result is that of OpenCV's INTER_NEAREST, which made the label maps of the literature: its rounding is kept.
    """
    rows, columns = (
        np.minimum(np.floor(np.arange(new) * (1 / (new / old))).astype(np.int64), old - 1)
        for old, new in zip(pixels.shape, (height, width), strict=True)
    )
    return cast(Pixels, pixels[rows[:, None], columns])
