"""MaskCLIP against an explicit token-by-token reference, and its two refinements against loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax

from ovss_ray.segmenters import load_segmenter
from ovss_ray.segmenters.maskclip import denoise_prompts, smooth_by_keys
from tests.reference import entering_last_block


def maskclip(clip, **settings):  # type: ignore[no-untyped-def]
    return load_segmenter("maskclip", clip=clip, device="cpu", dtype="float32", **settings)


def own_value(block, token: torch.Tensor, part: int = 2) -> torch.Tensor:  # type: ignore[no-untyped-def]
    """The projected query (0), key (1) or value (2) of one token, written out."""
    width = len(token)
    rows = slice(part * width, (part + 1) * width)
    value = block.attn.in_proj_weight[rows] @ block.ln_1(token) + block.attn.in_proj_bias[rows]
    return block.attn.out_proj.weight @ value + block.attn.out_proj.bias


@pytest.mark.parametrize("variant", ["official", "reduced"])
@torch.inference_mode()
def test_each_patch_keeps_its_own_value(tiny_clip, variant: str) -> None:
    pixels = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    got = maskclip(tiny_clip, variant=variant).patch_embeddings(pixels)
    visual = tiny_clip.visual
    block = visual.transformer.resblocks[-1]
    for image, tokens in enumerate(entering_last_block(tiny_clip, pixels)):
        for index, token in enumerate(tokens[1:]):
            out = own_value(block, token)
            if variant == "official":
                out = token + out
                hidden = block.mlp.c_fc(block.ln_2(out))
                out = out + block.mlp.c_proj(hidden * torch.sigmoid(1.702 * hidden))
            expected = visual.ln_post(out) @ visual.proj
            torch.testing.assert_close(got[image, index // 8, index % 8], expected, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_variants_take_their_own_positions(tiny_clip) -> None:
    official, reduced = maskclip(tiny_clip), maskclip(tiny_clip, variant="reduced")
    assert (official.settings.positional, reduced.settings.positional) == ("bicubic", "dino_offset")
    assert maskclip(tiny_clip, positional="bilinear").settings.positional == "bilinear"
    pixels = torch.randn(1, 3, 40, 96)
    moved = maskclip(tiny_clip, positional="dino_offset").patch_embeddings(pixels)
    assert not torch.allclose(moved, official.patch_embeddings(pixels), atol=1e-3)


def random_scores(seed: int = 0) -> torch.Tensor:
    return 0.04 * torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(seed))


def test_prompt_denoising_strikes_out_classes_that_never_win() -> None:
    scores, query_class = random_scores(), (0, 0, 1, 2, 3)
    got = denoise_prompts(scores, query_class, 0.995).numpy()
    struck = 0
    for image in range(2):
        probability = softmax(100 * scores[image].double().numpy(), axis=0)
        for c in range(4):
            rows = [q for q in range(5) if query_class[q] == c]
            if probability[rows].sum(0).max() < 0.995:
                struck += 1
                assert (got[image, rows] == -100).all()
            else:
                assert np.array_equal(got[image, rows], scores[image, rows].numpy())
    assert 0 < struck < 8


@pytest.mark.parametrize("axis", ["channels", "tokens"])
@pytest.mark.parametrize("threshold", [0.4, 1.0])
def test_key_smoothing_sums_over_similar_keys(axis: str, threshold: float) -> None:
    scores = random_scores(1)
    keys = torch.randn(2, 12, 6, generator=torch.Generator().manual_seed(2))
    got = smooth_by_keys(scores, keys, threshold, axis)  # type: ignore[arg-type]
    for image in range(2):
        probability = softmax(100 * scores[image].double().numpy().reshape(5, 12), axis=0)
        k = keys[image].double().numpy()
        k = k / np.linalg.norm(k, axis=1 if axis == "channels" else 0, keepdims=True)
        for a in range(12):
            expected = probability[:, a]
            if expected.max() < threshold:
                expected = sum((k[a] @ k[b]) * probability[:, b] for b in range(12))
            np.testing.assert_allclose(got[image, :, a // 4, a % 4].numpy(), expected, atol=1e-5)


@torch.inference_mode()
def test_the_keys_go_through_the_output_projection(tiny_clip, vocabulary) -> None:
    segmenter = maskclip(tiny_clip, ks_thresh=1.0)
    pixels = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(4))
    text = torch.from_numpy(segmenter.encode_vocabulary(vocabulary).embeddings)
    block = tiny_clip.visual.transformer.resblocks[-1]
    keys = torch.stack([own_value(block, token, part=1) for token in entering_last_block(tiny_clip, pixels)[0, 1:]])
    cosines = torch.einsum("bhwe,qe->bqhw", F.normalize(segmenter.patch_embeddings(pixels), dim=-1), text)
    expected = smooth_by_keys(cosines, keys[None], 1.0, "channels")
    got = segmenter.patch_scores(pixels, text, vocabulary.query_class)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_refinements_change_labels_and_are_off_by_default(tiny_clip, vocabulary, images) -> None:
    plain = maskclip(tiny_clip)
    assert (plain.settings.pd_thresh, plain.settings.ks_thresh) == (0, 0)
    text = plain.encode_vocabulary(vocabulary)
    expected = plain.segment(images[1:3], text)
    for settings in ({"pd_thresh": 0.9}, {"ks_thresh": 1.0}, {"pd_thresh": 0.9, "ks_thresh": 1.0}):
        refined = maskclip(tiny_clip, **settings).segment(images[1:3], text)
        assert any((a.confidence != b.confidence).any() for a, b in zip(expected, refined, strict=True))
