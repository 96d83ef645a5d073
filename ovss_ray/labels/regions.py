"""Connected regions of a label map, band by band, so that memory follows the width of the map and not its noise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ovss_ray.labels.codecs import LabelMap

IntArray = npt.NDArray[np.int64]
Indices = npt.NDArray[np.intp]
FloatArray = npt.NDArray[np.floating[Any]]

# Noise takes some 600 bytes a pixel of a band, real label maps a few; most of them fit into one.
_BAND_PIXELS = 1 << 19


@dataclass(frozen=True)
class Regions:
    """Pixels that belong together, a region an element; what was summed up over the pixels of each.

    label: [n]. counts: [3, n] number of pixels, twice the sum of their columns (so that runs add up exactly), sum of
    their rows. boxes: [4, n] leftmost column, topmost row, rightmost column, bottom row. sums: [2, n] float64, of
    confidence and margin.
    """

    label: IntArray
    counts: IntArray
    boxes: IntArray
    sums: npt.NDArray[np.float64]

    @property
    def pixels(self) -> IntArray:
        pixels: IntArray = self.counts[0]
        return pixels

    @classmethod
    def none(cls) -> Regions:
        """No region."""
        return cls(np.zeros(0, np.int64), np.zeros((3, 0), np.int64), np.zeros((4, 0), np.int64), np.zeros((2, 0)))

    def take(self, index: npt.NDArray[Any]) -> Regions:
        """Some of them, by position or mask."""
        return Regions(self.label[index], self.counts[:, index], self.boxes[:, index], self.sums[:, index])

    def followed_by(self, other: Regions) -> Regions:
        """These and others."""
        if not len(self.label):
            return other
        return Regions(
            np.concatenate([self.label, other.label]),
            np.concatenate([self.counts, other.counts], axis=1),
            np.concatenate([self.boxes, other.boxes], axis=1),
            np.concatenate([self.sums, other.sums], axis=1),
        )

    def united(self, group: npt.NDArray[Any], groups: int) -> Regions:
        """One region for each of 0..groups - 1; `group` [n] says where each of these belongs."""
        label = np.zeros(groups, np.int64)
        label[group] = self.label
        # Sums below 2**53 are exact in float64, which bincount adds up in.
        counts = [np.bincount(group, row, groups).astype(np.int64) for row in self.counts]
        sums = [np.bincount(group, row, groups) for row in self.sums]
        boxes = np.full((4, groups), np.iinfo(np.int64).max)
        boxes[2:] = -1
        for side, smallest_or_largest in enumerate((np.minimum, np.minimum, np.maximum, np.maximum)):
            smallest_or_largest.at(boxes[side], group, self.boxes[side])
        return Regions(label, np.stack(counts), boxes, np.stack(sums))

    def by_label(self) -> tuple[Regions, IntArray]:
        """All regions of a label as one, by ascending label; and how many they were."""
        labels, group = np.unique(self.label, return_inverse=True)
        return self.united(group, len(labels)), np.bincount(group, minlength=len(labels))


@dataclass(frozen=True)
class Found:
    """Regions that are complete. numbers: [n] of each, unique in the label map; smaller ones begin further up."""

    regions: Regions
    numbers: IntArray


class RegionFinder:
    """Finds the 8-connected regions of one label map in one pass from top to bottom.

    Args:
        labels: [H, W] uint8 or uint16; not empty.
        confidence, margin: [H, W], to be summed over each region.
        remember: whether to remember which pixel belongs to which region, for `numbers_of_rows`; takes 4 bytes a run
            of equal labels.
    """

    def __init__(self, labels: LabelMap, confidence: FloatArray, margin: FloatArray, *, remember: bool = False) -> None:
        self._labels = labels
        self._maps = (confidence, margin)
        self._remember = remember
        self._owners: list[npt.NDArray[np.int32]] = []  # by band: the number of each of its runs
        self._united: list[tuple[IntArray, IntArray]] = []  # numbers that turned out to be one region: from, to
        self._next_number = 0

    def find(self) -> Iterator[Found]:
        """All regions, those that end further up first."""
        open_ = Found(Regions.none(), np.zeros(0, np.int64))
        owner = np.zeros(0, np.intp)  # of each run of the row above the band, the position in `open_`
        for top, bottom in self._bands():
            above = min(top, 1)  # the row above comes along, to see what goes on
            runs = _Runs.of(self._labels[top - above : bottom])
            known = len(owner)
            component, count = _components(runs, owner)
            of_open = np.zeros(len(open_.numbers), np.intp)
            of_open[owner] = component[:known]
            numbers = self._number(count, of_open, open_.numbers)
            fresh = self._regions_of(runs, known, top, bottom)
            regions = open_.regions.followed_by(fresh).united(np.concatenate([of_open, component[known:]]), count)
            if self._remember:
                self._owners.append(numbers[component[known:]].astype(np.int32))
                self._united.append((open_.numbers, numbers[of_open]))
            if bottom == len(self._labels):
                yield Found(regions, numbers)
                return
            last = component[runs.row == runs.row[-1]]
            goes_on = np.zeros(count, np.bool_)
            goes_on[last] = True
            yield Found(regions.take(~goes_on), numbers[~goes_on])
            open_ = Found(regions.take(goes_on), numbers[goes_on])
            owner = (np.cumsum(goes_on) - 1)[last]

    def numbers_of_rows(self, numbers: IntArray) -> Iterator[tuple[int, npt.NDArray[np.int32]]]:
        """After `find`: for each band its first row and, for its pixels [h, W], the position in `numbers` or -1."""
        position = np.full(self._next_number, -1, np.int32)
        position[numbers] = np.arange(len(numbers), dtype=np.int32)
        for merged, into in reversed(self._united):  # later ones first: what they were merged into is settled
            position[merged] = position[into]
        for (top, bottom), owner in zip(self._bands(), self._owners, strict=True):
            starts = _run_starts(self._labels[top:bottom])
            size = (bottom - top) * self._labels.shape[1]
            of_pixels = np.repeat(position[owner], np.diff(starts, append=size))
            yield top, of_pixels.reshape(bottom - top, -1)

    def _bands(self) -> Iterator[tuple[int, int]]:
        height, width = self._labels.shape
        step = max(1, _BAND_PIXELS // width)
        for top in range(0, height, step):
            yield top, min(top + step, height)

    def _number(self, count: int, of_open: Indices, open_numbers: IntArray) -> IntArray:
        """The number of each component of a band: that of the first open region in it, or a new one."""
        new = self._next_number
        self._next_number += count
        numbers = np.arange(new, new + count)
        np.minimum.at(numbers, of_open, open_numbers)
        return numbers

    def _regions_of(self, runs: _Runs, known: int, top: int, bottom: int) -> Regions:
        """The runs of a band as regions, without those of the row above."""
        start, left, right = runs.start[known:], runs.left[known:], runs.right[known:]
        row = runs.row[known:] + top - min(top, 1)
        length = right - left + 1
        starts = start - (start[0] if len(start) else 0)
        sums = [np.add.reduceat(part[top:bottom].reshape(-1), starts, dtype=np.float64) for part in self._maps]
        counts = np.stack([length, (left + right) * length, row * length])
        return Regions(runs.label[known:].astype(np.int64), counts, np.stack([left, row, right, row]), np.stack(sums))


@dataclass(frozen=True)
class _Runs:
    """Maximal stretches of one label inside a row, in reading order; together they tile the rows.

    Flat positions count the pixels in reading order.
    """

    width: int
    start: IntArray  # [R] flat position of the first pixel
    end: IntArray  # [R] flat position of the last pixel
    label: npt.NDArray[np.unsignedinteger[Any]]  # [R]
    row: IntArray  # [R]

    @classmethod
    def of(cls, labels: LabelMap) -> _Runs:
        start = _run_starts(labels)
        end = np.append(start[1:], labels.size) - 1
        return cls(labels.shape[1], start, end, labels.reshape(-1)[start], start // labels.shape[1])

    @property
    def left(self) -> IntArray:
        return self.start - self.row * self.width

    @property
    def right(self) -> IntArray:
        return self.end - self.row * self.width


def _run_starts(labels: npt.NDArray[Any]) -> IntArray:
    begins = np.ones(labels.shape, np.bool_)
    np.not_equal(labels[:, 1:], labels[:, :-1], out=begins[:, 1:])
    return np.flatnonzero(begins)


def _components(runs: _Runs, owner: Indices) -> tuple[Indices, int]:
    """The component of each run [R], and how many there are: the runs that touch, united until nothing changes.

    In NumPy, as SciPy's graphs cost more to set up than a usual label map has work.

    Args:
        owner: of the first runs, the region that each is known to belong to; what belongs together is connected.
    """
    upper, lower = _touching_runs(runs)
    if len(owner):
        order = np.argsort(owner, kind="stable")
        same = owner[order[1:]] == owner[order[:-1]]
        upper, lower = np.append(upper, order[:-1][same]), np.append(lower, order[1:][same])
    root = np.arange(len(runs.start))
    while len(upper):
        a, b = root[upper], root[lower]
        apart = a != b
        upper, lower, a, b = upper[apart], lower[apart], a[apart], b[apart]
        # Every root that has a smaller neighbour hangs itself under one of them: no cycles, whichever wins.
        root[np.maximum(a, b)] = np.minimum(a, b)
        root = _flatten(root)
    is_root = root == np.arange(len(root))
    number = np.cumsum(is_root) - 1
    return number[root], int(is_root.sum())


def _flatten(root: Indices) -> Indices:
    while True:
        above = root[root]
        if np.array_equal(above, root):
            return root
        root = above


def _touching_runs(runs: _Runs) -> tuple[Indices, Indices]:
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


def count_boundary(labels: LabelMap) -> IntArray:
    """Number of boundary pixels of each label, indexed by label up to the dtype's largest."""
    height, width = labels.shape
    total = np.zeros(np.iinfo(labels.dtype).max + 1, np.int64)
    step = max(1, _BAND_PIXELS // width)
    for top in range(0, height, step):
        first, last = max(top - 1, 0), min(top + step + 1, height)
        inside = slice(top - first, top - first + min(step, height - top))
        rows = labels[first:last]
        boundary = np.zeros(rows.shape, np.bool_)
        beside, below = rows[:, 1:] != rows[:, :-1], rows[1:] != rows[:-1]
        boundary[:, 1:] |= beside
        boundary[:, :-1] |= beside
        boundary[1:] |= below
        boundary[:-1] |= below
        total += np.bincount(rows[inside][boundary[inside]], minlength=len(total))
    return total


def concatenated(parts: Sequence[Found]) -> Found:
    """Several finds as one."""
    regions = Regions.none()
    for part in parts:
        regions = regions.followed_by(part.regions)
    return Found(regions, np.concatenate([np.zeros(0, np.int64), *(part.numbers for part in parts)]))
