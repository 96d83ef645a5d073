"""SCLIP against explicit attention maps on open_clip's own modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ovss_ray.segmenters import load_segmenter
from tests import tiny_models
from tests.reference import explicit_last_block, self_weights


def sclip(clip: Any, **settings: Any) -> Any:
    return load_segmenter("sclip", clip=clip, device="cpu", dtype="float32", **settings)


def correlative(q: Tensor, k: Tensor) -> Tensor:
    return self_weights(q) + self_weights(k)


@pytest.mark.parametrize("layers", [4, 12])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (77, 39)])
@torch.inference_mode()
def test_the_last_block_attends_by_the_sum_of_two_maps(layers: int, size: tuple[int, int]) -> None:
    clip = tiny_models.build(layers=layers)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = explicit_last_block(clip, pixels, correlative, residual=True, mlp=True)
    torch.testing.assert_close(sclip(clip).patch_embeddings(pixels), expected, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_the_sum_is_not_the_mean(tiny_clip) -> None:
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    halved = explicit_last_block(tiny_clip, pixels, lambda q, k: correlative(q, k) / 2, residual=True, mlp=True)
    assert (sclip(tiny_clip).patch_embeddings(pixels) - halved).abs().max() > 0.1


def test_the_defaults_are_the_published_ones() -> None:
    settings = sclip("ViT-B-32/random").settings
    assert (settings.short_side, settings.crop, settings.stride, settings.logit_scale) == (336, 224, 112, 40)
    assert (settings.prob_thd, settings.area_thd, settings.pad, settings.pamr) == (0, 0, 0, 0)
    assert settings.positional == "dino_offset"
