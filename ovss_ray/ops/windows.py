"""Sliding windows: where they lie, cutting them out, and bringing their patch maps back to image resolution.

Windows form a Cartesian grid, so resampling a window's patch map to the window, averaging overlapping windows and
resampling to the original image are, together, one matrix per axis: `full = rows @ maps @ columns.T`. Nothing between
the patch maps and the final resolution is ever stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from ovss_ray.ops.resize import bilinear_matrix

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class WindowAxis:
    """The windows along one axis of an image: where each starts, and the size they share, in pixels."""

    length: int
    starts: tuple[int, ...]
    size: int


@dataclass(frozen=True)
class WindowGrid:
    """The windows of one image: every row start with every column start, row-major."""

    rows: WindowAxis
    columns: WindowAxis

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width of every window, in pixels."""
        return self.rows.size, self.columns.size

    @property
    def count(self) -> int:
        return len(self.rows.starts) * len(self.columns.starts)


def window_axis(length: int, crop: int, stride: int) -> WindowAxis:
    """Places windows along one axis; a window that would pass the end is shifted back, never padded.

    Args:
        length: pixels of the axis.
        crop: window size; 0 takes the whole axis. An axis shorter than the crop is one smaller window.
        stride: step between windows; a stride above the crop would leave pixels unseen and raises ValueError.
    """
    if crop == 0 or length <= crop:
        return WindowAxis(length, (0,), length)
    if not 0 < stride <= crop:
        raise ValueError(f"stride must lie between 1 and the crop {crop}, but it is {stride}")
    count = (length - crop + stride - 1) // stride + 1
    return WindowAxis(length, tuple(min(index * stride, length - crop) for index in range(count)), crop)


def window_grid(height: int, width: int, crop: int, stride: int) -> WindowGrid:
    """Places square windows over an image; see `window_axis`."""
    return WindowGrid(window_axis(height, crop, stride), window_axis(width, crop, stride))


def cut_windows(image: Tensor, grid: WindowGrid) -> Tensor:
    """Cuts the windows [n, C, h, w] out of an image [C, H, W], row-major."""
    height, width = grid.shape
    return torch.stack(
        [image[:, top : top + height, left : left + width] for top in grid.rows.starts for left in grid.columns.starts]
    )


def padded_size(size: int, multiple: int, least: int) -> int:
    """The size after padding up to a multiple (0 or 1: none), and never below `least`, in pixels."""
    padded = -(-size // multiple) * multiple if multiple else size
    return max(padded, least)


def pad_windows(windows: Tensor, size: tuple[int, int]) -> Tensor:
    """Pads [..., h, w] with zeros to `size`, evenly; an odd pixel goes to the right or the bottom."""
    vertical, horizontal = size[0] - windows.shape[-2], size[1] - windows.shape[-1]
    if not vertical and not horizontal:
        return windows
    left, top = horizontal // 2, vertical // 2
    return F.pad(windows, (left, horizontal - left, top, vertical - top))


@lru_cache(maxsize=64)
def axis_matrix(axis: WindowAxis, cells: int, padded: int, target: int, device: torch.device = _CPU) -> Tensor:
    """The [target, windows * cells] float32 matrix from the patch cells of all windows of an axis to target pixels.

    It stretches the cells of each window over its padded extent, cuts the padding off, averages overlapping windows
    and resamples the axis to the target, each step bilinear with half-pixel centres. Rows sum to 1. Images of one size
    share their matrices, so the last ones are kept; do not write into them.
    """
    before = (padded - axis.size) // 2
    one = bilinear_matrix(cells, padded)[before : before + axis.size]
    merged = torch.zeros(axis.length, len(axis.starts), cells, dtype=torch.float64)
    visits = torch.zeros(axis.length, dtype=torch.float64)
    for index, start in enumerate(axis.starts):
        merged[start : start + axis.size, index] += one
        visits[start : start + axis.size] += 1
    merged = merged.flatten(1) / visits[:, None]
    if target != axis.length:
        merged = bilinear_matrix(axis.length, target) @ merged
    return merged.float().to(device)


def tile_maps(maps: Tensor, grid: WindowGrid) -> Tensor:
    """Lays the patch maps [n, Q, h, w] of the windows side by side: [Q, rows * h, columns * w]."""
    _, queries, height, width = maps.shape
    rows, columns = len(grid.rows.starts), len(grid.columns.starts)
    tiled = maps.reshape(rows, columns, queries, height, width).permute(2, 0, 3, 1, 4)
    return tiled.reshape(queries, rows * height, columns * width)
