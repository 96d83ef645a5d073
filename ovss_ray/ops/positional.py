"""Positional embeddings for patch grids other than the one a vision transformer was trained on."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

PositionalPolicy = Literal["dino_offset", "bicubic", "bicubic_aa", "bilinear", "bilinear_half"]


def resample_positions(
    table: Tensor, native: tuple[int, int], grid: tuple[int, int], policy: PositionalPolicy
) -> Tensor:
    """Resamples a positional table to another patch grid.

    The policies give clearly different features off the native grid, so each is part of a method's definition:
    `dino_offset` (SCLIP, NACLIP, ClearCLIP, ...) is bicubic with the scale factor (h + 0.1) / G used as given;
    `bicubic` (MaskCLIP), `bicubic_aa` with antialias (GEM) and `bilinear` (CLIP Surgery) sample to the size;
    `bilinear_half` (TagCLIP, CLIP-ES) is `bilinear` with the whole table rounded to float16, on the native grid too.

    Args:
        table: [1 + Gh * Gw, D]; row 0 belongs to the class token and is never resampled.
        native: (Gh, Gw), the grid that the table was trained on.
        grid: (h, w), the grid wanted.

    Returns:
        [1 + h * w, D] float32, row-major; the table itself where the grid is the native one. Never a changed `table`.
    """
    if policy == "bilinear_half":
        return resample_positions(table, native, grid, "bilinear").half().float()
    if grid == native:
        # The grids are compared, not their sizes: 7 x 28 has as many patches as 14 x 14, at other places.
        return table.float()
    patches = table[1:].float().reshape(1, *native, -1).permute(0, 3, 1, 2)
    if policy == "dino_offset":
        factors = ((grid[0] + 0.1) / native[0], (grid[1] + 0.1) / native[1])
        patches = F.interpolate(patches, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
    elif policy == "bilinear":
        patches = F.interpolate(patches, size=grid, mode="bilinear", align_corners=False)
    else:
        patches = F.interpolate(patches, size=grid, mode="bicubic", antialias=policy == "bicubic_aa")
    if tuple(patches.shape[-2:]) != grid:
        raise ValueError(f"resampling {native} positions gave {tuple(patches.shape[-2:])} instead of {grid}")
    return torch.cat([table[:1].float(), patches.flatten(2)[0].T])
