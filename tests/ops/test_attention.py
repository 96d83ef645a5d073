"""Fused attention terms against explicit softmax matrices."""

from __future__ import annotations

import pytest
import torch

from ovss_ray.ops.attention import attend, merge_heads, split_heads


@pytest.fixture
def qkv() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 6, 4, generator=generator) for _ in range(3))
    return q, k, v


def test_a_sum_of_terms_is_the_sum_of_attention_maps(qkv) -> None:
    q, k, v = qkv
    maps = (q @ q.transpose(-1, -2) / 2).softmax(-1) + (k @ k.transpose(-1, -2) / 2).softmax(-1)
    torch.testing.assert_close(attend(q, q, v) + attend(k, k, v), maps @ v)


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
