"""ResCLIP against explicit attention maps on open_clip's own modules, and against the methods that it corrects."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import ovss_ray.segmenters.resclip as module
from ovss_ray.errors import SettingError
from ovss_ray.ops.semantic_feedback import semantic_feedback
from ovss_ray.segmenters import load_segmenter
from ovss_ray.segmenters.resclip import ResCLIPSettings
from tests import tiny_models

SIZES = [(64, 64), (53, 83)]


@pytest.fixture(scope="module")
def deep_clip() -> Any:
    """Twelve blocks, so that the middle ones are the published ones."""
    return tiny_models.build(layers=12)


def queries_like(embeddings: Tensor) -> Tensor:
    """Six unit rows that tell the patches [h, w, E] of a random model, which are much alike, apart."""
    patches = F.normalize(embeddings, dim=-1).flatten(0, 1)
    common = F.normalize(patches.mean(0), dim=0)
    chosen = patches[:: len(patches) // 6][:6]
    return F.normalize(chosen - (chosen @ common)[:, None] * common, dim=-1)


def resclip(clip: Any, method: str = "resclip", **settings: Any) -> Any:
    return load_segmenter(method, clip=clip, device="cpu", dtype="float32", **settings)


def smooth_pixels(count: int, size: tuple[int, int]) -> Tensor:
    """Normalised images with areas, so that patches get labels in groups."""
    coarse = torch.randn(count, 3, 4, 5, generator=torch.Generator().manual_seed(5))
    fine = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(6))
    return F.interpolate(2 * coarse, size, mode="nearest") + 0.3 * fine


def tokens_and_maps(visual: Any, pixels: Tensor) -> tuple[Tensor, list[Tensor]]:
    """What enters the last block [N, D], and the attention maps [H, N, N] of all blocks before it."""
    patches = visual.conv1(pixels)[0]
    grid = patches.shape[-2:]
    positions = visual.positional_embedding
    if grid != (8, 8):
        table = positions[1:].T.reshape(1, 48, 8, 8)
        factors = ((grid[0] + 0.1) / 8, (grid[1] + 0.1) / 8)
        moved = F.interpolate(table, scale_factor=factors, mode="bicubic", recompute_scale_factor=False)
        positions = torch.cat([positions[:1], moved.flatten(2)[0].T])
    x = visual.ln_pre(torch.cat([visual.class_embedding[None], patches.flatten(1).T]) + positions)
    maps = []
    for block in visual.transformer.resblocks[:-1]:
        q, k, v = heads(block, x)
        maps.append((q @ k.mT / 4).softmax(-1))
        x = x + block.attn.out_proj((maps[-1] @ v).transpose(0, 1).flatten(1))
        x = x + block.mlp(block.ln_2(x))
    return x, maps


def heads(block: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    projected = block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
    q, k, v = projected.view(len(x), 3, 3, 16).permute(1, 2, 0, 3)
    return q, k, v


def last_block(visual: Any, x: Tensor, maps: list[Tensor], grid: tuple[int, int], s: ResCLIPSettings, likeness: Tensor):  # type: ignore[no-untyped-def]
    """Patch embeddings [h, w, E]; `likeness` [n, n] is S / max(S), or empty in the first pass."""
    block = visual.transformer.resblocks[-1]
    q, k, v = heads(block, x)
    bump = torch.zeros(len(x), len(x))
    if s.base == "naclip":
        for a in range(len(x) - 1):
            for b in range(len(x) - 1):
                squared = (a // grid[1] - b // grid[1]) ** 2 + (a % grid[1] - b % grid[1]) ** 2
                bump[1 + a, 1 + b] = np.exp(-squared / (2 * s.sigma**2))
    weights = torch.zeros(3, len(x), len(x))
    for part in {"naclip": [k], "sclip": [q, k], "clearclip": [q]}[s.base]:
        logits = part @ part.mT / 4
        if len(likeness):
            logits = (1 - s.l_s) * logits
            logits[:, 1:, 1:] += s.l_s * likeness
            logits = s.tau_s * logits
        weights = weights + (logits + bump).softmax(-1)
    if s.rcs:
        middle = (maps[5] + maps[6] + maps[7] + maps[8]) / 4
        weights = s.tau_r * ((1 - s.l_r) * weights + s.l_r * middle)
    out = block.attn.out_proj((weights @ v).transpose(0, 1).flatten(1))
    if s.base == "sclip":
        out = x + out
        out = out + block.mlp(block.ln_2(out))
    return (visual.ln_post(out) @ visual.proj)[1:].view(*grid, -1)


def refined_by_neighbours(image: np.ndarray, maps: np.ndarray) -> np.ndarray:
    """PAMR with ten steps and the dilations 8 and 16, on edge-padded arrays."""
    height, width = image.shape[1:]
    offsets = [(dy * far, dx * far) for far in (8, 16) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    around = [index for index, offset in enumerate(offsets) if offset != (0, 0)]

    def shifted(planes: np.ndarray) -> np.ndarray:
        padded = np.pad(planes, ((0, 0), (16, 16), (16, 16)), mode="edge")
        return np.stack([padded[:, 16 + y : 16 + y + height, 16 + x : 16 + x + width] for y, x in offsets])

    samples = shifted(image)
    logits = -(np.abs(image - samples) / (1e-8 + 0.1 * samples.std(0, ddof=1))).mean(1)[around]
    weights = np.exp(logits - logits.max(0))
    weights /= weights.sum(0)
    for _ in range(10):
        maps = (weights[:, None] * shifted(maps)[around]).sum(0)
    return maps


def first_labels(cosines: Tensor, pixels: Tensor, s: ResCLIPSettings) -> np.ndarray:
    """The labels [h, w] of patches, from cosines [h, w, Q] of the first pass."""
    size = pixels.shape[-2:]
    maps = F.interpolate(cosines.permute(2, 0, 1)[None], size, mode="bilinear", align_corners=False)[0]
    logits = s.logit_scale * refined_by_neighbours(pixels[0].double().numpy(), maps.double().numpy())
    probability = np.exp(logits - logits.max(0)) / np.exp(logits - logits.max(0)).sum(0)
    labels = np.where(probability.max(0) < s.temp_thd, 0, probability.argmax(0))
    cells = np.zeros(cosines.shape[:2], np.int64)
    for row, column in np.ndindex(cells.shape):
        counts = Counter(labels[8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten().tolist())
        cells[row, column] = min(counts, key=lambda label: (-counts[label], label))
    return cells


def likeness_of(labels: np.ndarray, s: ResCLIPSettings) -> Tensor:
    """S / max(S): same label, decay where the path leaves it, blur along each row, rows to sum 1; in float16."""
    height, width = labels.shape
    count, longest = height * width, max(height, width) - 1
    shares = torch.linspace(0, 1, longest + 1)
    raw = np.zeros((count, count))
    for a, b in np.ndindex(raw.shape):
        start, end = torch.tensor(divmod(a, width)), torch.tensor(divmod(b, width))
        if labels[divmod(a, width)] != labels[divmod(b, width)]:
            continue
        apart = int((start - end).abs().max())
        tested = shares if s.full_path else shares[: apart + 1]
        rows, columns = (start * (1 - tested[:, None]) + end * tested[:, None]).round().long().T
        leaves = s.delete_same_entity and (labels[rows, columns] != labels[divmod(a, width)]).any()
        raw[a, b] = np.exp(-apart / longest) if leaves else 1
    kernel = np.exp(-(np.arange(-15, 16) ** 2) / (2 * s.sigma**2))
    blurred = np.stack([np.convolve(row, kernel / kernel.sum(), mode="same") for row in raw])
    feedback = blurred / (blurred.sum(1, keepdims=True) + 1e-8)
    return torch.from_numpy(feedback / feedback.max()).float().half().float()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temp_thd": 0.5, "tau_r": 2.0, "l_r": 0.3, "tau_s": 2.2, "l_s": 0.7},
        {"rcs": False},
        {"sfr": False},
        {"base": "sclip", "full_path": True},
        {"base": "clearclip", "delete_same_entity": False, "l_s": 1.0},
    ],
)
@torch.inference_mode()
def test_both_passes_are_their_formulas(deep_clip, size, options) -> None:
    segmenter = resclip(deep_clip, **options)
    s = segmenter.settings
    pixels = smooth_pixels(1, size)
    x, maps = tokens_and_maps(deep_clip.visual, pixels)
    grid = (size[0] // 8, size[1] // 8)
    embeddings = last_block(deep_clip.visual, x, maps, grid, s, torch.empty(0))
    torch.testing.assert_close(segmenter.patch_embeddings(pixels)[0], embeddings, atol=1e-4, rtol=1e-4)
    text = queries_like(embeddings)
    expected = F.normalize(embeddings, dim=-1) @ text.T
    if s.sfr:
        labels = first_labels(expected, pixels, s)
        assert len(np.unique(labels)) > 1
        assert np.array_equal(segmenter.patch_labels(pixels, expected.permute(2, 0, 1)[None])[0].numpy(), labels)
        second = last_block(deep_clip.visual, x, maps, grid, s, likeness_of(labels, s))
        first, expected = expected, F.normalize(second, dim=-1) @ text.T
        assert (first - expected).abs().max() > 1e-3
    got = segmenter.patch_scores(pixels, text, range(6))[0].permute(1, 2, 0)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_the_feedback_is_rounded_to_float16(deep_clip) -> None:
    segmenter = resclip(deep_clip, base="clearclip", tau_s=400, l_s=1)  # so large that the rounding is seen
    labels = torch.randint(3, (1, 5, 7), generator=torch.Generator().manual_seed(1))
    q, k, v = torch.randn(3, 1, 3, 36, 16, generator=torch.Generator().manual_seed(2))
    feedback = semantic_feedback(labels, sigma=5, decay_by_path=True, full_path=False)
    feedback = F.pad(feedback / feedback.max(), (1, 0, 1, 0))
    exact, rounded = ((400 * part).softmax(-1) @ v for part in (feedback, feedback.half().float()))
    assert (exact - rounded).abs().max() > 1e-2
    torch.testing.assert_close(segmenter.refined_attention(q, k, v, labels), rounded, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    ("base", "settings"),
    [
        ("naclip", {"tau_r": 1, "l_r": 0, "tau_s": 1, "l_s": 0}),
        ("naclip", {"rcs": False, "sfr": False}),
        ("sclip", {"rcs": False, "sfr": False}),
        ("clearclip", {"rcs": False, "sfr": False}),
    ],
)
@torch.inference_mode()
def test_without_its_corrections_it_is_the_base_method(deep_clip, size, base, settings) -> None:
    corrected, plain = resclip(deep_clip, base=base, **settings), resclip(deep_clip, base)
    pixels = smooth_pixels(2, size)
    embeddings = plain.patch_embeddings(pixels)
    torch.testing.assert_close(corrected.patch_embeddings(pixels), embeddings)
    text = queries_like(embeddings[0])
    torch.testing.assert_close(
        corrected.patch_scores(pixels, text, range(6)), plain.patch_scores(pixels, text, range(6))
    )


@torch.inference_mode()
def test_windows_do_not_meet(deep_clip, monkeypatch) -> None:
    segmenter = resclip(deep_clip)
    pixels = smooth_pixels(3, (56, 40)) * torch.tensor([1.0, 0.01, 3.0])[:, None, None, None]
    text = queries_like(segmenter.patch_embeddings(pixels)[0])
    together = segmenter.patch_scores(pixels, text, range(6))
    alone = torch.cat([segmenter.patch_scores(one[None], text, range(6)) for one in pixels])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr(module, "_FEEDBACK_ELEMENTS", 2 * 36 * 36)
    torch.testing.assert_close(segmenter.patch_scores(pixels, text, range(6)), alone, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_the_network_runs_once(deep_clip) -> None:
    segmenter = resclip(deep_clip)
    pixels = smooth_pixels(1, (64, 64))
    text = queries_like(segmenter.patch_embeddings(pixels)[0])
    calls: list[int] = []
    hook = deep_clip.visual.transformer.resblocks[0].mlp.register_forward_hook(lambda *_: calls.append(1))
    try:
        segmenter.patch_scores(pixels, text, range(6))
    finally:
        hook.remove()
    assert calls == [1]


@pytest.mark.parametrize(("layers", "blocks"), [(24, (5, 6, 7, 8)), (12, (5, 6, 7, 8)), (4, (1, 2)), (2, (0,))])
def test_middle_blocks_follow_the_depth(layers, blocks) -> None:
    settings = resclip(tiny_models.build(layers=layers)).settings
    assert settings.middle_blocks == blocks


@pytest.mark.parametrize("blocks", [(2, 3), (-1,), (7,)])
def test_blocks_that_are_not_before_the_last_one_are_refused(tiny_clip, blocks) -> None:
    with pytest.raises(SettingError, match="RCS needs blocks before the last one of 4, counted from 0"):
        resclip(tiny_clip, middle_blocks=blocks)
    assert resclip(tiny_clip, middle_blocks=(2, 0)).settings.middle_blocks == (0, 2)
