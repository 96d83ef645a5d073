"""Views of an image that a method averages over, and the way back from a view's maps to the image's."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

View = Literal["original", "grayscale", "blur", "vertical_flip", "horizontal_flip"]

FLIPPED_AXIS: dict[View, int] = {"vertical_flip": -2, "horizontal_flip": -1}
"""The views that move pixels, and the axis of [..., H, W] that they turn round; the others change colours only."""

_LUMA = (0.2989, 0.587, 0.114)
_BLUR_RADIUS = 5
_BLUR_SIGMA = 5.0
_CPU = torch.device("cpu")


def take_view(pixels: Tensor, view: View) -> Tensor:
    """A view [..., 3, H, W] of an image of that shape."""
    if view == "grayscale":
        return grayscale(pixels)
    if view == "blur":
        return gaussian_blur(pixels)
    return undo_view(pixels, view)  # a flip undoes itself


def undo_view(maps: Tensor, view: View) -> Tensor:
    """Brings maps [..., h, w] of a view back to the orientation of the image.

    Patch maps may be turned back before they are upsampled: bilinear upsampling over the same extent is symmetric.
    """
    return maps.flip(FLIPPED_AXIS[view]) if view in FLIPPED_AXIS else maps


def grayscale(pixels: Tensor) -> Tensor:
    """0.2989 R + 0.587 G + 0.114 B in all three channels of [..., 3, H, W]."""
    weights = torch.tensor(_LUMA, dtype=pixels.dtype, device=pixels.device)[:, None, None]
    return (weights * pixels).sum(-3, keepdim=True).expand_as(pixels)


def gaussian_blur(pixels: Tensor) -> Tensor:
    """Blurs [..., H, W] with an 11 x 11 Gaussian of sigma 5 whose weights sum to 1.

    Edges are mirrored without repeating the edge pixel, over and over where an axis is shorter than the kernel.
    """
    rows, columns = (_blur_matrix(size, pixels.device).to(pixels.dtype) for size in pixels.shape[-2:])
    return rows @ pixels @ columns.T


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # or what is kept could not be used where gradients are wanted
def _blur_matrix(size: int, device: torch.device = _CPU) -> Tensor:
    """The [size, size] float32 matrix that blurs one axis; kept, so do not write into it."""
    weights = np.exp(-0.5 * (np.arange(-_BLUR_RADIUS, _BLUR_RADIUS + 1) / _BLUR_SIGMA) ** 2)
    sources = np.pad(np.arange(size), _BLUR_RADIUS, mode="reflect")
    matrix = np.zeros((size, size))
    for offset, weight in enumerate(weights / weights.sum()):
        matrix[np.arange(size), sources[offset : offset + size]] += weight
    return torch.from_numpy(matrix).to(device, torch.float32)
