"""Pixel-adaptive mask refinement: score maps are smoothed along the image's own edges."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_OFFSETS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1))
_CHUNK_ELEMENTS = 1 << 24


def pamr(image: Tensor, maps: Tensor, *, iterations: int = 10, dilations: Sequence[int] = (8, 16)) -> Tensor:
    """Refines score maps by repeated averaging over neighbours that look alike.

    Araslanov and Roth, "Single-Stage Semantic Segmentation from Image Labels" (CVPR 2020), section 3.3. Constant maps
    stay as they are and every value stays within the range of its map.

    Args:
        image: [3, H, W] float, the normalised image.
        maps: [Q, h, w] float; resampled to the image (corners aligned) where the sizes differ.
        iterations: times that every pixel is replaced by the weighted mean of its neighbours.
        dilations: distances in pixels of the eight neighbours; each adds eight.

    Returns:
        [Q, H, W] float32, the image's size.
    """
    maps = maps.float()
    if maps.shape[-2:] != image.shape[-2:]:
        maps = F.interpolate(maps[None], image.shape[-2:], mode="bilinear", align_corners=True)[0]
    weights = _affinity(image.float(), dilations)
    chunk = max(1, _CHUNK_ELEMENTS // weights[0].numel())
    return torch.cat([_smooth(part, weights, iterations, dilations) for part in torch.split(maps, chunk)])


def _affinity(image: Tensor, dilations: Sequence[int]) -> Tensor:
    """Weights [8 * len(dilations), H, W] of the neighbours; they sum to 1 at every pixel."""
    samples = torch.stack([_shifted(image, dy * far, dx * far) for far in dilations for dy, dx in _OFFSETS])
    spread = samples.std(0, unbiased=True)
    neighbours = [index for index in range(len(samples)) if _OFFSETS[index % 9] != (0, 0)]
    distance = (samples[neighbours] - image).abs_() / (1e-8 + 0.1 * spread)
    return (-distance.mean(1)).softmax(0)


def _smooth(maps: Tensor, weights: Tensor, iterations: int, dilations: Sequence[int]) -> Tensor:
    steps = [(dy * far, dx * far) for far in dilations for dy, dx in _OFFSETS if (dy, dx) != (0, 0)]
    margin = max(dilations)
    height, width = maps.shape[-2:]
    for _ in range(iterations):
        padded = F.pad(maps, (margin,) * 4, mode="replicate")
        mixed = torch.zeros_like(maps)
        for weight, (dy, dx) in zip(weights, steps, strict=True):
            top, left = margin + dy, margin + dx
            mixed.addcmul_(weight, padded[:, top : top + height, left : left + width])
        maps = mixed
    return maps


def _shifted(image: Tensor, dy: int, dx: int) -> Tensor:
    """The image seen from a neighbour: out[y, x] = image[y + dy, x + dx], edges repeated."""
    height, width = image.shape[-2:]
    rows = (torch.arange(height, device=image.device) + dy).clamp_(0, height - 1)
    columns = (torch.arange(width, device=image.device) + dx).clamp_(0, width - 1)
    return image[..., rows[:, None], columns]
