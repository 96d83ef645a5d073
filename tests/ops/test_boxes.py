"""Boxes around what is high in a map, against scipy's connected components and cases with a known answer."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import ndimage

from ovss_ray.ops.boxes import high_boxes, min_max


def reference(scores: np.ndarray, share: float) -> np.ndarray:
    """One map: 8-bit levels above a share of the maximum, 8-connected groups, their boxes without the last row."""
    levels = (scores * 255).astype(np.uint8)
    groups, _ = ndimage.label(levels > int(share * levels.max()), structure=np.ones((3, 3)))
    out = np.zeros(scores.shape, bool)
    for rows, columns in ndimage.find_objects(groups):
        bottom, right = min(rows.stop, scores.shape[0] - 1), min(columns.stop, scores.shape[1] - 1)
        out[rows.start : bottom, columns.start : right] = True
    return out


@pytest.mark.parametrize("shape", [(2, 2), (5, 9), (14, 14), (31, 8)])
@pytest.mark.parametrize("share", [0.4, 0.7, None])
def test_boxes_surround_connected_groups(shape: tuple[int, int], share: float | None, rng) -> None:
    noise = rng.random((20, *shape)).astype(np.float32)
    noise[10:] = ndimage.gaussian_filter(noise[10:], (0, 1.5, 1.5))
    maps = min_max(torch.from_numpy(noise))
    shares = maps.mean((1, 2)) if share is None else share
    got = high_boxes(maps, shares).numpy()
    for index, scores in enumerate(maps.numpy()):
        expected = reference(scores, float(shares[index]) if share is None else share)
        assert np.array_equal(got[index], expected)
    assert got.any()


def test_a_winding_group_is_one_group() -> None:
    spiral = np.zeros((25, 25), np.float32)
    spiral[::2] = 1
    for row in range(1, 25, 2):
        spiral[row, -2 if row % 4 == 1 else 1] = 1
    spiral[:, 0] = spiral[:, -1] = 0
    got = high_boxes(torch.from_numpy(spiral)[None], 0.5)[0].numpy()
    assert np.array_equal(got, reference(spiral, 0.5))
    assert got[:24, 1:24].all()


def test_the_last_row_and_column_are_never_inside() -> None:
    maps = torch.zeros(2, 4, 6)
    maps[0, 3, 5] = 1
    maps[1, 1:, 2:] = 1
    got = high_boxes(maps, 0.5)
    assert not got[0].any()
    assert got[1].nonzero().tolist() == [[row, column] for row in (1, 2) for column in (2, 3, 4)]


@pytest.mark.parametrize("shape", [(1, 6), (6, 1)])
def test_a_single_row_is_kept(shape: tuple[int, int]) -> None:
    maps = torch.zeros(1, *shape)
    maps.view(-1)[1:3] = 1
    assert high_boxes(maps, 0.5).flatten().tolist() == [False, True, True, False, False, False]


def test_groups_of_different_maps_do_not_meet() -> None:
    maps = torch.zeros(3, 5, 5)
    maps[0, 0, 0] = maps[2, 3, 3] = 1
    got = high_boxes(maps, 0.5)
    assert got.nonzero().tolist() == [[0, 0, 0], [2, 3, 3]]


def test_min_max_brings_each_map_to_its_own_range() -> None:
    maps = torch.tensor([[[1.0, 3.0], [2.0, 1.0]], [[5.0, 5.0], [5.0, 5.0]]])
    assert min_max(maps).tolist() == [[[0, 1], [0.5, 0]], [[0, 0], [0, 0]]]
    assert min_max(maps, eps=2.0).tolist() == [[[0, 0.5], [0.25, 0]], [[0, 0], [0, 0]]]
