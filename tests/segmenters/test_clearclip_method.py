"""ClearCLIP against explicit attention maps on open_clip's own modules, and its padding of windows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from ovss_ray.segmenters import load_segmenter
from tests import tiny_models
from tests.reference import class_probabilities, entering_last_block, explicit_last_block, self_weights


def clearclip(clip: Any, **settings: Any) -> Any:
    return load_segmenter("clearclip", clip=clip, device="cpu", dtype="float32", **settings)


@pytest.mark.parametrize("layers", [4, 12])
@pytest.mark.parametrize("size", [(64, 64), (48, 80), (77, 39)])
@torch.inference_mode()
def test_the_last_block_is_its_query_query_attention_alone(layers: int, size: tuple[int, int]) -> None:
    clip = tiny_models.build(layers=layers)
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))
    expected = explicit_last_block(clip, pixels, lambda q, _: self_weights(q), residual=False, mlp=False)
    torch.testing.assert_close(clearclip(clip).patch_embeddings(pixels), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("arch", ["reduced", "vanilla"])
@pytest.mark.parametrize("attention", ["qq", "kk", "qk", "vv", "identity"])
@torch.inference_mode()
def test_the_ablations_of_the_paper(tiny_clip, attention: str, arch: str) -> None:
    pixels, whole = torch.randn(2, 3, 48, 80, generator=torch.Generator().manual_seed(1)), arch == "vanilla"
    if attention == "vv":
        values = iter(all_values(tiny_clip, pixels))
        weights = lambda *_: self_weights(next(values))  # noqa: E731
    else:
        weights = {
            "qq": lambda q, _: self_weights(q),
            "kk": lambda _, k: self_weights(k),
            "qk": lambda q, k: (q @ k.T / q.shape[1] ** 0.5).softmax(1),
            "identity": lambda q, _: torch.eye(len(q)),
        }[attention]
    expected = explicit_last_block(tiny_clip, pixels, weights, residual=whole, mlp=whole)
    got = clearclip(tiny_clip, attention=attention, arch=arch).patch_embeddings(pixels)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def all_values(model: Any, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The values [N, d] of every head of the last block, image after image."""
    block = model.visual.transformer.resblocks[-1]
    width = block.attn.embed_dim
    weight, bias = block.attn.in_proj_weight[2 * width :], block.attn.in_proj_bias[2 * width :]
    values = [block.ln_1(tokens) @ weight.T + bias for tokens in entering_last_block(model, pixels)]
    return [head for value in values for head in value.chunk(block.attn.num_heads, dim=1)]


@pytest.mark.parametrize("crop", [0, 61])
def test_windows_are_padded_to_whole_patches(tiny_clip, vocabulary, images, crop: int) -> None:
    settings = {"short_side": 75, "crop": crop, "stride": 30, "max_long_side": 120}
    padded, dropped = clearclip(tiny_clip, **settings), clearclip(tiny_clip, pad=0, **settings)
    text = padded.encode_vocabulary(vocabulary)
    image = images[1]
    expected = class_probabilities(padded, image, text).max(0)
    np.testing.assert_allclose(padded.segment(image, text).confidence, expected, atol=2e-4)
    assert np.abs(dropped.segment(image, text).confidence - expected).max() > 0.01


def test_the_defaults_are_the_published_ones() -> None:
    settings = clearclip("ViT-B-32/random").settings
    assert (settings.short_side, settings.crop, settings.stride, settings.logit_scale) == (448, 448, 224, 50)
    assert (settings.prob_thd, settings.area_thd, settings.pad, settings.pamr) == (0, 0, "patch", 0)
    assert settings.positional == "dino_offset"


@pytest.mark.parametrize(
    ("given", "filled"),
    [
        ({}, (128, 128, 64)),
        ({"crop": 64}, (128, 64, 32)),
        ({"crop": 0}, (128, 0, 32)),
        ({"short_side": 100, "crop": 80, "stride": 20}, (100, 80, 20)),
    ],
)
def test_windows_follow_the_model_unless_they_are_given(tiny_clip, given: dict[str, int], filled: tuple) -> None:
    segmenter = clearclip(tiny_clip, **given)
    settings = segmenter.settings
    assert (settings.short_side, settings.crop, settings.stride) == filled
    assert settings.resolve(segmenter.tower.shape) == settings
