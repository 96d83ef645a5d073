"""NACLIP against explicit attention maps on open_clip's own modules, with the bump written as a loop."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ovss_ray.errors import SettingError
from ovss_ray.segmenters import load_segmenter
from ovss_ray.segmenters.naclip import mean_logit_bound
from tests import tiny_models
from tests.reference import class_probabilities, explicit_last_block, self_weights

SIZES = [(64, 64), (48, 80), (77, 39)]


def naclip(clip: Any, method: str = "naclip", **settings: Any) -> Any:
    return load_segmenter(method, clip=clip, device="cpu", dtype="float32", **settings)


def random_pixels(size: tuple[int, int]) -> Tensor:
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(0))


def bump(size: tuple[int, int], sigma: float) -> Tensor:
    """exp(-distance^2 / (2 sigma^2)) between the patches of an image, nothing for the class token."""
    places = [(row, column) for row in range(size[0] // 8) for column in range(size[1] // 8)]
    omega = torch.zeros(1 + len(places), 1 + len(places))
    for a, here in enumerate(places):
        for b, there in enumerate(places):
            omega[1 + a, 1 + b] = math.exp(-(math.dist(here, there) ** 2) / (2 * sigma**2))
    return omega


@pytest.mark.parametrize("layers", [4, 12])
@pytest.mark.parametrize("size", SIZES)
@torch.inference_mode()
def test_patches_attend_to_similar_keys_and_to_neighbours(layers: int, size: tuple[int, int]) -> None:
    clip = tiny_models.build(layers=layers)
    omega = bump(size, 5.0)
    expected = explicit_last_block(
        clip, random_pixels(size), lambda _, k: (k @ k.T / 4 + omega).softmax(1), residual=False, mlp=False
    )
    got = naclip(clip).patch_embeddings(random_pixels(size))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("arch", ["reduced", "vanilla"])
@pytest.mark.parametrize("sigma", [0.7, 12.0])
@torch.inference_mode()
def test_width_of_the_bump_and_the_block_around_it(tiny_clip, arch: str, sigma: float) -> None:
    pixels, omega, whole = random_pixels((48, 80)), bump((48, 80), sigma), arch == "vanilla"
    expected = explicit_last_block(
        tiny_clip, pixels, lambda _, k: (k @ k.T / 4 + omega).softmax(1), residual=whole, mlp=whole
    )
    got = naclip(tiny_clip, arch=arch, sigma=sigma).patch_embeddings(pixels)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_without_the_bump_it_is_key_key_attention(tiny_clip) -> None:
    pixels = random_pixels((77, 39))
    expected = explicit_last_block(tiny_clip, pixels, lambda _, k: self_weights(k), residual=False, mlp=False)
    got = naclip(tiny_clip, attention="kk").patch_embeddings(pixels)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_the_bump_alone_has_the_strength_of_the_logits_it_replaces(tiny_clip) -> None:
    size = (48, 80)
    pixels, omega = random_pixels(size), bump(size, 5.0)
    segmenter = naclip(tiny_clip, attention="nonly")
    for pixel in pixels:
        strength = explicit_strength(tiny_clip, pixel[None])
        weights = (omega * strength).softmax(1)
        expected = explicit_last_block(tiny_clip, pixel[None], lambda *_, w=weights: w, residual=False, mlp=False)
        torch.testing.assert_close(segmenter.patch_embeddings(pixel[None]), expected, atol=1e-4, rtol=1e-3)


def explicit_strength(clip: Any, pixels: Tensor) -> float:
    """The mean over the heads and all token pairs of |q_i| |k_j| / sqrt(d), for one image."""
    products: list[Tensor] = []

    def record(q: Tensor, k: Tensor) -> Tensor:
        products.append(torch.stack([a.norm() * b.norm() / 4 for a in q for b in k]))
        return torch.eye(len(q))

    explicit_last_block(clip, pixels, record, residual=False, mlp=False)
    return float(torch.stack(products).mean())


def test_the_strength_is_each_images_own() -> None:
    q, k = torch.randn(2, 3, 2, 5, 4, generator=torch.Generator().manual_seed(1))
    assert mean_logit_bound(q, k).shape == (3,)
    torch.testing.assert_close(mean_logit_bound(q, k)[1:2], mean_logit_bound(q[1:2], k[1:2]))


@pytest.mark.parametrize("crop", [0, 64])
def test_pamr_comes_after_the_upsampling(tiny_clip, vocabulary, images, crop: int) -> None:
    segmenter = naclip(tiny_clip, crop=crop, pamr=3, pamr_dilations=(2, 5))
    text = segmenter.encode_vocabulary(vocabulary)
    expected = class_probabilities(segmenter, images[1], text).max(0)
    np.testing.assert_allclose(segmenter.segment(images[1], text).confidence, expected, atol=5e-4)


def test_the_defaults_are_the_published_ones() -> None:
    settings = naclip("ViT-B-32/random").settings
    assert (settings.short_side, settings.crop, settings.stride, settings.logit_scale) == (336, 224, 112, 40)
    assert (settings.sigma, settings.attention, settings.arch, settings.pamr) == (5, "naclip", "reduced", 0)
    assert settings.positional == "dino_offset"


@pytest.mark.parametrize("wrong", [{"sigma": 0}, {"attention": "qk"}, {"arch": "half"}])
def test_other_settings_are_refused(tiny_clip, wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingError, match=next(iter(wrong))):
        naclip(tiny_clip, **wrong)
