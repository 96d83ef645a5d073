"""The published computations, written out: explicit attention maps on open_clip's own modules, one window at a time."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.special import softmax
from torch import Tensor, nn

from ovss_ray.ops.pamr import pamr
from ovss_ray.segmenters import DenseSegmenter, TextEmbeddings

Weights = Callable[[Tensor, Tensor], Tensor]


def entering_last_block(model: Any, pixels: Tensor) -> Tensor:
    """The tokens [B, N, D] that enter the last block of open_clip's own forward pass, on any grid."""
    return entering_blocks(model, pixels)[-1]


def entering_blocks(model: Any, pixels: Tensor) -> list[Tensor]:
    """The tokens [B, N, D] that enter each block of open_clip's own forward pass, on any grid.

    Positions are resampled as in SCLIP's code: bicubic, by the factors (h + 0.1) / G and (w + 0.1) / G.
    """
    visual = deepcopy(model.visual)
    side, patch = visual.grid_size[0], visual.patch_size[0]
    grid = pixels.shape[-2] // patch, pixels.shape[-1] // patch
    if grid != (side, side):
        table = visual.positional_embedding
        square = table[1:].T.reshape(1, -1, side, side)
        factors = [(size + 0.1) / side for size in grid]
        square = F.interpolate(square, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
        visual.positional_embedding = nn.Parameter(torch.cat([table[:1], square.flatten(2)[0].T]))
    seen: list[Tensor] = []
    for block in visual.transformer.resblocks:
        block.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    visual(pixels)
    return seen


def explicit_last_block(model: Any, pixels: Tensor, weights: Weights, *, residual: bool, mlp: bool) -> Tensor:
    """Patch embeddings [B, h, w, E] of a tower whose last block mixes values by an explicit map.

    Args:
        weights: of one image and one head: queries and keys [N, d] to the map [N, N].
    """
    visual = model.visual
    block = visual.transformer.resblocks[-1]
    grid = pixels.shape[-2] // visual.patch_size[0], pixels.shape[-1] // visual.patch_size[0]
    embeddings = []
    for tokens in entering_last_block(model, pixels):
        projected = block.ln_1(tokens) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
        q, k, v = (part.chunk(block.attn.num_heads, dim=1) for part in projected.chunk(3, dim=1))
        mixed = torch.cat([weights(*heads) @ value for *heads, value in zip(q, k, v, strict=True)], dim=1)
        out = block.attn.out_proj(mixed)
        out = tokens + out if residual else out
        out = out + block.mlp(block.ln_2(out)) if mlp else out
        embeddings.append((visual.ln_post(out) @ visual.proj)[1:].view(*grid, -1))
    return torch.stack(embeddings)


def self_weights(tokens: Tensor) -> Tensor:
    """softmax(t t^T / sqrt(d)) of one head: [N, d] to [N, N]."""
    return (tokens @ tokens.T / tokens.shape[1] ** 0.5).softmax(1)


@torch.inference_mode()
def class_probabilities(segmenter: DenseSegmenter, image: np.ndarray, text: TextEmbeddings) -> np.ndarray:
    """Class probabilities [C, H, W] of the protocol of dense methods, one window at a time.

    Only the scores of one window, PAMR and the resize to 8-bit levels (where a tie may round either way) are the
    package's.
    """
    settings, patch = segmenter.settings, segmenter.tower.patch_size
    height, width = image.shape[:2]
    size = published_size(segmenter, height, width)
    pixels = segmenter.normalised(image, size, settings.interpolation)[None]
    total, visits = torch.zeros(1, len(text.embeddings), *size), torch.zeros(size)
    crop, stride = settings.crop or max(size), settings.stride or 1
    multiple = patch if settings.pad == "patch" else settings.pad or 1
    for row in range(max(size[0] - crop + stride - 1, 0) // stride + 1):
        for column in range(max(size[1] - crop + stride - 1, 0) // stride + 1):
            y2, x2 = min(row * stride + crop, size[0]), min(column * stride + crop, size[1])
            y1, x1 = max(y2 - crop, 0), max(x2 - crop, 0)
            down, right = (max(-(-side // multiple) * multiple, patch) - side for side in (y2 - y1, x2 - x1))
            top, left = down // 2, right // 2
            window = F.pad(pixels[:, :, y1:y2, x1:x2], (left, right - left, top, down - top))
            scores = segmenter.patch_scores(window, torch.from_numpy(text.embeddings), text.vocabulary.query_class)
            up = F.interpolate(scores, window.shape[-2:], mode="bilinear", align_corners=False)
            total[:, :, y1:y2, x1:x2] += up[:, :, top : top + y2 - y1, left : left + x2 - x1]
            visits[y1:y2, x1:x2] += 1
    full = F.interpolate(total / visits, (height, width), mode="bilinear", align_corners=False)[0]
    if settings.pamr:
        guide = F.interpolate(pixels, (height, width), mode="bilinear", align_corners=False)[0]
        full = pamr(guide, full, iterations=settings.pamr, dilations=settings.pamr_dilations)
    probability = softmax(settings.logit_scale * full.double().numpy(), axis=0)
    return np.stack([probability[text.query_class == c].max(0) for c in range(text.vocabulary.num_classes)])


def published_size(segmenter: DenseSegmenter, height: int, width: int) -> tuple[int, int]:
    """What an image is resized to, in whole numbers where the package's settings say so."""
    settings, patch = segmenter.settings, segmenter.tower.patch_size
    short_side = settings.short_side or 0
    if settings.resize == "square":
        return short_side, short_side
    shrink = settings.max_long_side / max(height, width)
    scale = min(1.0, shrink) if settings.resize == "patches" else min(shrink, short_side / min(height, width))
    fitted = [max(1, int(side * scale + 0.5)) for side in (height, width)]
    if settings.resize == "patches":
        fitted = [-(-side // patch) * patch for side in fitted]
    return fitted[0], fitted[1]
