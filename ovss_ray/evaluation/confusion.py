"""Confusion matrices and the mIoU of the field, by MMSegmentation's definition, in exact integers."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ovss_ray.errors import SettingError

Counts = npt.NDArray[np.int64]
FloatVector = npt.NDArray[np.float64]


def confusion_counts(
    prediction: npt.NDArray[np.integer[Any]],
    truth: npt.NDArray[np.integer[Any]],
    num_classes: int,
    ignore_index: int = 255,
) -> Counts:
    """Count pixels by true and predicted class.

    Args:
        prediction: integers of the shape of `truth`. A value outside 0..num_classes-1 is no prediction.
        truth: integers of any shape, 0..num_classes-1 or `ignore_index`; pixels with the latter are dropped,
            whatever was predicted there.

    Returns:
        [C, C + 1] int64: row = true class, column = predicted class; the last column counts the pixels without a
        prediction.

    Raises:
        ValueError: if the shapes differ.
        SettingError: if `truth` has a value that is neither a class nor `ignore_index`.
    """
    if prediction.shape != truth.shape:
        raise ValueError(f"prediction {prediction.shape} and truth {truth.shape} differ in shape")
    counted = truth != ignore_index
    true = truth[counted].astype(np.int64)
    predicted = prediction[counted].astype(np.int64)
    if true.size and not 0 <= true.min() <= true.max() < num_classes:
        wrong = true[(true < 0) | (true >= num_classes)][0]
        raise SettingError(
            f"the ground truth has the value {wrong}, which is neither one of the {num_classes} classes (from 0) nor "
            f"the ignore index {ignore_index}; check the vocabulary and how the ground truth is read"
        )
    predicted[(predicted < 0) | (predicted >= num_classes)] = num_classes
    cells = np.bincount(true * (num_classes + 1) + predicted, minlength=num_classes * (num_classes + 1))
    return cells.reshape(num_classes, num_classes + 1).astype(np.int64, copy=False)


class ConfusionMatrix:
    """Pixels of a data set by true and predicted class; matrices of parts of it add up to that of the whole.

    IoU_c = TP_c / (P_c + G_c - TP_c) and accuracy_c = TP_c / G_c with TP = true positives, P = pixels predicted, G =
    pixels true, summed over all images first; 0/0 is NaN and left out of the means. So a class that is neither true
    nor predicted anywhere does not count, and one that is predicted but never true has IoU 0. A prediction that is no
    class is a miss for the true class and a false positive for none. All scores are fractions in 0..1.

    Source: MMSegmentation, `IoUMetric`.

    Args:
        num_classes: C, number of classes.
        ignore_index: ground-truth value of pixels to drop.
        counts: [C, C + 1] as from `confusion_counts`, to begin with; zeros if not given.

    >>> matrix = ConfusionMatrix(num_classes=2)
    >>> matrix.update(np.array([[0, 1], [1, 1]]), np.array([[0, 0], [1, 255]]))
    >>> matrix.class_iou.tolist(), matrix.miou
    ([0.5, 0.5], 0.5)
    """

    def __init__(self, num_classes: int, ignore_index: int = 255, counts: Counts | None = None) -> None:
        shape = (num_classes, num_classes + 1)
        if counts is not None and counts.shape != shape:
            raise ValueError(f"the counts of {num_classes} classes have shape {shape}, not {counts.shape}")
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.counts: Counts = np.zeros(shape, np.int64) if counts is None else counts.astype(np.int64)

    def update(self, prediction: npt.NDArray[np.integer[Any]], truth: npt.NDArray[np.integer[Any]]) -> None:
        """Add the pixels of one image, or of a batch; arguments and errors as for `confusion_counts`."""
        self.counts += confusion_counts(prediction, truth, self.num_classes, self.ignore_index)

    def __add__(self, other: ConfusionMatrix) -> ConfusionMatrix:
        """The matrix of both data sets together; raises ValueError unless they have the same classes."""
        if not isinstance(other, ConfusionMatrix):
            return NotImplemented
        if (self.num_classes, self.ignore_index) != (other.num_classes, other.ignore_index):
            raise ValueError("confusion matrices of different classes or ignore indices cannot be added")
        return ConfusionMatrix(self.num_classes, self.ignore_index, self.counts + other.counts)

    @property
    def class_iou(self) -> FloatVector:
        """[C] intersection over union; NaN where a class is neither true nor predicted."""
        return _divide(self._hits, self._predicted + self._true - self._hits)

    @property
    def class_accuracy(self) -> FloatVector:
        """[C] recall, the share of a class's true pixels that are predicted as it; NaN where it is never true."""
        return _divide(self._hits, self._true)

    @property
    def miou(self) -> float:
        """Mean of `class_iou` over the classes that are true or predicted somewhere; NaN if there is none."""
        return _mean(self.class_iou)

    @property
    def miou_of_true_classes(self) -> float:
        """Mean of `class_iou` over the classes that are true somewhere, as detectron2 has it; NaN if there is none.

        It differs from `miou` by the classes that are predicted but never true, which count as 0 there.
        """
        return _mean(self.class_iou[self._true > 0])

    @property
    def mean_accuracy(self) -> float:
        """Mean of `class_accuracy` over the classes that are true somewhere; NaN if there is none."""
        return _mean(self.class_accuracy)

    @property
    def pixel_accuracy(self) -> float:
        """Share of all pixels that are predicted right ("aAcc"); NaN without pixels."""
        return float(_divide(self._hits.sum(), self._true.sum()))

    @property
    def frequency_weighted_iou(self) -> float:
        """Mean of `class_iou` weighted by the number of true pixels of each class; NaN without pixels."""
        weighted = np.nansum(self.class_iou * self._true)
        return float(_divide(weighted, self._true.sum()))

    @property
    def _hits(self) -> Counts:
        return np.diagonal(self.counts)

    @property
    def _predicted(self) -> Counts:
        predicted: Counts = self.counts[:, : self.num_classes].sum(axis=0)
        return predicted

    @property
    def _true(self) -> Counts:
        true: Counts = self.counts.sum(axis=1)
        return true

    def __repr__(self) -> str:
        return f"ConfusionMatrix({self.num_classes} classes, {self._true.sum()} pixels, mIoU {self.miou:.4f})"


@dataclass(frozen=True)
class SplitScore:
    """mIoU over seen and over unseen classes and their harmonic mean, in 0..1; NaN where there is no class."""

    seen: float
    unseen: float

    @property
    def harmonic(self) -> float:
        """2 * seen * unseen / (seen + unseen), "hIoU"; 0 where both are 0."""
        total = self.seen + self.unseen
        return 2 * self.seen * self.unseen / total if total else 0.0


def split_score(class_iou: FloatVector, seen: Collection[int]) -> SplitScore:
    """The mIoU of two groups of classes.

    Args:
        class_iou: [C], NaN for classes that do not count.
        seen: ids of the seen classes; all others are unseen.
    """
    is_seen = np.isin(np.arange(len(class_iou)), list(seen))
    return SplitScore(_mean(class_iou[is_seen]), _mean(class_iou[~is_seen]))


def _divide(numerator: npt.ArrayLike, denominator: npt.ArrayLike) -> FloatVector:
    with np.errstate(invalid="ignore"):
        return np.true_divide(numerator, denominator)


def _mean(scores: FloatVector) -> float:
    present = scores[~np.isnan(scores)]
    return float(present.mean()) if present.size else float("nan")
