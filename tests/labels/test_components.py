"""Connected components against plain loops, and their masks against pycocotools."""

from __future__ import annotations

import tracemalloc

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from ovss_ray.evaluation.ground_truth.rle import decode_mask
from ovss_ray.labels import ComponentStatistics, describe, masks, regions
from ovss_ray.labels.statistics import MAX_COMPONENTS
from tests.labels.test_statistics import IGNORE, LABEL_MAPS, Map, probabilities

Mask = npt.NDArray[np.bool_]


def flood(labels: Map) -> list[Mask]:
    """The 8-connected components, one pixel at a time, in reading order."""
    height, width = labels.shape
    seen = np.zeros(labels.shape, np.bool_)
    found = []
    for y in range(height):
        for x in range(width):
            if seen[y, x]:
                continue
            component = np.zeros(labels.shape, np.bool_)
            waiting = [(y, x)]
            while waiting:
                v, u = waiting.pop()
                if component[v, u] or labels[v, u] != labels[y, x]:
                    continue
                component[v, u] = True
                around = [(v + dy, u + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
                waiting += [(b, a) for b, a in around if 0 <= b < height and 0 <= a < width]
            seen |= component
            found.append(component)
    return found


def described(labels: Map, smallest: int) -> tuple[ComponentStatistics, ...]:
    confidence, margin = probabilities(labels)
    found = describe(labels, confidence, margin, IGNORE[labels.dtype], smallest_component=smallest)
    assert found.components is not None
    return found.components


def decoded(component: ComponentStatistics, shape: tuple[int, ...]) -> Mask:
    assert component.rle is not None
    return coco_mask.decode({"size": list(shape), "counts": component.rle.encode()}).astype(np.bool_)


def check(labels: Map, smallest: int) -> tuple[ComponentStatistics, ...]:
    found = described(labels, smallest)
    confidence, _ = probabilities(labels)
    expected = [mask for mask in flood(labels) if mask.sum() >= smallest and labels[mask][0] != IGNORE[labels.dtype]]
    expected.sort(key=lambda mask: (labels[mask][0], -mask.sum()))  # stable: the first in reading order
    assert len(found) == len(expected)
    for component, mask in zip(found, expected, strict=True):
        np.testing.assert_array_equal(decoded(component, labels.shape), mask)
        canonical = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        assert component.rle == canonical["counts"].decode()
        assert [component.bbox_x, component.bbox_y, component.bbox_w, component.bbox_h] == coco_mask.toBbox(
            canonical
        ).tolist()
        ys, xs = np.nonzero(mask)
        assert (component.class_id, component.pixels) == (labels[mask][0], coco_mask.area(canonical))
        assert component.area_fraction == mask.mean()
        assert (component.centroid_x, component.centroid_y) == pytest.approx((xs.mean(), ys.mean()))
        assert component.confidence_mean == pytest.approx(float(confidence[mask].mean(dtype=np.float64)))
    return found


@settings(max_examples=150, deadline=None)
@given(labels=LABEL_MAPS, smallest=st.integers(1, 12), band_pixels=st.sampled_from([1, 20, 100, 1 << 19]))
def test_any_label_map_is_described_as_by_plain_loops(labels: Map, smallest: int, band_pixels: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(regions, "_BAND_PIXELS", band_pixels)
        check(labels, smallest)


@pytest.mark.parametrize("shape", [(1, 1), (1, 9), (9, 1), (17, 13)])
def test_a_map_of_one_class_is_one_component(shape: tuple[int, int]) -> None:
    (component,) = check(np.zeros(shape, np.uint8), 1)
    assert component.pixels == shape[0] * shape[1]


def test_arms_that_meet_far_below_are_one_component(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(regions, "_BAND_PIXELS", 64)
    labels = np.zeros((40, 31), np.uint8)
    labels[:39, ::2] = 1
    labels[39] = labels[20, 4:9] = 1
    assert [component.class_id for component in check(labels, 8)] == [0] * 17 + [1]
    check(labels[::-1].copy(), 8)


def test_the_reader_of_ground_truth_reads_the_masks() -> None:
    labels = np.zeros((30, 40), np.uint8)
    labels[5:12, 6:20] = 1
    (_, component) = described(labels, 50)
    np.testing.assert_array_equal(decode_mask({"size": [30, 40], "counts": component.rle}, "here"), labels == 1)


def test_the_threshold_is_the_smallest_that_is_kept_and_unlabelled_pixels_are_no_component() -> None:
    labels = np.full((20, 20), 255, np.uint8)
    labels[:2, :5] = 3
    labels[10:13, :3] = 3
    assert [component.pixels for component in described(labels, 10)] == [10]
    assert [component.pixels for component in described(labels, 9)] == [10, 9]
    assert described(labels, 11) == ()
    confidence, margin = probabilities(labels)
    assert describe(labels, confidence, margin, 255).components is None


def test_of_very_many_the_largest_are_kept(rng: np.random.Generator) -> None:
    labels = rng.integers(0, 50, (300, 300)).astype(np.uint8)
    sizes = sorted((int(mask.sum()) for mask in flood_fast(labels)), reverse=True)
    assert len(sizes) > 4 * MAX_COMPONENTS
    kept = described(labels, 1)
    assert sorted((component.pixels for component in kept), reverse=True) == sizes[:MAX_COMPONENTS]


def flood_fast(labels: Map) -> list[Mask]:
    from scipy import ndimage

    found = []
    for class_id in np.unique(labels):
        numbered, count = ndimage.label(labels == class_id, np.ones((3, 3)))
        sizes = np.bincount(numbered.ravel())[1:]
        assert len(sizes) == count
        found += [np.ones(size, np.bool_) for size in sizes]
    return found


def test_the_most_ragged_masks_are_left_out_of_an_image_that_has_too_much_of_them() -> None:
    labels = (np.indices((1500, 1500)).sum(0) % 2).astype(np.uint8)
    labels[:100, :100] = 2
    first, second, smooth = described(labels, 100)
    assert (first.rle, second.rle) == (None, None)
    assert first.pixels + second.pixels == labels.size - 10_000
    np.testing.assert_array_equal(decoded(smooth, labels.shape), labels == 2)
    assert first.pixels > masks.MAX_MASK_RUNS


def test_memory_follows_the_number_of_pixels_even_in_noise(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(regions, "_BAND_PIXELS", 1 << 17)

    def peak(rows: int) -> int:
        labels = rng.integers(0, 60, (rows, 1000)).astype(np.uint8)
        nothing = np.broadcast_to(np.float32(0), labels.shape)
        tracemalloc.start()
        describe(labels, nothing, nothing, 255, smallest_component=1)
        used = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return used

    small, large = peak(600), peak(1800)
    assert small < 150 << 20
    assert large - small < 16 * 1_200_000
