"""Views of an image against torchvision and SciPy, and the way back."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from scipy import ndimage

from ovss_ray.ops.views import FLIPPED_AXIS, View, gaussian_blur, take_view, undo_view

VIEWS: tuple[View, ...] = get_args(View)


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("size", [(6, 6), (31, 44), (64, 17)])
def test_views_are_those_of_torchvision(size: tuple[int, int]) -> None:
    pixels = random(2, 3, *size)
    expected = {
        "original": pixels,
        "grayscale": TF.rgb_to_grayscale(pixels, num_output_channels=3),
        "blur": TF.gaussian_blur(pixels, [11, 11], [5.0, 5.0]),
        "vertical_flip": TF.vflip(pixels),
        "horizontal_flip": TF.hflip(pixels),
    }
    assert set(expected) == set(VIEWS)
    for view in VIEWS:
        torch.testing.assert_close(take_view(pixels, view), expected[view], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (2, 5), (3, 40), (6, 4)])
def test_the_blur_reflects_over_and_over_in_images_smaller_than_its_kernel(size: tuple[int, int]) -> None:
    pixels = random(3, *size)
    weights = np.exp(-(np.arange(-5, 6) ** 2) / 50)
    expected = pixels.double().numpy()
    for axis in (1, 2):
        expected = ndimage.correlate1d(expected, weights / weights.sum(), axis=axis, mode="mirror")
    np.testing.assert_allclose(gaussian_blur(pixels).numpy(), expected, atol=2e-6)


def test_the_blur_leaves_constant_images_alone() -> None:
    torch.testing.assert_close(gaussian_blur(torch.full((3, 7, 20), 0.7)), torch.full((3, 7, 20), 0.7))


def test_the_blur_can_be_differentiated_after_it_was_used_without_gradients() -> None:
    with torch.inference_mode():
        gaussian_blur(random(3, 13, 14))
    pixels = random(3, 13, 14).requires_grad_()
    gaussian_blur(pixels).sum().backward()
    assert pixels.grad is not None


@pytest.mark.parametrize("view", VIEWS)
def test_maps_of_a_view_are_brought_back(view: View) -> None:
    maps = random(2, 5, 3, 4)
    moved = take_view(maps, view) if view in FLIPPED_AXIS else maps
    assert torch.equal(undo_view(moved, view), maps)


@pytest.mark.parametrize("view", list(FLIPPED_AXIS))
@pytest.mark.parametrize("size", [(48, 64), (50, 61), (7, 99), (3, 2)])
def test_turning_back_before_upsampling_equals_turning_back_after_it(view: View, size: tuple[int, int]) -> None:
    maps = random(1, 5, 6, 7)
    after = undo_view(F.interpolate(maps, size, mode="bilinear", align_corners=False), view)
    before = F.interpolate(undo_view(maps, view), size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(before, after, atol=2e-6, rtol=0)
