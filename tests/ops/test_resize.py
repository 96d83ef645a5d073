"""Keep-ratio sizes and the 8-bit bilinear resize against plain loops, OpenCV's results and Pillow."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovss_ray.ops.resize import bilinear_matrix, fitted_size, resize_levels


def loop_resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    def taps(source: int, target: int, index: int) -> tuple[int, int, float]:
        centre = max((index + 0.5) * source / target - 0.5, 0.0)
        first = min(int(centre), source - 1)
        return first, min(first + 1, source - 1), centre - first

    out = np.zeros((height, width, image.shape[2]))
    for y in range(height):
        top, bottom, wy = taps(image.shape[0], height, y)
        for x in range(width):
            left, right, wx = taps(image.shape[1], width, x)
            upper = image[top, left] * (1.0 - wx) + image[top, right] * wx
            lower = image[bottom, left] * (1.0 - wx) + image[bottom, right] * wx
            out[y, x] = upper * (1 - wy) + lower * wy
    return out


@pytest.mark.parametrize(
    ("height", "width", "short", "cap", "expected"),
    [
        (375, 500, 336, 2048, (336, 448)),
        (500, 375, 448, 2048, (597, 448)),
        (100, 100, 336, 2048, (336, 336)),
        (1, 1, 336, 2048, (336, 336)),
        (1, 1000, 336, 2048, (2, 2048)),
        (10, 100000, 336, 2048, (1, 2048)),
        (1024, 2048, 560, 2048, (560, 1120)),
    ],
)
def test_the_aspect_ratio_is_kept(height: int, width: int, short: int, cap: int, expected: tuple[int, int]) -> None:
    assert fitted_size(height, width, short, cap) == expected


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
def test_resize_is_bilinear_to_a_level(height: int, width: int, new_h: int, new_w: int, seed: int) -> None:
    image = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    got = resize_levels(torch.from_numpy(image), (new_h, new_w)).numpy().transpose(1, 2, 0)
    expected = loop_resize(image, new_h, new_w)
    assert np.array_equal(got, np.floor(got))
    assert got.min() >= 0
    assert got.max() <= 255
    assert np.abs(got - expected).max() <= 1.02  # two shares cut to quarters, then half a level


def pattern(height: int, width: int) -> np.ndarray:
    y, x, channel = np.mgrid[:height, :width, :3]
    return ((y * 67 + x * x * 41 + channel * 29) * 7 % 256).astype(np.uint8)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        # cv2.resize(..., interpolation=cv2.INTER_LINEAR), OpenCV 4.11 and 5.0, channel 1
        (
            (4, 5),
            [[196, 213, 180, 64, 174, 202, 180], [139, 156, 159, 135, 154, 145, 123], [81, 99, 139, 205, 133, 87, 65]],
        ),
        (
            (4, 5),
            [
                [213, 71, 200],
                [198, 55, 185],
                [173, 31, 160],
                [149, 135, 136],
                [124, 238, 111],
                [99, 213, 86],
                [84, 198, 71],
            ],
        ),
        ((4, 4), [[197, 127], [111, 169]]),
        ((4, 5), [[205, 195], [119, 109]]),
        ((1, 3), [[203, 215, 234, 136, 71], [203, 215, 234, 136, 71], [203, 215, 234, 136, 71]]),
    ],
)
def test_levels_are_opencvs(source: tuple[int, int], expected: list[list[int]]) -> None:
    got = resize_levels(torch.from_numpy(pattern(*source)), (len(expected), len(expected[0])))
    assert got[1].int().tolist() == expected


def test_the_rounding_darkens_by_an_eighth_of_a_level(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (60, 70, 3), dtype=np.uint8)
    got = resize_levels(torch.from_numpy(image), (97, 131)).numpy().transpose(1, 2, 0)
    assert (got - loop_resize(image, 97, 131)).mean() == pytest.approx(-0.128, abs=0.01)


def test_enlarging_agrees_with_pillow(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (20, 31, 3), dtype=np.uint8)
    got = resize_levels(torch.from_numpy(image), (47, 64)).numpy().transpose(1, 2, 0)
    expected = np.asarray(Image.fromarray(image).resize((64, 47), Image.Resampling.BILINEAR), dtype=np.float32)
    assert np.abs(got - expected).max() <= 1


def test_shrinking_does_not_antialias() -> None:
    stripes = np.zeros((4, 32, 3), np.uint8)
    stripes[:, ::4] = 255
    got = resize_levels(torch.from_numpy(stripes), (4, 8))
    assert got.max() == 0  # samples lie between columns 1 and 2 of every four, never on the white one


def test_the_same_size_is_left_alone(rng: np.random.Generator) -> None:
    image = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    assert np.array_equal(resize_levels(torch.from_numpy(image), (5, 7)).numpy(), image.transpose(2, 0, 1))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 20), st.integers(1, 40))
def test_the_axis_matrix_is_torchs_bilinear(source: int, target: int) -> None:
    values = torch.randn(1, 1, source, 1, dtype=torch.float64)
    expected = torch.nn.functional.interpolate(values, size=(target, 1), mode="bilinear", align_corners=False)
    matrix = bilinear_matrix(source, target)
    torch.testing.assert_close(matrix @ values[0, 0], expected[0, 0])
    torch.testing.assert_close(matrix.sum(1), torch.ones(target, dtype=torch.float64))
