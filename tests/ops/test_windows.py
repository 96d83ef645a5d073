"""Window places against the published formula, and merging against the step-by-step protocol."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ovss_ray.ops.labelling import ScoreField
from ovss_ray.ops.windows import axis_matrix, cut_windows, pad_windows, padded_size, tile_maps, window_axis, window_grid


def published_windows(height: int, width: int, crop: int, stride: int) -> list[tuple[int, int, int, int]]:
    """The loop of the SCLIP family: (top, bottom, left, right) of each window."""
    places = []
    for row in range(max(height - crop + stride - 1, 0) // stride + 1):
        for column in range(max(width - crop + stride - 1, 0) // stride + 1):
            bottom, right = min(row * stride + crop, height), min(column * stride + crop, width)
            places.append((max(bottom - crop, 0), bottom, max(right - crop, 0), right))
    return places


def merge_step_by_step(maps, height, width, crop, stride, padded, out):
    """Upsample each window, cut its padding, add, divide by the visits, upsample to the original size."""
    total = torch.zeros(maps.shape[1], height, width, dtype=maps.dtype)
    visits = torch.zeros(height, width, dtype=maps.dtype)
    for one, (top, bottom, left, right) in zip(maps, published_windows(height, width, crop, stride), strict=True):
        up = F.interpolate(one[None], size=padded, mode="bilinear", align_corners=False)[0]
        y, x = (padded[0] - (bottom - top)) // 2, (padded[1] - (right - left)) // 2
        total[:, top:bottom, left:right] += up[:, y : y + bottom - top, x : x + right - left]
        visits[top:bottom, left:right] += 1
    assert visits.min() > 0
    return F.interpolate((total / visits)[None], size=out, mode="bilinear", align_corners=False)[0]


sizes = st.integers(1, 60)


@settings(max_examples=100, deadline=None)
@given(sizes, sizes, st.integers(1, 40), st.data())
def test_windows_lie_where_the_protocol_puts_them(height: int, width: int, crop: int, data: st.DataObject) -> None:
    stride = data.draw(st.integers(1, crop))
    grid = window_grid(height, width, crop, stride)
    image = torch.arange(height * width).view(1, height, width)
    windows = cut_windows(image, grid)
    expected = published_windows(height, width, crop, stride)
    assert grid.count == len(windows) == len(expected)
    for window, (top, bottom, left, right) in zip(windows, expected, strict=True):
        assert torch.equal(window, image[:, top:bottom, left:right])
    assert set(windows.flatten().tolist()) == set(range(height * width))


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 40), st.integers(4, 40), st.integers(4, 24), st.integers(1, 50), st.integers(1, 50), st.data())
def test_merging_equals_the_step_by_step_protocol(height, width, crop, out_h, out_w, data) -> None:
    stride = data.draw(st.integers(1, crop))
    multiple = data.draw(st.sampled_from([0, 4, 7]))
    grid = window_grid(height, width, crop, stride)
    padded = (padded_size(grid.shape[0], multiple, 4), padded_size(grid.shape[1], multiple, 4))
    cells = (padded[0] // 4, padded[1] // 4)
    maps = torch.randn(grid.count, 2, *cells, dtype=torch.float64)
    expected = merge_step_by_step(maps, height, width, crop, stride, padded, (out_h, out_w))
    rows = axis_matrix(grid.rows, cells[0], padded[0], out_h).double()
    columns = axis_matrix(grid.columns, cells[1], padded[1], out_w).double()
    field = ScoreField(tile_maps(maps, grid), rows, columns)
    torch.testing.assert_close(field.strip(0, out_h), expected, atol=1e-5, rtol=0)


def test_an_image_of_the_crop_size_is_one_window() -> None:
    assert window_grid(224, 224, 224, 112).count == 1


def test_crop_zero_is_the_whole_image() -> None:
    grid = window_grid(300, 500, 0, 1)
    assert (grid.count, grid.shape) == (1, (300, 500))


def test_a_stride_above_the_crop_is_refused() -> None:
    with pytest.raises(ValueError, match="stride must lie between 1 and the crop 10, but it is 11"):
        window_axis(100, 10, 11)


def test_averaging_equal_maps_changes_nothing() -> None:
    axis = window_axis(50, 20, 7)
    torch.testing.assert_close(axis_matrix(axis, 5, 20, 50).sum(1), torch.ones(50))


def test_padding_is_even_and_the_odd_pixel_goes_last() -> None:
    padded = pad_windows(torch.ones(1, 2, 4), (5, 4))
    assert padded[0, :, 0].tolist() == [0, 1, 1, 0, 0]
    assert padded_size(30, 16, 16) == 32
    assert padded_size(30, 0, 16) == 30
    assert padded_size(3, 0, 16) == 16
