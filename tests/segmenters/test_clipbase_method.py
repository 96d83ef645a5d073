"""CLIPBase is open_clip's own patch tokens, and the dense protocol around it is the published one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ovss_ray.segmenters import load_segmenter
from tests import tiny_models
from tests.reference import class_probabilities


def clipbase(clip, **settings):  # type: ignore[no-untyped-def]
    return load_segmenter("clipbase", clip=clip, device="cpu", dtype="float32", **settings)


@torch.inference_mode()
def test_patch_embeddings_are_open_clips_tokens_on_the_native_input() -> None:
    model = tiny_models.build(output_tokens=True)
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    _, tokens = model.visual(pixels)
    got = clipbase(model).patch_embeddings(pixels)
    torch.testing.assert_close(got.flatten(1, 2), tokens @ model.visual.proj, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("clip", ["ViT-B-32/random"])
@torch.inference_mode()
def test_the_same_at_224_pixels_with_a_published_architecture(clip: str) -> None:
    segmenter = clipbase(clip)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    visual = segmenter.tower._visual
    visual.output_tokens = True
    expected = visual(pixels)[1] @ visual.proj
    torch.testing.assert_close(segmenter.patch_embeddings(pixels).flatten(1, 2), expected, atol=1e-4, rtol=1e-3)
    assert (segmenter.settings.short_side, segmenter.settings.crop, segmenter.settings.stride) == (336, 224, 112)


@pytest.mark.parametrize("settings", [{}, {"short_side": 100, "crop": 50, "stride": 33}, {"crop": 0}])
@torch.inference_mode()
def test_segmentation_follows_the_published_protocol(tiny_clip, vocabulary, images, settings) -> None:
    segmenter = clipbase(tiny_clip, **settings)
    text = segmenter.encode_vocabulary(vocabulary)
    chosen = images[:5]
    for image, result in zip(chosen, segmenter.segment(chosen, text), strict=True):
        expected = class_probabilities(segmenter, image, text)
        ranked = np.sort(expected, axis=0)
        np.testing.assert_allclose(result.confidence, ranked[-1], atol=2e-4)
        np.testing.assert_allclose(result.margin, ranked[-1] - ranked[-2], atol=4e-4)
        steady = ranked[-1] - ranked[-2] > 1e-3
        assert steady.mean() > 0.9
        assert np.array_equal(result.labels[steady], expected.argmax(0)[steady])


def test_defaults_follow_the_models_input_size(tiny_clip) -> None:
    tiny, demo = clipbase(tiny_clip).settings, clipbase("ovss-demo/random").settings
    assert (tiny.short_side, tiny.crop, tiny.stride) == (96, 64, 32)
    assert (demo.short_side, demo.crop, demo.stride, demo.logit_scale) == (144, 96, 48, 40.0)
    assert clipbase(tiny_clip, crop=30).settings.stride == 15
