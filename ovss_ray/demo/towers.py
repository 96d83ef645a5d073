"""The two towers of the tiny CLIP as they are run in training: the standard equations, arranged for speed on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def encode_pictures(model: Any, pixels: Tensor, top: int, left: int, *, reduced: bool = False) -> tuple[Tensor, Tensor]:
    """What CLIP says of a picture, and what its patches say of their places.

    The pictures take the positions of the patch grid from row `top` and column `left` on, as if the rest of a native
    picture had been dropped. So close-ups cost a fraction of a native picture and train the same weights.

    Args:
        model: an open_clip `CLIP` with a plain ViT.
        pixels: [B, 3, S, S], normalised, S no larger than the native size.
        top, left: in patches.
        reduced: read the patches without the last block's residual and MLP.

    Returns:
        Unit rows: the embedding of the CLS token [B, E], as `model.encode_image` gives it at the native size; and
        the patch embeddings [B, N, E] with the last block's attention left out (MaskCLIP, ECCV 2022).
    """
    visual = model.visual
    patches = visual.conv1(pixels)
    rows, columns = patches.shape[2:]
    grid = visual.positional_embedding[1:].view(*visual.grid_size, -1)
    positions = grid[top : top + rows, left : left + columns].reshape(rows * columns, -1)
    cls = (visual.class_embedding + visual.positional_embedding[0]).expand(len(pixels), 1, -1)
    tokens = visual.ln_pre(torch.cat([cls, patches.flatten(2).transpose(1, 2) + positions], dim=1))
    *early, last = visual.transformer.resblocks
    for block in early:
        tokens = _finish(block, tokens, _attend(block, tokens, tokens))
    whole = _finish(last, tokens[:, :1], _attend(last, tokens[:, :1], tokens))
    value = _value(last, tokens[:, 1:])
    parts = value if reduced else _finish(last, tokens[:, 1:], value)
    picture, dense = (F.normalize((visual.ln_post(x) @ visual.proj).float(), dim=-1) for x in (whole, parts))
    return picture[:, 0], dense


def encode_captions(model: Any, tokens: Tensor) -> Tensor:
    """Caption embeddings [B, E], unit rows: `model.encode_text` without the padding behind the longest caption."""
    length = int((tokens != 0).sum(dim=1).max())
    hidden = model.token_embedding(tokens[:, :length]) + model.positional_embedding[:length]
    hidden = model.ln_final(model.transformer(hidden, attn_mask=model.attn_mask[:length, :length]))
    ends = hidden[torch.arange(len(hidden)), tokens.argmax(dim=1)]
    return F.normalize(ends @ model.text_projection, dim=-1)


def _attend(block: Any, queries: Tensor, tokens: Tensor) -> Tensor:
    """Multi-head attention; in bfloat16 on a CPU, plain products beat the fused kernel."""
    attention = block.attn
    width, heads = attention.embed_dim, attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    q = F.linear(block.ln_1(queries), weight[:width], bias[:width])
    k, v = F.linear(block.ln_1(tokens), weight[width:], bias[width:]).chunk(2, dim=-1)
    q, k, v = (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in (q, k, v))
    weights = (q @ k.transpose(-1, -2) * (width // heads) ** -0.5).softmax(dim=-1)
    mixed: Tensor = attention.out_proj((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
    return mixed


def _value(block: Any, tokens: Tensor) -> Tensor:
    """Attention of every token to itself alone."""
    attention = block.attn
    start = 2 * attention.embed_dim
    value = F.linear(block.ln_1(tokens), attention.in_proj_weight[start:], attention.in_proj_bias[start:])
    projected: Tensor = attention.out_proj(value)
    return projected


def _finish(block: Any, tokens: Tensor, attended: Tensor) -> Tensor:
    tokens = tokens + attended
    finished: Tensor = tokens + block.mlp(block.ln_2(tokens))
    return finished
