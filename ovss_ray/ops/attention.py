"""Attention as the dense methods recombine it: heads, and softmax(a b^T) v as one fused kernel."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

_CPU = torch.device("cpu")


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, D] to [B, H, N, D / H]."""
    batch, count, _ = tokens.shape
    return tokens.view(batch, count, heads, -1).transpose(1, 2)


def merge_heads(tokens: Tensor) -> Tensor:
    """[B, H, N, d] to [B, N, H * d]."""
    return tokens.transpose(1, 2).flatten(2)


def attend(a: Tensor, b: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale * a b^T + bias) v per head, without ever storing the N x N weights.

    The result is linear in the weights, so a rule that adds attention maps adds calls, as `correlative_attention`.

    Args:
        a, b, v: [B, H, N, d].
        bias: added to the logits, broadcastable to [B, H, N, N].
        scale: 1 / sqrt(d) where None.
    """
    bias = None if bias is None else bias.to(a.dtype)
    return F.scaled_dot_product_attention(a, b, v, attn_mask=bias, scale=scale)


def correlative_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(softmax(q q^T) + softmax(k k^T)) v per head: the plain sum of SCLIP (Wang et al., ECCV 2024), whose rows add up
    to 2; all [B, H, N, d]."""
    return attend(q, q, v) + attend(k, k, v)


@lru_cache(maxsize=4)  # N x N floats each: 270 MB for 64 x 128 patches
@torch.inference_mode(False)  # or what is kept could not be used where gradients are wanted
def gaussian_prior(grid: tuple[int, int], sigma: float, device: torch.device = _CPU) -> Tensor:
    """The bump of NACLIP (Hajimiri et al., WACV 2025, section 3.2): patches near each other get larger logits.

    Args:
        grid: (h, w) patches.
        sigma: standard deviation in patches.

    Returns:
        [N, N] float32 with N = 1 + h * w: exp(-distance^2 / (2 sigma^2)) for two patches, 1 on the diagonal, and 0 for
        the class token in row and column 0. Shared by all inputs of that grid; do not write into it.
    """
    rows, columns = (torch.arange(size, dtype=torch.float32, device=device) for size in grid)
    across, down = ((axis[:, None] - axis[None]) ** 2 for axis in (columns, rows))
    squared = (down[:, None, :, None] + across[None, :, None, :]).reshape(grid[0] * grid[1], -1)
    return F.pad(torch.exp(-squared / (2 * sigma**2)), (1, 0, 1, 0))
