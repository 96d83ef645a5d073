"""Statistics of every class in a label map, and of its connected components, in one pass over its regions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ovss_ray.labels.codecs import LabelMap, check_label_map
from ovss_ray.labels.masks import encode_masks
from ovss_ray.labels.regions import FloatArray, Found, IntArray, RegionFinder, Regions, concatenated, count_boundary

MAX_COMPONENTS = 10_000
"""Components that are described in one image, the largest; noise has millions."""


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


@dataclass(frozen=True, slots=True)
class ComponentStatistics:
    """One 8-connected component of one class; the fields are those of `components` in `schemas/shard.yaml`."""

    class_id: int
    pixels: int
    area_fraction: float
    bbox_x: int
    bbox_y: int
    bbox_w: int
    bbox_h: int
    centroid_x: float
    centroid_y: float
    confidence_mean: float
    rle: str | None


@dataclass(frozen=True)
class Description:
    """What a label map holds: a row per class by ascending id, and per component, None if they were not asked for."""

    segments: tuple[SegmentStatistics, ...]
    components: tuple[ComponentStatistics, ...] | None


def segment_statistics(
    labels: LabelMap, confidence: FloatArray, margin: FloatArray, ignore_index: int
) -> tuple[SegmentStatistics, ...]:
    """The `segments` of `describe`."""
    return describe(labels, confidence, margin, ignore_index).segments


def describe(
    labels: LabelMap,
    confidence: FloatArray,
    margin: FloatArray,
    ignore_index: int,
    *,
    smallest_component: int | None = None,
) -> Description:
    """Describe each class that has at least one pixel, and each connected component above a size.

    Args:
        labels: [H, W] uint8 or uint16, class ids.
        confidence: [H, W] floating point, probability of the winning class.
        margin: [H, W] floating point, probability of the winning class minus that of the second.
        ignore_index: the label of unlabelled pixels. They get no entry, yet count in the denominator of
            `area_fraction` and as another label at a boundary.
        smallest_component: pixels of the smallest component that is described; None for none. Of more than
            `MAX_COMPONENTS` the largest are.

    Sums are taken in float64 and in a fixed order. Memory beside the arrays is bounded for any label map; components
    take some 11 bytes a pixel, where it is noise.

    Raises:
        ValueError: if `labels` is not a label map or the shapes differ.
    """
    check_label_map(labels)
    if confidence.shape != labels.shape or margin.shape != labels.shape:
        raise ValueError(
            f"labels {labels.shape}, confidence {confidence.shape} and margin {margin.shape} differ in shape"
        )
    finder = RegionFinder(labels, confidence, margin, remember=smallest_component is not None)
    classes, components = Regions.none(), np.zeros(0, np.int64)
    kept = _Largest(ignore_index, smallest_component)
    for found in finder.find():
        fresh, counts = found.regions.by_label()
        if not len(classes.label):  # as for all label maps but large ones
            classes, components = fresh, counts
        elif len(counts):
            merged = classes.followed_by(fresh)
            _, group = np.unique(merged.label, return_inverse=True)
            components = np.bincount(group, np.concatenate([components, counts])).astype(np.int64)
            classes = merged.united(group, len(components))
        kept.add(found)
    segments = _segments(classes, components, labels, ignore_index)
    if smallest_component is None:
        return Description(segments, None)
    listed = kept.listed()
    masks = encode_masks(finder.numbers_of_rows(listed.numbers), len(listed.numbers), labels.shape)
    return Description(segments, _components(listed.regions, masks, labels.size))


class _Largest:
    """Keeps the regions to describe; drops what is too small before anything is computed for it."""

    def __init__(self, ignore_index: int, smallest: int | None) -> None:
        self._ignore_index = ignore_index
        self._smallest = smallest
        self._found: list[Found] = []
        self._count = 0

    def add(self, found: Found) -> None:
        if self._smallest is None:
            return
        wanted = (found.regions.label != self._ignore_index) & (found.regions.pixels >= self._smallest)
        self._found.append(Found(found.regions.take(wanted), found.numbers[wanted]))
        self._count += int(wanted.sum())
        if self._count > 4 * MAX_COMPONENTS:
            self._found = [self._cut(concatenated(self._found))]
            self._count = MAX_COMPONENTS

    def listed(self) -> Found:
        """By class, the largest first."""
        all_ = self._cut(concatenated(self._found))
        order = np.lexsort((all_.numbers, -all_.regions.pixels, all_.regions.label))
        return Found(all_.regions.take(order), all_.numbers[order])

    def _cut(self, found: Found) -> Found:
        order = np.lexsort((found.numbers, -found.regions.pixels))[:MAX_COMPONENTS]
        return Found(found.regions.take(order), found.numbers[order])


def _segments(
    classes: Regions, components: IntArray, labels: LabelMap, ignore_index: int
) -> tuple[SegmentStatistics, ...]:
    boundary = count_boundary(labels)[classes.label]
    confidence, margin = classes.sums / classes.pixels
    pixels, x, y, w, h, center_x, center_y = _geometry(classes)
    columns = (
        classes.label, pixels, pixels / labels.size, components, x, y, w, h, center_x, center_y, boundary,
        confidence, margin,
    )  # fmt: skip
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return tuple(SegmentStatistics(*row) for row in rows if row[0] != ignore_index)


def _components(regions: Regions, masks: list[str | None], size: int) -> tuple[ComponentStatistics, ...]:
    confidence = regions.sums[0] / regions.pixels
    pixels, *boxes_and_centers = _geometry(regions)
    columns = (regions.label, pixels, pixels / size, *boxes_and_centers, confidence)
    rows = zip(*(column.tolist() for column in columns), masks, strict=True)
    return tuple(ComponentStatistics(*row) for row in rows)


def _geometry(regions: Regions) -> tuple[npt.NDArray[Any], ...]:
    """Pixels, x, y, width and height of the box, x and y of the centroid."""
    pixels, double_x, y = regions.counts
    left, top, right, bottom = regions.boxes
    return pixels, left, top, right - left + 1, bottom - top + 1, double_x / (2 * pixels), y / pixels
