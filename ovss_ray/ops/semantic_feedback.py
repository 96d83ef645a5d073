"""Semantic feedback: how strongly patches belong together, judged by the labels that they got in a first pass."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 22
_CPU = torch.device("cpu")


def majority_labels(labels: Tensor, cell: int) -> Tensor:
    """The most frequent label of every square cell; ties go to the smallest label.

    Args:
        labels: [H, W] int64, not negative.
        cell: side of a cell in pixels; a remainder below one cell is dropped.

    Returns:
        [H // cell, W // cell] int64.
    """
    height, width = labels.shape[0] // cell, labels.shape[1] // cell
    cells = labels[: height * cell, : width * cell].reshape(height, cell, width, cell).transpose(1, 2).flatten(2)
    votes = cells.new_zeros(height, width, int(labels.max()) + 1).scatter_add_(2, cells, torch.ones_like(cells))
    return votes.argmax(-1)  # unlike torch.mode, argmax promises the first of equal values


def semantic_feedback(
    labels: Tensor, *, sigma: float = 5.0, decay_by_path: bool = True, full_path: bool = False
) -> Tensor:
    """The matrix of ResCLIP's semantic feedback refinement (Yang et al., CVPR 2025, section 3.3).

    Patches of one label belong together, less so where the straight line from the one towards the other leaves the
    label: by exp(-distance / largest distance), in chessboard distance. Every row is then blurred by a Gaussian along
    the row-major order of the patches, as in the authors' code: across the ends of the grid's rows, too.

    Args:
        labels: [B, h, w] int64, the label of every patch.
        sigma: standard deviation of the blur, in patches.
        decay_by_path: whether the lines count; without, all patches of one label belong together equally.
        full_path: tests the line up to the other patch. The authors' code steps through every line with the step count
            of the grid's longest one, but stops after as many steps as the patches are apart: early, for near ones.

    Returns:
        [B, n, n] float32 with n = h * w; rows sum to 1.
    """
    batch, height, width = labels.shape
    labels = labels.int()
    feedback = torch.empty(batch, height, width, height * width, device=labels.device)
    chunk = max(1, _CHUNK_ELEMENTS // (batch * height * width * width))
    for rows in torch.split(torch.arange(height, device=labels.device), chunk):
        belonging = (labels[:, rows, None, :, None] == labels[:, None, :, None, :]).float()
        if decay_by_path:
            distance = _chessboard_distance(rows, height, width)
            decay = torch.exp(-distance / _longest_distance(height, width))
            belonging *= torch.where(_path_stays(labels, rows, distance, full_path), 1.0, decay)
        blurred = _blur(belonging.transpose(2, 3).flatten(3), sigma)
        feedback[:, rows] = blurred / (blurred.sum(-1, keepdim=True) + 1e-8)
    return feedback.flatten(1, 2)


# Below, pairs of patches are laid out [c, h, w, w]: row of the first (some of the grid's), row of the second, column of
# the first, column of the second. The rows that a line visits follow from the two rows, its columns from the columns.


def _longest_distance(height: int, width: int) -> int:
    return max(height, width, 2) - 1  # one for a single patch, too: it is a divisor


def _chessboard_distance(rows: Tensor, height: int, width: int) -> Tensor:
    """The distances of all pairs whose first patch is in these rows [c]: [c, h, w, w] int64."""
    down, across = (torch.arange(size, device=rows.device) for size in (height, width))
    vertical, horizontal = (rows[:, None] - down).abs(), (across[:, None] - across).abs()
    return torch.maximum(vertical[:, :, None, None], horizontal)


def _path_stays(labels: Tensor, rows: Tensor, distance: Tensor, full_path: bool) -> Tensor:
    """Whether the lines from the patches in some rows [c] to all patches meet no other label: [B, c, h, w, w] bool."""
    _, height, width = labels.shape
    steps = _longest_distance(height, width)
    down, across = (_line_positions(size, steps, labels.device) for size in (height, width))
    own = labels[:, rows, None, :, None]
    stays = torch.ones(len(labels), *distance.shape, dtype=torch.bool, device=labels.device)
    for step in range(steps + 1):
        in_column = labels.index_select(2, across[step].flatten())
        visited = in_column.index_select(1, down[step, rows].flatten()).view_as(stays)
        unbroken = visited == own
        stays &= unbroken if full_path else unbroken | (distance < step)
    return stays


@lru_cache(maxsize=16)
def _line_positions(size: int, steps: int, device: torch.device = _CPU) -> Tensor:
    """[steps + 1, size, size] int64: where on an axis the line from one position to another is after each step.

    Halves round to even; another way to write the interpolation, or more precision, would round some to the other side.
    """
    share = torch.linspace(0, 1, steps + 1)[:, None, None]
    axis = torch.arange(size)
    return (axis[:, None] * (1 - share) + axis * share).round().long().to(device)


def _blur(rows: Tensor, sigma: float) -> Tensor:
    """A Gaussian along the last axis, zeros beyond its ends; sums in float32, which a convolution on a GPU may not."""
    length = rows.shape[-1]
    size = min(length, int(6 * sigma + 1))
    reach = size // 2
    offsets = torch.arange(-reach, reach + 1)
    kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
    kernel /= kernel.sum()
    padded = F.pad(rows, (reach, reach))
    blurred = torch.zeros_like(rows)
    for offset, weight in enumerate(kernel.tolist()):
        blurred.add_(padded[..., offset : offset + length], alpha=weight)
    return blurred
