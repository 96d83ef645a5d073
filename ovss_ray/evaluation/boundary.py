"""Boundary IoU: how well the outlines of the classes are met, whatever the size of what they enclose.

Cheng et al., "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation" (CVPR 2021): the IoU of the pixels
of a class that lie within a small distance of its own outline, in prediction and in truth.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from ovss_ray.evaluation.confusion import Counts

DILATION_RATIO = 0.02
"""Width of the outlines as a share of the image's diagonal, as published."""


def boundary_counts(
    prediction: npt.NDArray[np.integer[Any]],
    truth: npt.NDArray[np.integer[Any]],
    num_classes: int,
    ignore_index: int = 255,
    dilation_ratio: float = DILATION_RATIO,
) -> Counts:
    """Count the outline pixels of every class; counts of several images add up.

    Pixels whose truth is `ignore_index` belong to no class in either map, so the edge of such an area is an outline.

    Args:
        prediction: [H, W]; a value outside 0..C-1 is no prediction.
        truth: [H, W], 0..C-1 or `ignore_index`.
        dilation_ratio: width of the outlines as a share of the image's diagonal; at least one pixel.

    Returns:
        [C, 3] int64: outline pixels in both maps, in the prediction, in the truth. IoU = both / (the other two - both).
    """
    ignored = truth == ignore_index
    predicted = np.where(ignored | (prediction < 0) | (prediction >= num_classes), num_classes, prediction)
    true = np.where(ignored, num_classes, truth)
    distance = max(1, round(dilation_ratio * math.hypot(*truth.shape)))
    in_prediction, in_truth = (outline(labels, distance) for labels in (predicted, true))
    both = in_prediction & in_truth & (predicted == true)
    counted = [predicted[both], predicted[in_prediction], true[in_truth]]
    counts = [np.bincount(part, minlength=num_classes + 1)[:num_classes] for part in counted]
    return np.stack(counts, axis=1).astype(np.int64, copy=False)


def outline(labels: npt.NDArray[np.integer[Any]], distance: int) -> npt.NDArray[np.bool_]:
    """Where another label, or the edge of the image, is at most `distance` pixels away in a straight or diagonal line.

    These are the pixels that `distance` erosions of every label's mask with a 3 x 3 square take away.
    """
    padded = np.pad(labels.astype(np.int32), 1, constant_values=-1)
    size = 2 * distance + 1
    highest = ndimage.maximum_filter(padded, size, mode="nearest")
    lowest = ndimage.minimum_filter(padded, size, mode="nearest")
    found: npt.NDArray[np.bool_] = (highest != lowest)[1:-1, 1:-1]
    return found
