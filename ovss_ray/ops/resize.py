"""Resizing images the way the published protocols do: OpenCV's bilinear rule, on 8-bit levels."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def fitted_size(height: int, width: int, short_side: int, max_long_side: int) -> tuple[int, int]:
    """The size (height, width) with this short side and the same aspect ratio; the cap on the long side goes first.

    Each side is floor(side * scale + 0.5), at least 1; images are enlarged too.
    """
    scale = min(max_long_side / max(height, width), short_side / min(height, width))
    return max(1, math.floor(height * scale + 0.5)), max(1, math.floor(width * scale + 0.5))


def resize_levels(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes an 8-bit image bilinearly without antialias and rounds to 8-bit levels, half up, as OpenCV does.

    Args:
        image: [H, W, C] uint8.
        size: (h, w).

    Returns:
        [C, h, w] float32, whole numbers 0..255. Only the pixels that are needed are ever converted to float.
    """
    if tuple(image.shape[:2]) == size:
        return image.permute(2, 0, 1).float()
    top, bottom, row_weight = _taps(image.shape[0], size[0], image.device)
    left, right, column_weight = _taps(image.shape[1], size[1], image.device)
    column_weight = column_weight[:, None]
    rows = []
    for index in (top, bottom):
        near = image[index[:, None], left[None]].float()
        far = image[index[:, None], right[None]].float()
        rows.append(near + (far - near) * column_weight)
    mixed = rows[0] + (rows[1] - rows[0]) * row_weight[:, None, None]
    return (mixed + 0.5).floor_().permute(2, 0, 1)


def _taps(source: int, target: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The two source positions of every target position, and the weight of the second one."""
    position, weight = bilinear_taps(source, target)
    first = position.to(device)
    return first, (first + 1).clamp(max=source - 1), weight.float().to(device)


def bilinear_taps(source: int, target: int) -> tuple[Tensor, Tensor]:
    """First source index [target] int64 and weight of the next one [target] float64, with half-pixel centres."""
    centre = (torch.arange(target, dtype=torch.float64) + 0.5) * (source / target) - 0.5
    centre = centre.clamp(min=0)
    first = centre.floor().clamp(max=source - 1)
    return first.long(), centre - first


def bilinear_matrix(source: int, target: int) -> Tensor:
    """The [target, source] float64 matrix that resamples one axis bilinearly (align_corners False); rows sum to 1."""
    first, weight = bilinear_taps(source, target)
    rows = torch.arange(target)
    matrix = torch.zeros(target, source, dtype=torch.float64)
    matrix[rows, first] += 1 - weight
    matrix[rows, (first + 1).clamp(max=source - 1)] += weight
    return matrix
