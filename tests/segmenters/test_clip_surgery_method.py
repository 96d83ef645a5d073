"""CLIP Surgery against two paths written out with explicit maps, its feature surgery against the authors' products."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ovss_ray.errors import SettingError
from ovss_ray.models.vision import TowerShape
from ovss_ray.segmenters import load_segmenter
from ovss_ray.segmenters.clip_surgery import CLIPSurgerySettings, feature_surgery
from tests import tiny_models
from tests.plain_tower import first_tokens, one_block, projected, queries_keys_values, square_probabilities


@pytest.fixture(scope="module")
def deep_clip():  # type: ignore[no-untyped-def]
    return tiny_models.build(layers=12)


def surgery(clip, **settings):  # type: ignore[no-untyped-def]
    return load_segmenter("clip_surgery", clip=clip, device="cpu", dtype="float32", **settings)


def random_pixels(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height))


def two_paths(visual, image: Tensor, blocks: int) -> tuple[Tensor, tuple[int, int]]:  # type: ignore[no-untyped-def]
    """All embeddings [N, E] of the new path, whose class token is the original path's, and the grid."""
    original, grid = first_tokens(visual, image, mode="bilinear", align_corners=False)
    for block in visual.transformer.resblocks[: 12 - blocks]:
        original = one_block(block, original)
    path = original
    for block in visual.transformer.resblocks[12 - blocks :]:
        _, _, v = queries_keys_values(block, block.ln_1(original))
        path = path + projected(block, (v @ v.mT / v.shape[-1] ** 0.5).softmax(-1) @ v)
        original = one_block(block, original)
    return visual.ln_post(torch.cat([original[:1], path[1:]])) @ visual.proj, grid


@pytest.mark.parametrize("size", [(64, 64), (40, 104), (100, 53)])
@pytest.mark.parametrize("blocks", [6, 1, 12, 0])
@torch.inference_mode()
def test_the_second_path_adds_up_value_value_attention(deep_clip, size, blocks) -> None:
    pixels = random_pixels(*size)
    segmenter = surgery(deep_clip, path_blocks=blocks)
    patches, images = segmenter.patches_and_image(pixels)
    assert torch.equal(segmenter.patch_embeddings(pixels), patches)
    for one, image, pixel in zip(patches, images, pixels, strict=True):
        expected, grid = two_paths(deep_clip.visual, pixel, blocks)
        torch.testing.assert_close(one, expected[1:].unflatten(0, grid), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(image, expected[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("blocks", [6, 0])
@torch.inference_mode()
def test_the_original_path_is_clips_own(deep_clip, blocks) -> None:
    pixels = random_pixels(64, 64)
    _, image = surgery(deep_clip, path_blocks=blocks).patches_and_image(pixels)
    torch.testing.assert_close(image, deep_clip.encode_image(pixels), atol=1e-4, rtol=1e-4)


@torch.inference_mode()
def test_without_path_blocks_the_patches_are_those_of_plain_clip(deep_clip) -> None:
    pixels = random_pixels(40, 104)
    plain = load_segmenter("clipbase", clip=deep_clip, device="cpu", dtype="float32", positional="bilinear")
    got = surgery(deep_clip, path_blocks=0).patch_embeddings(pixels)
    torch.testing.assert_close(got, plain.patch_embeddings(pixels), atol=1e-5, rtol=1e-5)


def test_settings_follow_the_model(deep_clip, tiny_clip) -> None:
    settings = surgery(deep_clip).settings
    assert (settings.path_blocks, settings.positional, settings.short_side, settings.crop) == (6, "bilinear", 96, 64)
    assert surgery(tiny_clip).settings.path_blocks == 2
    assert surgery(tiny_clip, path_blocks=4).settings.path_blocks == 4
    large = CLIPSurgerySettings().resolve(TowerShape(336, 14, 24))
    assert large.path_blocks == 6
    assert large.resolve(TowerShape(336, 14, 24)) == large
    with pytest.raises(SettingError, match="path_blocks = 5: the model has only 4 blocks"):
        surgery(tiny_clip, path_blocks=5)


def authors_feature_surgery(tokens: Tensor, text: Tensor) -> Tensor:
    """Scores [N, C] by the products [N, C, E] of unit tokens, class token first, and one text a class."""
    probability = (2 * tokens[:1] @ text.T).softmax(-1)
    weights = probability / probability.mean(-1, keepdim=True)
    products = tokens[:, None] * text[None] * weights[..., None]
    redundant = products.mean(1, keepdim=True)
    return (products - redundant).sum(-1)


@torch.inference_mode()
def test_feature_surgery_is_that_of_the_authors(deep_clip) -> None:
    text = F.normalize(torch.randn(5, 24, generator=torch.Generator().manual_seed(1)), dim=-1)
    pixels = random_pixels(40, 72)
    scores = surgery(deep_clip, feature_surgery=True).patch_scores(pixels, text, range(5))
    for one, pixel in zip(scores, pixels, strict=True):
        tokens, grid = two_paths(deep_clip.visual, pixel, 6)
        expected = authors_feature_surgery(F.normalize(tokens, dim=-1), text)[1:]
        torch.testing.assert_close(one, expected.T.unflatten(1, grid), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(scores.mean(1), torch.zeros(2, 5, 9), atol=1e-6, rtol=0)


def test_the_best_synonym_stands_for_its_class() -> None:
    generator = torch.Generator().manual_seed(2)
    scores, image_scores = torch.rand(2, 3, 2, 4, generator=generator), torch.rand(2, 3, generator=generator)
    single = feature_surgery(scores, image_scores, (0, 1, 2))
    for weaker_by in (0.0, 0.1):
        less = torch.tensor([0, 0, weaker_by, 0])
        more_scores = scores[:, [0, 1, 1, 2]] - less[:, None, None]
        more = feature_surgery(more_scores, image_scores[:, [0, 1, 1, 2]] - less, (0, 1, 1, 2))
        torch.testing.assert_close(more[:, [0, 1, 3]], single)
        assert torch.equal(more[:, 1], more[:, 2]) == (weaker_by == 0)


def test_feature_surgery_changes_scores_and_is_off_by_default(tiny_clip, vocabulary, images) -> None:
    plain, operated = surgery(tiny_clip), surgery(tiny_clip, feature_surgery=True)
    assert not plain.settings.feature_surgery
    text = plain.encode_vocabulary(vocabulary)
    for a, b in zip(plain.segment(images[1:3], text), operated.segment(images[1:3], text), strict=True):
        assert not np.allclose(a.confidence, b.confidence, atol=1e-3)


@pytest.mark.parametrize("feature_surgery", [False, True])
@torch.inference_mode()
def test_the_authors_demo_is_one_pass_over_a_square(tiny_clip, vocabulary, images, feature_surgery) -> None:
    demo = {"resize": "square", "short_side": 120, "crop": 0, "interpolation": "bicubic"}
    segmenter = surgery(tiny_clip, **demo, feature_surgery=feature_surgery)
    text = segmenter.encode_vocabulary(vocabulary)
    image = images[1]
    result, expected = segmenter.segment(image, text), square_probabilities(segmenter, image, text)
    np.testing.assert_allclose(result.confidence, expected.amax(0).numpy(), atol=1e-4)
