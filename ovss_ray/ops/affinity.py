"""Attention maps as affinities between patches: head averages, votes across blocks, and normalisation."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import torch
from torch import Tensor


def patch_attention(q: Tensor, k: Tensor, max_elements: int) -> Tensor:
    """How much patches attend to each other, as the mean over heads of softmax(q k^T / sqrt d).

    Args:
        q, k: [H, N, d]; token 0 is the class token. It takes part in the softmax, and its row and column are dropped
            afterwards, so that rows sum to less than 1.
        max_elements: weights held at one time; bounds memory, does not change the result.

    Returns:
        [N - 1, N - 1] float32.
    """
    heads, count, width = q.shape
    step = max(1, max_elements // count**2)
    total = torch.zeros(count - 1, count - 1, device=q.device)
    for start in range(0, heads, step):
        logits = (q[start : start + step].float() * width**-0.5) @ k[start : start + step].float().transpose(1, 2)
        total += logits.softmax(-1)[:, 1:, 1:].sum(0)
    return total / heads


def votes_and_means(maps: Iterable[Tensor], groups: Sequence[Collection[int]]) -> tuple[Tensor, list[Tensor]]:
    """Goes through the attention maps of all blocks once, and never holds more than one of them.

    Args:
        maps: the map of each block, [n, n] float32, in order.
        groups: block numbers, none empty; one that is named twice counts once.

    Returns:
        votes [n, n] int: in how many maps a weight is above the mean of its map; and the mean map of each group.
    """
    sums: list[Tensor] = []
    votes = None
    for index, weights in enumerate(maps):
        if votes is None:
            votes = torch.zeros_like(weights, dtype=torch.int32)
            sums = [torch.zeros_like(weights) for _ in groups]
        votes += weights > weights.mean()
        for total, group in zip(sums, groups, strict=True):
            if index in group:
                total += weights
    assert votes is not None
    return votes, [total / len(set(group)) for total, group in zip(sums, groups, strict=True)]


def symmetric_transition(affinity: Tensor, rounds: int = 3) -> Tensor:
    """Makes an affinity nearly doubly stochastic and symmetric, as CLIP-ES does (Lin et al., CVPR 2023, section 3.3).

    Columns and then rows are divided by their sums, `rounds` times, and the result is averaged with its transpose.

    Args:
        affinity: [n, n] float32, not negative.

    Returns:
        [n, n] float32.
    """
    tiny = torch.finfo(affinity.dtype).tiny
    for _ in range(rounds):
        affinity = affinity / affinity.sum(0, keepdim=True).clamp(min=tiny)
        affinity = affinity / affinity.sum(1, keepdim=True).clamp(min=tiny)
    return (affinity + affinity.T) / 2
