"""All scores of one matrix at once, against the definitions, and as JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ovss_ray.evaluation.confusion import ConfusionMatrix
from ovss_ray.evaluation.interval import Interval
from ovss_ray.evaluation.metrics import measure

# Class 3 is predicted but never true, class 4 is neither.
COUNTS = np.array([[50, 10, 0, 5, 0, 5], [0, 20, 0, 0, 0, 0], [5, 5, 20, 0, 0, 0], [0] * 6, [0] * 6], np.int64)
NAMES = ("a", "b", "c", "d", "e")


def test_the_means_are_those_of_the_field() -> None:
    scores = measure(NAMES, ConfusionMatrix(5, counts=COUNTS), Interval(0.1, 0.9), seen=(0, 1))
    iou = [50 / 75, 20 / 35, 20 / 30, 0.0]
    np.testing.assert_allclose(scores.class_iou, [*iou, np.nan])
    assert scores.miou == pytest.approx(sum(iou) / 4)
    assert scores.miou_of_true_classes == pytest.approx(sum(iou) / 3)
    assert scores.mean_accuracy == pytest.approx((50 / 70 + 20 / 20 + 20 / 30) / 3)
    assert scores.pixel_accuracy == pytest.approx(90 / 120)
    assert scores.frequency_weighted_iou == pytest.approx((70 * iou[0] + 20 * iou[1] + 30 * iou[2]) / 120)
    assert scores.pixels.tolist() == [70, 20, 30, 0, 0]
    assert scores.split is not None
    seen, unseen = (iou[0] + iou[1]) / 2, (iou[2] + iou[3]) / 2
    assert scores.split.harmonic == pytest.approx(2 * seen * unseen / (seen + unseen))
    assert scores.boundary_iou is scores.mean_boundary_iou is None


def test_boundary_iou_is_over_the_classes_that_have_outlines() -> None:
    outlines = np.array([[5, 10, 10], [0, 4, 0], [3, 3, 3], [0, 0, 0], [0, 0, 0]])
    scores = measure(NAMES, ConfusionMatrix(5, counts=COUNTS), Interval(0.1, 0.9), boundary=outlines)
    assert scores.boundary_iou is not None
    np.testing.assert_allclose(scores.boundary_iou, [5 / 15, 0, 1, np.nan, np.nan])
    assert scores.mean_boundary_iou == pytest.approx((5 / 15 + 0 + 1) / 3)


def test_json_has_null_where_nothing_can_be_said() -> None:
    scores = measure(NAMES, ConfusionMatrix(5, counts=COUNTS), Interval(0.1, 0.9))
    record = json.loads(json.dumps(scores.record(), allow_nan=False))
    assert record["miou"] == scores.miou
    assert record["split"] is record["boundary_iou"] is None
    assert record["interval"] == {"low": 0.1, "high": 0.9, "confidence": 0.95}
    assert record["classes"][4] == {"name": "e", "iou": None, "accuracy": None, "pixels": 0, "boundary_iou": None}
    assert record["classes"][3]["iou"] == 0
