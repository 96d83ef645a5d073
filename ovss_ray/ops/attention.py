"""Attention as the dense methods recombine it: heads, and softmax(a b^T) v as one fused kernel."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, N, D] to [B, H, N, D / H]."""
    batch, count, _ = tokens.shape
    return tokens.view(batch, count, heads, -1).transpose(1, 2)


def merge_heads(tokens: Tensor) -> Tensor:
    """[B, H, N, d] to [B, N, H * d]."""
    return tokens.transpose(1, 2).flatten(2)


def attend(a: Tensor, b: Tensor, v: Tensor, *, bias: Tensor | None = None, scale: float | None = None) -> Tensor:
    """softmax(scale * a b^T + bias) v per head, without ever storing the N x N weights.

    The result is linear in the weights, so a rule that adds attention maps adds calls: SCLIP's correlative
    self-attention is `attend(q, q, v) + attend(k, k, v)`.

    Args:
        a, b, v: [B, H, N, d].
        bias: added to the logits, broadcastable to [B, H, N, N].
        scale: 1 / sqrt(d) where None.
    """
    bias = None if bias is None else bias.to(a.dtype)
    return F.scaled_dot_product_attention(a, b, v, attn_mask=bias, scale=scale)
