"""Boundary IoU against erosions of every class's mask, one after the other."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.ndimage import binary_erosion, zoom

from ovss_ray.evaluation.boundary import boundary_counts, outline

CLASSES = 4


def band(mask: np.ndarray, distance: int) -> np.ndarray:
    """What erosion with a 3 x 3 square takes away; outside the image is no part of the mask."""
    return mask & ~binary_erosion(mask, np.ones((3, 3)), iterations=distance, border_value=0)


def maps(seed: int, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, CLASSES, (2, 5, 6))
    prediction, truth = (zoom(part, (height / 5, width / 6), order=0).astype(np.uint8) for part in coarse)
    truth[rng.random(truth.shape) < 0.01] = 255
    prediction[:3, :7] = 255
    return prediction, truth


@pytest.mark.parametrize(("height", "width", "ratio"), [(60, 72, 0.02), (40, 90, 0.05), (25, 24, 0.001)])
def test_counts_are_those_of_eroded_masks(height: int, width: int, ratio: float) -> None:
    prediction, truth = maps(height, height, width)
    got = boundary_counts(prediction, truth, CLASSES, dilation_ratio=ratio)
    distance = max(1, round(ratio * math.hypot(height, width)))
    counted = truth != 255
    for c in range(CLASSES):
        predicted = band((prediction == c) & counted, distance)
        true = band(truth == c, distance)
        assert got[c].tolist() == [(predicted & true).sum(), predicted.sum(), true.sum()]
    assert got.sum() > 0


def test_the_same_map_has_boundary_iou_one_and_a_shifted_one_less() -> None:
    _, truth = maps(1, 60, 72)
    both, predicted, true = boundary_counts(truth, truth, CLASSES).T
    assert np.array_equal(both, predicted)
    assert np.array_equal(both, true)
    both, predicted, true = boundary_counts(np.roll(truth, 3, axis=1), truth, CLASSES).sum(0)
    assert 0 < both < 0.8 * (predicted + true - both)


def test_the_edge_of_the_image_is_an_outline() -> None:
    found = outline(np.zeros((7, 9), np.uint8), 2)
    assert found[:2].all()
    assert found[:, -2:].all()
    assert not found[2:-2, 2:-2].any()
