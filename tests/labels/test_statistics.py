"""Class statistics against plain loops and SciPy's labelling."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage

from ovss_ray.labels import SegmentStatistics, regions, segment_statistics

Map = npt.NDArray[np.uint8]
IGNORE = {np.dtype(np.uint8): 255, np.dtype(np.uint16): 65535}

# Few different labels, so that large regions, long runs and meetings of regions at corners are common.
LABEL_MAPS = st.sampled_from((np.uint8, np.uint16)).flatmap(
    lambda dtype: hnp.arrays(
        dtype,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=24),
        elements=st.sampled_from([0, 1, 2, np.iinfo(dtype).max - 1, np.iinfo(dtype).max]),
    )
)


def probabilities(labels: Map, seed: int = 0) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    confidence = np.random.default_rng(seed).random(labels.shape, np.float32)
    return confidence, confidence / 3


def describe_by_loops(
    labels: Map, confidence: npt.NDArray[np.float32], margin: npt.NDArray[np.float32], ignore_index: int
) -> list[SegmentStatistics]:
    """The definitions of the schema, one pixel at a time."""
    height, width = labels.shape
    described = []
    for class_id in sorted({int(label) for label in labels.flat} - {ignore_index}):
        pixels = [(y, x) for y in range(height) for x in range(width) if labels[y, x] == class_id]
        boundary = 0
        for y, x in pixels:
            around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
            inside = [(v, u) for v, u in around if 0 <= v < height and 0 <= u < width]
            boundary += any(labels[v, u] != class_id for v, u in inside)
        ys, xs = [y for y, _ in pixels], [x for _, x in pixels]
        described.append(
            SegmentStatistics(
                class_id=class_id,
                pixels=len(pixels),
                area_fraction=len(pixels) / (height * width),
                components=ndimage.label(labels == class_id, np.ones((3, 3)))[1],
                bbox_x=min(xs),
                bbox_y=min(ys),
                bbox_w=max(xs) - min(xs) + 1,
                bbox_h=max(ys) - min(ys) + 1,
                centroid_x=sum(xs) / len(xs),
                centroid_y=sum(ys) / len(ys),
                boundary_pixels=boundary,
                confidence_mean=sum(float(confidence[at]) for at in pixels) / len(pixels),
                margin_mean=sum(float(margin[at]) for at in pixels) / len(pixels),
            )
        )
    return described


def assert_same(found: tuple[SegmentStatistics, ...], expected: list[SegmentStatistics]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        for name in SegmentStatistics.__slots__:
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-12), name


def check(labels: Map) -> tuple[SegmentStatistics, ...]:
    ignore_index = IGNORE[labels.dtype]
    confidence, margin = probabilities(labels)
    found = segment_statistics(labels, confidence, margin, ignore_index)
    assert_same(found, describe_by_loops(labels, confidence, margin, ignore_index))
    return found


@settings(max_examples=150, deadline=None)
@given(labels=LABEL_MAPS)
def test_any_label_map_is_described_as_by_plain_loops(labels: Map) -> None:
    check(labels)


@settings(max_examples=150, deadline=None)
@given(labels=LABEL_MAPS, band_pixels=st.integers(1, 100))
def test_it_does_not_matter_into_how_many_bands_a_map_is_cut(labels: Map, band_pixels: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "_BAND_PIXELS", band_pixels)
        check(labels)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (2, 2)])
def test_the_smallest_maps(shape: tuple[int, int]) -> None:
    check(np.zeros(shape, np.uint8))
    check((np.indices(shape).sum(0) % 2).astype(np.uint8))


@pytest.mark.parametrize("side", [2, 7, 32])
def test_a_checkerboard_is_two_components(side: int) -> None:
    board = (np.indices((side, side)).sum(0) % 2).astype(np.uint8)
    assert [segment.components for segment in check(board)] == [1, 1]
    assert [segment.boundary_pixels for segment in check(board)] == [(side**2 + 1) // 2, side**2 // 2]


def test_runs_of_neighbouring_rows_do_not_touch_around_the_edge_of_the_image() -> None:
    labels = np.zeros((2, 5), np.uint8)
    labels[0, 4] = labels[1, 0] = 1  # neighbours in memory, far apart in the image
    assert check(labels)[1].components == 2


def test_a_spiral_is_one_component() -> None:
    labels = np.zeros((33, 33), np.uint8)
    y, x, dy, dx = 0, -1, 0, 1
    for length in [33, *sorted([*range(32, 0, -2)] * 2, reverse=True)]:
        for _ in range(length):
            y, x = y + dy, x + dx
            labels[y, x] = 1
        dy, dx = dx, -dy
    background, spiral = check(labels)
    assert (background.components, spiral.components) == (1, 1)


def test_a_comb_joins_only_at_its_last_row() -> None:
    labels = np.zeros((40, 41), np.uint8)
    labels[:, ::2] = 1
    labels[-1] = 1
    assert [segment.components for segment in check(labels)] == [20, 1]
    assert [segment.components for segment in check(labels[::-1].copy())] == [20, 1]


def test_unlabelled_pixels_have_no_entry_but_count_in_the_denominator_and_at_boundaries() -> None:
    labels = np.full((4, 4), 255, np.uint8)
    assert check(labels) == ()
    labels[1:3, 1:3] = 3
    (segment,) = check(labels)
    assert segment.area_fraction == 0.25
    assert segment.boundary_pixels == 4


def test_sixteen_bit_labels_above_255_stay_apart() -> None:
    labels = np.array([[0, 256, 65534], [512, 768, 65535]], np.uint16)
    assert [segment.class_id for segment in check(labels)] == [0, 256, 512, 768, 65534]


def test_many_random_classes(rng: np.random.Generator) -> None:
    check(rng.integers(0, 60, (50, 70)).astype(np.uint8))


def test_views_and_half_precision_are_taken_by_value(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 3, (20, 30)).astype(np.uint8)
    confidence = rng.random((20, 30)).astype(np.float16)
    seen = segment_statistics(labels[::2, ::-3], confidence[::2, ::-3], confidence[::2, ::-3], 255)
    copies = labels[::2, ::-3].copy(), confidence[::2, ::-3].copy()
    assert seen == segment_statistics(copies[0], copies[1], copies[1], 255)
    assert_same(seen, describe_by_loops(copies[0], copies[1], copies[1], 255))


def test_sums_are_taken_in_double_precision() -> None:
    confidence = np.full((1500, 1500), 0.1, np.float32)
    labels = np.zeros(confidence.shape, np.uint8)
    (segment,) = segment_statistics(labels, confidence, confidence, 255)
    assert segment.confidence_mean == pytest.approx(float(np.float32(0.1)), rel=1e-12)


def test_arrays_of_different_shapes_are_refused() -> None:
    labels, confidence = np.zeros((3, 4), np.uint8), np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match="differ in shape"):
        segment_statistics(labels, confidence, confidence, 255)
    with pytest.raises(ValueError, match="non-empty"):
        segment_statistics(np.zeros((3, 0), np.uint8), np.zeros((3, 0)), np.zeros((3, 0)), 255)
