"""SCLIP against explicit attention maps on open_clip's own modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ovss_ray.segmenters import load_segmenter
from tests import tiny_models
from tests.reference import class_probabilities, explicit_last_block, self_weights


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


def test_small_classes_go_before_the_threshold_is_applied(tiny_clip, vocabulary, images) -> None:
    segmenter = sclip(tiny_clip, logit_scale=65, prob_thd=0.6, area_thd=0.3)
    text = segmenter.encode_vocabulary(vocabulary)
    struck = weak = 0
    for image in images[:4]:
        scores = class_probabilities(segmenter, image, text)
        areas = [(scores.argmax(0) == c).sum() for c in range(3)]  # the fourth class is the background
        for c in range(3):
            if areas[c] <= 0.3 * sum(areas):
                scores[c] = 0
                struck += areas[c] > 0
        ranked = np.sort(scores, axis=0)
        expected = np.where(ranked[-1] < 0.6, 3, scores.argmax(0))
        weak += (ranked[-1] < 0.6).sum()
        clear = (ranked[-1] - ranked[-2] > 2e-3) & (abs(ranked[-1] - 0.6) > 2e-3)
        assert clear.mean() > 0.8
        assert np.array_equal(segmenter.segment(image, text).labels[clear], expected[clear])
    assert struck > 0
    assert weak > 0


def test_the_defaults_are_the_published_ones() -> None:
    settings = sclip("ViT-B-32/random").settings
    assert (settings.short_side, settings.crop, settings.stride, settings.logit_scale) == (336, 224, 112, 40)
    assert (settings.prob_thd, settings.area_thd, settings.pad, settings.pamr) == (0, 0, 0, 0)
    assert settings.positional == "dino_offset"
