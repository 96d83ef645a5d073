"""COCO's run-length encoding of masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ovss_ray.evaluation.ground_truth.errors import DamagedAnnotationError
from ovss_ray.evaluation.ground_truth.pixels import MAX_PIXELS


def decode_mask(segmentation: Mapping[str, Any], where: str) -> npt.NDArray[np.bool_]:
    """Decode one mask.

    The runs go down the columns, background first. As text ("compressed") each is written in groups of 5 bits, lowest
    first, one character (code 48 and up) a group: bit 5 says that more follow, bit 4 of the last one is the sign; from
    the fourth run on it is the difference to the run two before.

    Source: COCO, `cocoapi/common/maskApi.c`.

    Args:
        segmentation: {"size": [height, width], "counts": text, or a list of run lengths}.
        where: its place, for messages.

    Returns:
        [height, width], true on the mask.

    Raises:
        DamagedAnnotationError: anything else, or runs that do not add up to the size.
    """
    try:
        height, width = (int(side) for side in segmentation["size"])
        counts = segmentation["counts"]
        runs = np.array(_uncompressed(counts) if isinstance(counts, str) else [int(run) for run in counts], np.int64)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise DamagedAnnotationError(f"{where} is no run-length encoded mask: {error!r}") from error
    if not 0 < height * width <= MAX_PIXELS or height < 0:
        raise DamagedAnnotationError(f"{where} is damaged: {width} x {height} is no size of a mask")
    if (runs < 0).any() or int(runs.sum()) != height * width:
        raise DamagedAnnotationError(f"{where} is damaged: its runs do not add up to {width} x {height} pixels")
    on = np.arange(len(runs)) % 2 == 1
    return np.repeat(on, runs).reshape(width, height).T


def _uncompressed(text: str) -> list[int]:
    runs: list[int] = []
    number = shift = 0
    for character in text:
        group = ord(character) - 48
        if not 0 <= group < 64 or shift > 50:
            raise ValueError(f"character {character!r}")
        number |= (group & 31) << shift
        shift += 5
        if group & 32:
            continue
        if group & 16:
            number -= 1 << shift
        runs.append(number + runs[-2] if len(runs) > 2 else number)
        number = shift = 0
    if shift:
        raise ValueError("the last number is cut off")
    return runs
