"""The scores of the field, all from one confusion matrix and the outlines of a data set."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np

from ovss_ray.evaluation.confusion import ConfusionMatrix, Counts, FloatVector, SplitScore, split_score
from ovss_ray.evaluation.interval import Interval


@dataclass(frozen=True, eq=False)
class Metrics:
    """Scores of one run on one data set; fractions in 0..1, NaN where nothing can be said.

    Attributes:
        names: the C classes of the ground truth, in id order.
        class_iou: [C] see `ConfusionMatrix`, as all that is not explained here.
        class_accuracy: [C] "Acc".
        pixels: [C] true pixels.
        miou: over the classes that are true or predicted somewhere, as in MMSegmentation.
        miou_of_true_classes: over those that are true somewhere, as in detectron2.
        mean_accuracy: "mAcc".
        pixel_accuracy: "aAcc".
        frequency_weighted_iou: "fwIoU".
        interval: of `miou`, if other images of the same kind had been taken.
        split: `miou` of the classes that count as seen, and of the others; None if none were named.
        boundary_iou: [C] IoU of the outlines; None if they were not counted.
    """

    names: tuple[str, ...]
    class_iou: FloatVector
    class_accuracy: FloatVector
    pixels: Counts
    miou: float
    miou_of_true_classes: float
    mean_accuracy: float
    pixel_accuracy: float
    frequency_weighted_iou: float
    interval: Interval
    split: SplitScore | None = None
    boundary_iou: FloatVector | None = None

    @property
    def mean_boundary_iou(self) -> float | None:
        """Mean of `boundary_iou` over the classes with an outline somewhere; None if outlines were not counted."""
        if self.boundary_iou is None:
            return None
        present = self.boundary_iou[~np.isnan(self.boundary_iou)]
        return float(present.mean()) if present.size else math.nan

    def record(self) -> dict[str, Any]:
        """As JSON holds it: by class, and means; null for NaN."""
        means = {
            "miou": self.miou,
            "miou_of_true_classes": self.miou_of_true_classes,
            "mean_accuracy": self.mean_accuracy,
            "pixel_accuracy": self.pixel_accuracy,
            "frequency_weighted_iou": self.frequency_weighted_iou,
            "boundary_iou": self.mean_boundary_iou,
        }
        split = self.split
        by_class = zip(self.names, self.class_iou, self.class_accuracy, self.pixels, self._boundaries(), strict=True)
        return {
            **{name: _number(value) for name, value in means.items()},
            "interval": {
                "low": _number(self.interval.low),
                "high": _number(self.interval.high),
                "confidence": self.interval.confidence,
            },
            "split": split and {name: _number(getattr(split, name)) for name in ("seen", "unseen", "harmonic")},
            "classes": [
                {"name": name, "iou": _number(iou), "accuracy": _number(accuracy), "pixels": int(pixels),
                 "boundary_iou": _number(boundary)}
                for name, iou, accuracy, pixels, boundary in by_class
            ],
        }  # fmt: skip

    def _boundaries(self) -> FloatVector:
        return np.full(len(self.names), math.nan) if self.boundary_iou is None else self.boundary_iou


def measure(
    names: tuple[str, ...],
    confusion: ConfusionMatrix,
    interval: Interval,
    *,
    seen: Collection[int] | None = None,
    boundary: Counts | None = None,
) -> Metrics:
    """All scores.

    Args:
        names: of the C classes.
        confusion: of all images.
        interval: of the mIoU.
        seen: ids of the classes that count as seen, for the two means.
        boundary: [C, 3] as from `boundary_counts`, of all images.
    """
    iou = confusion.class_iou
    return Metrics(
        names=names,
        class_iou=iou,
        class_accuracy=confusion.class_accuracy,
        pixels=confusion.counts.sum(axis=1),
        miou=confusion.miou,
        miou_of_true_classes=confusion.miou_of_true_classes,
        mean_accuracy=confusion.mean_accuracy,
        pixel_accuracy=confusion.pixel_accuracy,
        frequency_weighted_iou=confusion.frequency_weighted_iou,
        interval=interval,
        split=None if seen is None else split_score(iou, seen),
        boundary_iou=None if boundary is None else _iou(boundary),
    )


def _iou(counts: Counts) -> FloatVector:
    both, predicted, true = counts.T
    with np.errstate(invalid="ignore"):
        iou: FloatVector = np.true_divide(both, predicted + true - both)
    return iou


def _number(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else float(value)
