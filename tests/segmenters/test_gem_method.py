"""GEM against its path written out head by head with explicit maps, and its square input against torchvision."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision import transforms

from ovss_ray.models.vision import TowerShape
from ovss_ray.segmenters import load_segmenter
from ovss_ray.segmenters.gem import GEMSettings, adaptive_beta, cluster_attention
from tests import tiny_models
from tests.plain_tower import first_tokens, one_block, projected, queries_keys_values, square_probabilities


@pytest.fixture(scope="module")
def deep_clip():  # type: ignore[no-untyped-def]
    return tiny_models.build(layers=12)


def gem(clip, **settings):  # type: ignore[no-untyped-def]
    return load_segmenter("gem", clip=clip, device="cpu", dtype="float32", **settings)


def random_pixels(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height))


def ensemble(q: Tensor, k: Tensor, v: Tensor, beta: float, iterations: int) -> Tensor:
    """The mean of the three attentions, [H, N, d], one head at a time."""
    heads = []
    for head in range(len(v)):
        total = torch.zeros_like(v[head])
        for part in (v[head], k[head], q[head]):
            tokens = part
            for _ in range(iterations):
                unit = tokens / tokens.norm(dim=-1, keepdim=True)
                tokens = (beta * unit @ unit.T).softmax(-1) @ unit
            unit = tokens / tokens.norm(dim=-1, keepdim=True)
            total = total + (beta * unit @ unit.T).softmax(-1) @ v[head]
        heads.append(total / 3)
    return torch.stack(heads)


def gem_path(visual, image: Tensor, settings: GEMSettings) -> Tensor:  # type: ignore[no-untyped-def]
    """Patch embeddings [h, w, E]."""
    assert settings.path_blocks is not None
    first = 12 - settings.path_blocks
    original, grid = first_tokens(visual, image, mode="bicubic", antialias=True)
    for block in visual.transformer.resblocks[:first]:
        original = one_block(block, original)
    path = original
    for block in visual.transformer.resblocks[first:]:
        normed = block.ln_1(original)
        q, k, v = queries_keys_values(block, normed)
        beta = settings.temperature or float(torch.stack([token.norm() for token in normed]).mean()) / 16**0.5
        path = path + projected(block, ensemble(q, k, v, beta, settings.iterations))
        original = one_block(block, original)
    return (visual.ln_post(path[1:]) @ visual.proj).unflatten(0, grid)


@pytest.mark.parametrize("size", [(64, 64), (128, 128), (40, 104), (30, 53)])
@pytest.mark.parametrize(
    "settings", [{}, {"iterations": 0}, {"iterations": 3, "path_blocks": 2}, {"temperature": 7.5}, {"path_blocks": 12}]
)
@torch.inference_mode()
def test_the_second_path_adds_up_three_attentions(deep_clip, size, settings) -> None:
    pixels = random_pixels(*size)
    segmenter = gem(deep_clip, **settings)
    for got, image in zip(segmenter.patch_embeddings(pixels), pixels, strict=True):
        expected = gem_path(deep_clip.visual, image, segmenter.settings)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_temperature_follows_each_image_alone() -> None:
    normed = (
        torch.randn(3, 5, 32, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 3, 9])[:, None, None]
    )
    expected = [np.mean([np.sqrt((token**2).sum()) for token in image]) / 4 for image in normed.numpy()]
    np.testing.assert_allclose(adaptive_beta(normed, 16).flatten().numpy(), expected, rtol=1e-5)


def test_a_large_factor_keeps_every_token_and_a_small_one_takes_the_mean() -> None:
    part, v = torch.randn(2, 1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(cluster_attention(part, v, 1e5, 1), v, atol=1e-4, rtol=0)
    mean = v.mean(2, keepdim=True).expand_as(v)
    torch.testing.assert_close(cluster_attention(part, v, 1e-6, 1), mean, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_the_original_path_is_clips_own(deep_clip) -> None:
    pixels = random_pixels(64, 64)
    _, image = gem(deep_clip).patches_and_image(pixels)
    torch.testing.assert_close(image, deep_clip.encode_image(pixels), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_without_path_blocks_the_patches_are_those_of_plain_clip(deep_clip) -> None:
    pixels = random_pixels(128, 128)
    plain = load_segmenter("clipbase", clip=deep_clip, device="cpu", dtype="float32", positional="bicubic_aa")
    got = gem(deep_clip, path_blocks=0).patch_embeddings(pixels)
    torch.testing.assert_close(got, plain.patch_embeddings(pixels), atol=1e-5, rtol=1e-5)


def test_settings_follow_the_model(deep_clip, tiny_clip) -> None:
    published = GEMSettings().resolve(TowerShape(224, 16, 12))
    assert (published.short_side, published.crop) == (448, 0)
    assert (published.resize, published.interpolation) == ("square", "bicubic")
    assert (published.path_blocks, published.iterations, published.temperature) == (6, 1, None)
    assert published.resolve(TowerShape(224, 16, 12)) == published
    assert gem(tiny_clip).settings.short_side == 128
    assert gem(tiny_clip, short_side=100).settings.short_side == 100
    assert gem(deep_clip).positional == "bicubic_aa"


@pytest.mark.parametrize("index", [0, 1, 2, 4, 6])
@torch.inference_mode()
def test_the_whole_image_goes_through_as_a_square(tiny_clip, vocabulary, images, index) -> None:
    segmenter = gem(tiny_clip, logit_scale=100)
    text = segmenter.encode_vocabulary(vocabulary)
    image = images[index]
    result, expected = segmenter.segment(image, text), square_probabilities(segmenter, image, text)
    assert result.labels.shape == image.shape[:2]
    np.testing.assert_allclose(result.confidence, expected.amax(0).numpy(), atol=2e-4)
    best = expected.topk(2, 0)
    np.testing.assert_allclose(result.margin, (best.values[0] - best.values[1]).numpy(), atol=4e-4)
    steady = result.margin > 1e-3
    assert np.array_equal(result.labels[steady], best.indices[0].numpy()[steady])


def test_pixels_below_the_threshold_stay_unlabelled(tiny_clip, images) -> None:
    """The authors' background: foreground classes only, softmax of 100 x cosine, and a threshold."""
    free, strict = gem(tiny_clip, logit_scale=100), gem(tiny_clip, logit_scale=100, prob_thd=0.5)
    before, after = free.segment(images[1], "cat,dog,grass"), strict.segment(images[1], "cat,dog,grass")
    weak = before.confidence < 0.5
    assert 0 < weak.mean() < 1
    assert np.array_equal(after.labels, np.where(weak, 255, before.labels))


@pytest.mark.parametrize("size", [(448, 448), (30, 500)])
def test_pillows_bicubic_is_torchvisions_resize(size) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), dtype=np.uint8)
    resized = Image.fromarray(image).resize((128, 128), Image.Resampling.BICUBIC)
    resize = transforms.Resize((128, 128), transforms.InterpolationMode.BICUBIC)
    assert np.array_equal(resized, resize(Image.fromarray(image)))
