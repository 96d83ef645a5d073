"""SC-CLIP against its formulas in NumPy, one window at a time, on the tokens that open_clip's own blocks give."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from scipy.special import softmax

from ovss_ray.errors import SettingError
from ovss_ray.models.vision import TowerShape
from ovss_ray.segmenters import load_segmenter
from ovss_ray.segmenters.sc_clip import SCCLIPSettings, correlation_weights
from tests import tiny_models
from tests.reference import entering_blocks

PARTS = ("anomaly_repair", "pre_aggregation", "attention_enhancement", "post_aggregation", "multi_level")
BARE = dict.fromkeys(PARTS, False)


@functools.cache
def twelve_blocks() -> open_clip.CLIP:
    return tiny_models.build(seed=1, layers=12)


def sc_clip(clip: open_clip.CLIP, **settings: object) -> Any:
    return load_segmenter("sc_clip", clip=clip, device="cpu", dtype="float32", **settings)


def windows(*size: int) -> torch.Tensor:
    """Areas of different colours and some noise: patches that are alike, and patches that are not."""
    generator = torch.Generator().manual_seed(2)
    areas = F.interpolate(torch.randn(2, 3, 4, 4, generator=generator), size=size)
    return 2 * areas + torch.randn(2, 3, *size, generator=generator)


def anomalies(x: np.ndarray) -> np.ndarray:
    squared = ((x[:, None] - x[None]) ** 2).sum(-1)
    nearest = np.argsort(squared, axis=1)[:, 1:31]  # the nearest of all is the patch itself
    reach = squared[np.arange(len(x)), nearest[:, -1]]
    factors = np.array([np.mean([reach[i] / reach[j] for j in nearest[i]]) for i in range(len(x))])
    return np.flatnonzero(factors > np.quantile(factors, 0.95))


def fix(x: np.ndarray, broken: np.ndarray, columns: int) -> np.ndarray:
    places = {i: (i // columns, i % columns) for i in range(len(x))}
    fixed = x.copy()
    for i in broken:
        distance = {j: max(abs(places[i][0] - places[j][0]), abs(places[i][1] - places[j][1])) for j in places}
        sound = [j for j in places if distance[j] == 1 and j not in broken]
        if sound:
            fixed[i] = x[sound].mean(0)
    return fixed


def similarities(x: np.ndarray) -> np.ndarray:
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit @ unit.T


def agg(z: np.ndarray, similarity: np.ndarray, beta: float) -> np.ndarray:
    weights = np.where(similarity < beta, 0, similarity)
    return weights / (weights.sum(1, keepdims=True) + 1e-6) @ z


def norm(layer: Any, x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(1, keepdims=True)
    unit = centred / np.sqrt((centred**2).mean(1, keepdims=True) + layer.eps)
    return unit * layer.weight.double().numpy() + layer.bias.double().numpy()


def last_attention(visual: Any, x: np.ndarray, similarity: np.ndarray | None) -> np.ndarray:
    block = visual.transformer.resblocks[-1]
    weight, bias = (t.double().numpy() for t in (block.attn.in_proj_weight, block.attn.in_proj_bias))
    _, k, v = np.split(norm(block.ln_1, x) @ weight.T + bias, 3, axis=1)
    heads = []
    for head in range(block.attn.num_heads):
        part = slice(16 * head, 16 * head + 16)
        attention = softmax(k[:, part] @ k[:, part].T / 4, axis=1)
        if similarity is not None:
            above = 3 * (similarity - similarity.mean())
            attention = 0.5 * softmax(np.where(above < 0, -np.inf, above), axis=1) + 0.5 * attention
        heads.append(attention @ v[:, part])
    out = block.attn.out_proj
    return np.hstack(heads) @ out.weight.double().numpy().T + out.bias.double().numpy()


def written_out(
    clip: open_clip.CLIP, pixels: torch.Tensor, on: set[str], rho: float = 0.3, beta: float = 0.4
) -> np.ndarray:
    """[h, w, E] of one window, with the parts that are `on`, for 12 blocks."""
    visual: Any = clip.visual
    after = [tokens[0].double().numpy() for tokens in entering_blocks(clip, pixels[None])[1:]]
    grid = (pixels.shape[1] // 8, pixels.shape[2] // 8)
    cls, x, middle = after[10][0], after[10][1:], after[8][1:]
    if "anomaly_repair" in on:
        broken = anomalies(x)
        x, middle = fix(x, broken, grid[1]), fix(middle, broken, grid[1])
    similarity = similarities(middle)
    if "pre_aggregation" in on:
        x = agg(x, similarity, beta)
    steering = similarity if "attention_enhancement" in on else None
    terms = [last_attention(visual, x, steering) + rho * cls]
    if "multi_level" in on:
        z = sum(after[3:10])
        terms.append(last_attention(visual, z[1:], steering) + rho * z[0])
    if "post_aggregation" in on:
        terms = [agg(term, similarities(after[3][1:]), beta) for term in terms]
    return (norm(visual.ln_post, sum(terms)) @ visual.proj.double().numpy()).reshape(*grid, -1)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (80, 48), (101, 60)])
@pytest.mark.parametrize("settings", [{}, {"beta": 0.81}])  # half of the pairs are below, and none is close to it
@torch.inference_mode()
def test_embeddings_follow_the_formulas(size: tuple[int, int], settings: dict[str, float]) -> None:
    clip, pixels = twelve_blocks(), windows(*size)
    got = sc_clip(clip, **settings).patch_embeddings(pixels)
    for window, embeddings in zip(pixels, got, strict=True):
        np.testing.assert_allclose(embeddings, written_out(clip, window, {*PARTS}, **settings), atol=2e-5)


@pytest.mark.parametrize("part", PARTS)
@torch.inference_mode()
def test_every_part_can_be_left_out_and_matters(part: str) -> None:
    clip, pixels = twelve_blocks(), windows(56, 72)
    without = sc_clip(clip, **{part: False}).patch_embeddings(pixels)
    for window, embeddings in zip(pixels, without, strict=True):
        np.testing.assert_allclose(embeddings, written_out(clip, window, {*PARTS} - {part}), atol=2e-5)
    alone = sc_clip(clip, **{**BARE, part: True}, res_cls=0.1).patch_embeddings(pixels)
    np.testing.assert_allclose(alone[0], written_out(clip, pixels[0], {part}, rho=0.1), atol=2e-5)
    assert (without - sc_clip(clip).patch_embeddings(pixels)).abs().amax((1, 2, 3)).min() > 0.005


@torch.inference_mode()
def test_without_its_parts_it_is_key_key_attention_among_patches() -> None:
    clip, pixels = twelve_blocks(), windows(56, 72)
    got = sc_clip(clip, **BARE, res_cls=0).patch_embeddings(pixels)
    block = clip.visual.transformer.resblocks[-1]
    normed = block.ln_1(entering_blocks(clip, pixels)[-1][:, 1:])
    _, k, v = F.linear(normed, block.attn.in_proj_weight, block.attn.in_proj_bias).view(2, 63, 3, 3, 16).unbind(2)
    weights = torch.einsum("bihd,bjhd->bhij", k, k).div(4).softmax(-1)
    mixed = torch.einsum("bhij,bjhd->bihd", weights, v).flatten(2)
    expected = clip.visual.ln_post(block.attn.out_proj(mixed)) @ clip.visual.proj
    torch.testing.assert_close(got.flatten(1, 2), expected, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_a_lone_patch_keeps_its_own_value() -> None:
    clip, pixels = twelve_blocks(), windows(8, 8)
    reduced = load_segmenter("maskclip", clip=clip, device="cpu", dtype="float32", variant="reduced")
    expected = reduced.patch_embeddings(pixels)  # type: ignore[attr-defined]
    for settings in (BARE, {"multi_level": False}):
        got = sc_clip(clip, **settings, res_cls=0).patch_embeddings(pixels)
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


@torch.inference_mode()
def test_a_window_does_not_depend_on_its_batch() -> None:
    segmenter = sc_clip(twelve_blocks())
    pixels = torch.cat([windows(56, 72), 5 * torch.ones(1, 3, 56, 72), torch.zeros(1, 3, 56, 72)])
    together = segmenter.patch_embeddings(pixels)
    for window, embeddings in zip(pixels, together, strict=True):
        torch.testing.assert_close(segmenter.patch_embeddings(window[None])[0], embeddings, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("size", [(8, 8), (24, 40), (8, 264), (264, 8), (40, 48), (48, 40)])
@torch.inference_mode()
def test_any_grid_and_equal_patches_give_numbers(size: tuple[int, int]) -> None:
    clip = tiny_models.build(seed=1, layers=12)
    for positions in (1, 0):
        clip.visual.positional_embedding.data.mul_(positions)  # without positions, a flat window has one token only
        segmenter = sc_clip(clip)
        for pixels in (torch.zeros(2, 3, *size), windows(*size)):
            got = segmenter.patch_embeddings(pixels)
            assert got.shape == (2, size[0] // 8, size[1] // 8, 24)
            assert got.isfinite().all()
    flat = segmenter.patch_embeddings(torch.zeros(1, 3, *size)).flatten(0, 2)
    torch.testing.assert_close(flat, flat[:1].expand_as(flat), atol=1e-3, rtol=1e-3)


@torch.inference_mode()
def test_correlation_weights_follow_what_is_above_the_mean_of_each_window() -> None:
    similarity = torch.stack([torch.eye(4), torch.full((4, 4), 0.9).fill_diagonal_(1)])
    similarity[0, 0, 1] = similarity[0, 1, 0] = 0.5
    got = correlation_weights(similarity).double().numpy()
    np.testing.assert_allclose(got.sum(-1), 1, atol=1e-6)
    for window, s in enumerate(similarity.double().numpy()):
        kept = s > s.mean()
        assert np.array_equal(got[window] > 0, kept)
        weights = np.where(kept, np.exp(3 * s), 0)
        np.testing.assert_allclose(got[window], weights / weights.sum(1, keepdims=True), atol=1e-6)
    for rounded in (1 - 1e-7, 1 + 1e-7):
        alike = torch.ones(1, 5, 5)
        alike[0, 2] = rounded
        assert correlation_weights(alike).isfinite().all()


@pytest.mark.parametrize(
    ("depth", "pre", "post", "multi", "res_cls"),
    [
        (12, 8, 3, (3, 10), 0.3),
        (24, 16, 6, (8, 19), 0.1),
        (32, 8, 3, (3, 10), 0.3),
        (6, 4, 1, (1, 5), 0.3),
        (4, 2, 1, (1, 3), 0.3),
        (3, 1, 1, (1, 2), 0.3),
        (2, 0, 0, (0, 1), 0.3),
    ],
)
def test_blocks_follow_the_depth_of_the_tower(
    depth: int, pre: int, post: int, multi: tuple[int, int], res_cls: float
) -> None:
    shape = TowerShape(64, 8, depth)
    settings = SCCLIPSettings().resolve(shape)
    assert (settings.pre_adjust_idx, settings.post_adjust_idx) == (pre, post)
    assert (settings.multi_start_idx, settings.multi_end_idx, settings.res_cls) == (*multi, res_cls)
    assert (settings.beta, settings.neighbours, settings.contamination) == (0.4, 30, 0.05)
    assert settings.crop == 64
    assert settings.resolve(shape) == settings


def test_given_values_stay() -> None:
    given = {"pre_adjust_idx": 0, "post_adjust_idx": 10, "multi_start_idx": 0, "multi_end_idx": 11, "res_cls": 0.0}
    settings = SCCLIPSettings(**given).resolve(TowerShape(64, 8, 12))
    assert settings.model_dump(include=set(given)) == given


@pytest.mark.parametrize(
    ("given", "depth", "message"),
    [
        ({"pre_adjust_idx": 11}, 12, "pre_adjust_idx = 11: must be before the last of the model's 12 blocks"),
        ({"post_adjust_idx": 30}, 12, "post_adjust_idx = 30"),
        ({"multi_start_idx": 10}, 12, "multi_start_idx = 10, multi_end_idx = 10"),
        ({"multi_end_idx": 12}, 12, "at most 11, the last of the model's 12 blocks"),
        ({}, 1, "must be before the last of the model's 1 blocks"),
    ],
)
def test_blocks_from_the_last_one_on_are_refused(given: dict[str, int], depth: int, message: str) -> None:
    with pytest.raises(SettingError, match=message):
        SCCLIPSettings(**given).resolve(TowerShape(64, 8, depth))


@torch.inference_mode()
def test_other_settings_reach_the_tokens() -> None:
    clip, pixels = twelve_blocks(), windows(56, 72)
    usual = sc_clip(clip).patch_embeddings(pixels)
    for name, value in {
        "beta": 0.7,
        "neighbours": 5,
        "contamination": 0.2,
        "pre_adjust_idx": 5,
        "multi_end_idx": 5,
    }.items():
        assert not torch.allclose(sc_clip(clip, **{name: value}).patch_embeddings(pixels), usual, atol=1e-3), name
