"""Where a score map is high, as boxes: what weakly supervised methods mask their affinities with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_STEPS_BETWEEN_CHECKS = 8


def min_max(maps: Tensor, eps: float = 0.0) -> Tensor:
    """Brings every map [K, ...] to 0..1, its range taken as `eps` wider than it is; a constant map becomes 0."""
    flat = maps.flatten(1)
    flat = flat - flat.amin(1, keepdim=True)
    span = flat.amax(1, keepdim=True) + eps
    return (flat / span.masked_fill(span == 0, 1)).view(maps.shape)


def high_boxes(maps: Tensor, share: float | Tensor) -> Tensor:
    """The boxes around all places where a map is high, as one mask.

    The places are those above `share` of the map's maximum, both on 8-bit levels; each box surrounds one 8-connected
    group of them. That is what the bounding rectangles of OpenCV's contours amount to: nested contours and those of
    holes lie in the box of what surrounds them. As in the code of CLIP-ES (Lin et al., CVPR 2023) and TagCLIP, a box
    ends before the last row and the last column of the map; only a map with a single one keeps it.

    Args:
        maps: [K, h, w] float in 0..1.
        share: 0..1, for all maps or [K].

    Returns:
        [K, h, w] bool, true inside any box.
    """
    levels = (255 * maps).floor()
    limits = (share * levels.amax((1, 2))).floor()
    return _boxes_of_groups(levels > limits[:, None, None])


def _boxes_of_groups(mask: Tensor) -> Tensor:
    count, height, width = mask.shape
    cells = height * width
    groups = _connected(mask).flatten(1)
    shift = torch.arange(count, device=mask.device)[:, None] * (cells + 1)
    keys = (groups + shift).flatten()
    rows = torch.arange(height, device=mask.device).repeat_interleave(width).repeat(count)
    columns = torch.arange(width, device=mask.device).repeat(height * count)
    top, bottom = _extent(rows, keys, count * (cells + 1))
    left, right = _extent(columns, keys, count * (cells + 1))
    bottom = (bottom + 1).clamp(max=max(height - 1, 1))
    right = (right + 1).clamp(max=max(width - 1, 1))
    # Group 0 is what lies outside the mask; where it has no pixel, and for numbers of no group, nothing is painted.
    real = torch.zeros(count * (cells + 1), dtype=torch.bool, device=mask.device)
    real[keys[groups.flatten() > 0]] = True
    corners = torch.zeros(count, (height + 1) * (width + 1), dtype=torch.int32, device=mask.device).flatten()
    chosen = real.nonzero()[:, 0]
    base = (chosen // (cells + 1)) * (height + 1) * (width + 1)
    for row, column, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        at = base + row[chosen] * (width + 1) + column[chosen]
        corners.index_add_(0, at, torch.full_like(at, sign, dtype=torch.int32))
    covered = corners.view(count, height + 1, width + 1).cumsum(1).cumsum(2)
    return covered[:, :height, :width] > 0


def _extent(places: Tensor, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The smallest and the largest place of every key."""
    low = places.new_zeros(count).scatter_reduce_(0, keys, places, "amin", include_self=False)
    high = places.new_zeros(count).scatter_reduce_(0, keys, places, "amax", include_self=False)
    return low, high


def _connected(mask: Tensor) -> Tensor:
    """Numbers the 8-connected groups of each mask [K, h, w]: int64, 0 outside, one number from 1 to h * w per group."""
    _, height, width = mask.shape
    own = torch.arange(1, height * width + 1, device=mask.device, dtype=torch.float32).view(1, height, width)
    inside = mask.float()
    groups = own * inside
    while True:
        before = groups
        for _ in range(_STEPS_BETWEEN_CHECKS):
            groups = F.max_pool2d(groups[:, None], 3, stride=1, padding=1)[:, 0] * inside
        if torch.equal(groups, before):
            return groups.long()
