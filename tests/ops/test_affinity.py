"""Affinities from attention, against torch's own attention weights and plain loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from ovss_ray.ops.affinity import patch_attention, symmetric_transition, votes_and_means
from ovss_ray.ops.attention import split_heads


@pytest.mark.parametrize("max_elements", [1, 1 << 20])
@torch.inference_mode()
def test_patch_attention_is_the_mean_weight_of_torchs_attention(max_elements: int) -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(12, 3, batch_first=True)
    tokens = torch.randn(1, 8, 12)
    _, weights = attention(tokens, tokens, tokens, need_weights=True)
    projected = nn.functional.linear(tokens, attention.in_proj_weight, attention.in_proj_bias)
    q, k, _ = (split_heads(part, 3)[0] for part in projected.chunk(3, -1))
    torch.testing.assert_close(patch_attention(q, k, max_elements), weights[0, 1:, 1:])


def test_votes_count_the_maps_that_are_above_their_own_mean(rng) -> None:
    maps = rng.random((6, 5, 5)).astype(np.float32) * np.arange(1, 7, dtype=np.float32)[:, None, None]
    groups = ((1, 2, 5), (0,), (3, 4, 4))
    votes, means = votes_and_means(iter(torch.from_numpy(maps)), groups)
    for a in range(5):
        for b in range(5):
            assert votes[a, b] == sum(maps[i, a, b] > maps[i].mean() for i in range(6))
            for group, mean in zip(groups, means, strict=True):
                assert float(mean[a, b]) == pytest.approx(np.mean([maps[i, a, b] for i in set(group)]), rel=1e-6)


def test_the_transition_is_symmetric_and_nearly_doubly_stochastic(rng) -> None:
    affinity = rng.random((7, 7))
    expected = affinity.copy()
    for _ in range(3):
        for column in range(7):
            expected[:, column] /= sum(expected[row, column] for row in range(7))
        for row in range(7):
            expected[row] /= sum(expected[row, column] for column in range(7))
    got = symmetric_transition(torch.from_numpy(affinity).float()).numpy()
    np.testing.assert_allclose(got, (expected + expected.T) / 2, rtol=1e-5)
    assert np.array_equal(got, got.T)
    np.testing.assert_allclose(got.sum(0), 1, atol=2e-3)


def test_an_isolated_patch_gives_no_nan() -> None:
    affinity = torch.rand(4, 4)
    affinity[:, 2] = affinity[2] = 0
    assert symmetric_transition(affinity).isfinite().all()
