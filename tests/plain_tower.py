"""A CLIP vision transformer and a pass over a square image, written out for one image: the reference for methods.

Tokens are [N, D] and attention maps explicit [H, N, N]; weights are read off open_clip's modules.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision import transforms

from ovss_ray.segmenters import DenseSegmenter, TextEmbeddings


def first_tokens(visual: Any, image: Tensor, **interpolation: Any) -> tuple[Tensor, tuple[int, int]]:
    """The tokens that enter the first block, and the patch grid.

    Args:
        image: [3, H, W].
        interpolation: how `F.interpolate` resamples the positions where the grid is not the native one.
    """
    patches = F.conv2d(image[None], visual.conv1.weight, stride=visual.patch_size)[0]
    grid = (patches.shape[1], patches.shape[2])
    positions = visual.positional_embedding
    if grid != tuple(visual.grid_size):
        table = positions[1:].T.reshape(1, -1, *visual.grid_size)
        positions = torch.cat([positions[:1], F.interpolate(table, grid, **interpolation)[0].flatten(1).T])
    tokens = torch.cat([visual.class_embedding[None], patches.flatten(1).T]) + positions
    return visual.ln_pre(tokens), grid


def queries_keys_values(block: Any, normed: Tensor) -> list[Tensor]:
    """Each [H, N, d]."""
    width = normed.shape[1]
    parts = []
    for first in (0, width, 2 * width):
        rows = slice(first, first + width)
        part = normed @ block.attn.in_proj_weight[rows].T + block.attn.in_proj_bias[rows]
        parts.append(torch.stack(part.chunk(block.attn.num_heads, dim=1)))
    return parts


def projected(block: Any, mixed: Tensor) -> Tensor:
    """The output projection of mixed values [H, N, d]."""
    return torch.cat([*mixed], dim=1) @ block.attn.out_proj.weight.T + block.attn.out_proj.bias


def one_block(block: Any, tokens: Tensor) -> Tensor:
    """The unmodified block."""
    q, k, v = queries_keys_values(block, block.ln_1(tokens))
    weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
    tokens = tokens + projected(block, weights @ v)
    hidden = block.mlp.c_fc(block.ln_2(tokens))
    return tokens + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))


def square_probabilities(segmenter: DenseSegmenter, image: np.ndarray, text: TextEmbeddings) -> Tensor:
    """Class probabilities [C, H, W] of one pass over the image as torchvision squeezes it into a square."""
    side, bicubic = segmenter.settings.short_side or 0, transforms.InterpolationMode.BICUBIC
    steps = [transforms.ToPILImage(), transforms.Resize((side, side), bicubic), transforms.ToTensor()]
    normalize = transforms.Normalize(segmenter.clip.pixel_mean, segmenter.clip.pixel_std)
    pixels = transforms.Compose([*steps, normalize])(image)
    maps = segmenter.patch_scores(pixels[None], torch.from_numpy(text.embeddings), text.vocabulary.query_class)
    square = F.interpolate(maps, (side, side), mode="bilinear", align_corners=False)
    full = F.interpolate(square, image.shape[:2], mode="bilinear", align_corners=False)[0]
    probability = (segmenter.settings.logit_scale * full).softmax(0)
    queries = [np.flatnonzero(text.query_class == index) for index in range(text.vocabulary.num_classes)]
    return torch.stack([probability[rows].amax(0) for rows in queries])
