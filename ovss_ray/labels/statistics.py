"""Statistics of every class in a label map, all from one list of row runs; NumPy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ovss_ray.labels.codecs import LabelMap, check_label_map

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.floating]


@dataclass(frozen=True, slots=True)
class SegmentStatistics:
    """The region of one class in one image; the fields are those of `segments` in `schemas/shard.yaml`.

    Pixel coordinates count from 0 at the top left, x = column, y = row. `components` are 8-connected.
    `boundary_pixels` are pixels with at least one 4-neighbour inside the image of another label.
    """

    class_id: int
    pixels: int
    area_fraction: float
    components: int
    bbox_x: int
    bbox_y: int
    bbox_w: int
    bbox_h: int
    centroid_x: float
    centroid_y: float
    boundary_pixels: int
    confidence_mean: float
    margin_mean: float


def segment_statistics(
    labels: LabelMap, confidence: FloatArray, margin: FloatArray, ignore_index: int
) -> tuple[SegmentStatistics, ...]:
    """Describe each class that has at least one pixel, by ascending class id.

    Args:
        labels: [H, W] uint8 or uint16, class ids.
        confidence: [H, W] floating point, probability of the winning class.
        margin: [H, W] floating point, probability of the winning class minus that of the second.
        ignore_index: the label of unlabelled pixels. They get no entry, yet count in the denominator of
            `area_fraction` and as another label at a boundary.

    Sums are taken in float64 and in a fixed order.

    Raises:
        ValueError: if `labels` is not a label map or the shapes differ.
    """
    check_label_map(labels)
    if confidence.shape != labels.shape or margin.shape != labels.shape:
        raise ValueError(
            f"labels {labels.shape}, confidence {confidence.shape} and margin {margin.shape} differ in shape"
        )
    runs = _Runs.of(labels)
    pixels = runs.sum_by_class(runs.lengths)
    components = _count_components(runs)
    left, top, right, bottom = runs.boxes()
    # Twice the sum of the columns of a run: exact in integers.
    double_x = runs.sum_by_class((runs.left + runs.right) * runs.lengths)
    y = runs.sum_by_class(runs.row * runs.lengths)
    boundary = _count_boundary(labels)[runs.classes]
    confidence_sum = runs.sum_by_class(runs.sum_over(confidence))
    margin_sum = runs.sum_by_class(runs.sum_over(margin))

    columns = (
        runs.classes,
        pixels,
        pixels / labels.size,
        components,
        left,
        top,
        right - left + 1,
        bottom - top + 1,
        double_x / (2 * pixels),
        y / pixels,
        boundary,
        confidence_sum / pixels,
        margin_sum / pixels,
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return tuple(SegmentStatistics(*row) for row in rows if row[0] != ignore_index)


@dataclass(frozen=True)
class _Runs:
    """Maximal stretches of one label inside a row, in reading order; together they tile the label map.

    Flat positions count the pixels in reading order. `order` sorts the runs by class and keeps the reading order
    within a class; `first` is where each class begins in that order.
    """

    width: int
    start: IntArray  # [R] flat position of the first pixel
    end: IntArray  # [R] flat position of the last pixel
    label: npt.NDArray[np.unsignedinteger]  # [R]
    row: IntArray  # [R]
    order: npt.NDArray[np.intp]  # [R]
    first: npt.NDArray[np.intp]  # [C]
    classes: IntArray  # [C] the labels that occur, ascending

    @classmethod
    def of(cls, labels: LabelMap) -> _Runs:
        height, width = labels.shape
        begins = np.ones((height, width), np.bool_)
        np.not_equal(labels[:, 1:], labels[:, :-1], out=begins[:, 1:])
        start = np.flatnonzero(begins)
        end = np.append(start[1:], labels.size) - 1
        label = labels.reshape(-1)[start]
        order = np.argsort(label, kind="stable")
        sorted_label = label[order]
        first = np.flatnonzero(np.append(True, sorted_label[1:] != sorted_label[:-1]))
        classes = sorted_label[first].astype(np.int64)
        return cls(width, start, end, label, start // width, order, first, classes)

    @property
    def lengths(self) -> IntArray:
        return self.end - self.start + 1

    @property
    def left(self) -> IntArray:
        return self.start - self.row * self.width

    @property
    def right(self) -> IntArray:
        return self.end - self.row * self.width

    def sum_by_class(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """[R] -> [C]: the sum over the runs of each class."""
        return np.add.reduceat(values[self.order], self.first)

    def sum_over(self, image: FloatArray) -> npt.NDArray[np.float64]:
        """[H, W] -> [R]: the sum of the image's pixels along each run."""
        return np.add.reduceat(image.reshape(-1), self.start, dtype=np.float64)

    def boxes(self) -> tuple[IntArray, IntArray, IntArray, IntArray]:
        """Leftmost column, topmost row, rightmost column and bottom row of each class, each [C]."""
        rows = self.row[self.order]  # ascending within a class
        last = np.append(self.first[1:], len(rows)) - 1
        left = np.minimum.reduceat(self.left[self.order], self.first)
        right = np.maximum.reduceat(self.right[self.order], self.first)
        return left, rows[self.first], right, rows[last]


def _count_components(runs: _Runs) -> IntArray:
    """Number of 8-connected components of each class, [C]: the runs that touch, united until nothing changes."""
    upper, lower = _touching_runs(runs)
    root = np.arange(len(runs.start))
    while len(upper):
        a, b = root[upper], root[lower]
        apart = a != b
        upper, lower, a, b = upper[apart], lower[apart], a[apart], b[apart]
        # Every root that has a smaller neighbour hangs itself under one of them: no cycles, whichever wins.
        root[np.maximum(a, b)] = np.minimum(a, b)
        root = _flatten(root)
    is_root = root == np.arange(len(root))
    return np.asarray(runs.sum_by_class(is_root.astype(np.int64)), np.int64)


def _flatten(root: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
    while True:
        above = root[root]
        if np.array_equal(above, root):
            return root
        root = above


def _touching_runs(runs: _Runs) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """The pairs (run, run of the same label in the next row) that share an edge or a corner.

    The runs of a row tile it, so those that touch a run from below are consecutive: from the one that holds the
    pixel below and left of the run's first pixel to the one below and right of its last.
    """
    above = np.flatnonzero(runs.row < runs.row[-1])
    next_row = (runs.row[above] + 1) * runs.width
    leftmost = np.maximum(runs.start[above] + runs.width - 1, next_row)
    rightmost = np.minimum(runs.end[above] + runs.width + 1, next_row + runs.width - 1)
    begin = np.searchsorted(runs.start, leftmost, side="right") - 1
    counts = np.searchsorted(runs.start, rightmost, side="right") - begin
    upper = np.repeat(above, counts)
    offset = np.arange(len(upper)) - np.repeat(np.cumsum(counts) - counts, counts)
    lower = np.repeat(begin, counts) + offset
    same = runs.label[upper] == runs.label[lower]
    return upper[same], lower[same]


def _count_boundary(labels: LabelMap) -> IntArray:
    """Number of boundary pixels of each label, indexed by label up to the dtype's largest."""
    boundary = np.zeros(labels.shape, np.bool_)
    beside = labels[:, 1:] != labels[:, :-1]
    below = labels[1:] != labels[:-1]
    boundary[:, 1:] |= beside
    boundary[:, :-1] |= beside
    boundary[1:] |= below
    boundary[:-1] |= below
    return np.bincount(labels[boundary], minlength=np.iinfo(labels.dtype).max + 1)
