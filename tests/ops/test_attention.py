"""Fused attention terms against explicit softmax matrices."""

from __future__ import annotations

import math

import pytest
import torch

from ovss_ray.ops.attention import attend, correlative_attention, gaussian_prior, merge_heads, split_heads


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 4, generator=generator) for _ in range(3))
    return q, k, v


def test_a_sum_of_terms_is_the_sum_of_attention_maps(qkv) -> None:
    q, k, v = qkv
    maps = (q @ q.transpose(-1, -2) / 2).softmax(-1) + (k @ k.transpose(-1, -2) / 2).softmax(-1)
    torch.testing.assert_close(attend(q, q, v) + attend(k, k, v), maps @ v)
    torch.testing.assert_close(correlative_attention(q, k, v), maps @ v)


def test_bias_and_scale_enter_before_the_softmax(qkv) -> None:
    _, k, v = qkv
    bias = torch.randn(6, 6)
    expected = (3.0 * k @ k.transpose(-1, -2) + bias).softmax(-1) @ v
    torch.testing.assert_close(attend(k, k, v, bias=bias, scale=3.0), expected)


def test_heads_split_and_merge_back() -> None:
    tokens = torch.randn(2, 5, 12)
    heads = split_heads(tokens, 3)
    assert heads.shape == (2, 3, 5, 4)
    assert torch.equal(heads[1, 2, 4], tokens[1, 4, 8:12])
    assert torch.equal(merge_heads(heads), tokens)


@pytest.mark.parametrize("grid", [(1, 1), (3, 3), (2, 5), (7, 28)])
@pytest.mark.parametrize("sigma", [0.5, 5.0])
def test_the_bump_falls_off_with_the_distance_of_patches(grid: tuple[int, int], sigma: float) -> None:
    prior = gaussian_prior(grid, sigma)
    places = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    expected = torch.zeros(1 + len(places), 1 + len(places), dtype=torch.float64)
    for a, here in enumerate(places):
        for b, there in enumerate(places):
            expected[1 + a, 1 + b] = math.exp(-(math.dist(here, there) ** 2) / (2 * sigma**2))
    torch.testing.assert_close(prior.double(), expected, atol=1e-6, rtol=1e-6)
    assert prior.diagonal().tolist() == [0] + [1] * len(places)


def test_a_steep_needle_of_a_bump_leaves_patches_their_own_values(qkv) -> None:
    _, k, v = qkv
    mixed = attend(k, k, v, bias=1e4 * gaussian_prior((1, 5), 1e-3))
    torch.testing.assert_close(mixed[:, :, 1:], v[:, :, 1:])


def test_the_bump_can_be_used_with_gradients_after_inference(qkv) -> None:
    with torch.inference_mode():
        gaussian_prior((5, 1), 2.5)
    q, k, v = (part.clone().requires_grad_() for part in qkv)
    attend(q, k, v, bias=gaussian_prior((5, 1), 2.5)).sum().backward()
    assert k.grad is not None
    assert k.grad.abs().sum() > 0
