"""Positional policies against explicit interpolation, Pillow and a real positional table."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from ovss_ray.ops.positional import PositionalPolicy, resample_positions

POLICIES = get_args(PositionalPolicy)
REAL_TABLE = (
    Path(__file__).parents[2] / "../shared/data/clip_text_embeddings/vitb16_visual_positional_embedding_197x768.npy"
)


def cubic(distance: float, a: float = -0.75) -> float:
    x = abs(distance)
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0


def interpolate_axis(values: np.ndarray, size: int, step: float, taps: int) -> np.ndarray:
    """Resamples axis 0 with source step `step`: linear for 2 taps, cubic for 4; edges repeated."""
    out = np.zeros((size, *values.shape[1:]))
    for target in range(size):
        centre = (target + 0.5) * step - 0.5
        if taps == 2:
            centre = max(centre, 0.0)
        first = int(np.floor(centre))
        for tap in range(first - taps // 2 + 1, first + taps // 2 + 1):
            weight = cubic(centre - tap) if taps == 4 else 1 - abs(centre - tap)
            out[target] += weight * values[min(max(tap, 0), len(values) - 1)]
    return out


def reference(table: np.ndarray, native: tuple[int, int], grid: tuple[int, int], policy: str) -> np.ndarray:
    patches = table[1:].reshape(*native, -1).astype(np.float64)
    extra = 0.1 if policy == "dino_offset" else 0.0
    taps = 2 if policy == "bilinear" else 4
    for axis in (0, 1):
        step = native[axis] / (grid[axis] + extra)
        patches = np.moveaxis(interpolate_axis(np.moveaxis(patches, axis, 0), grid[axis], step, taps), 0, axis)
    return np.concatenate([table[:1], patches.reshape(grid[0] * grid[1], -1)])


@pytest.mark.parametrize("policy", ["dino_offset", "bicubic", "bilinear"])
@pytest.mark.parametrize("grid", [(9, 4), (1, 7), (3, 3), (20, 13)])
def test_a_policy_is_what_its_formula_says(policy: PositionalPolicy, grid: tuple[int, int], rng) -> None:
    table = rng.normal(size=(1 + 5 * 6, 4)).astype(np.float32)
    got = resample_positions(torch.from_numpy(table), (5, 6), grid, policy)
    np.testing.assert_allclose(got.numpy(), reference(table, (5, 6), grid, policy), atol=2e-5)


@pytest.mark.parametrize("grid", [(8, 12), (3, 4)])
def test_antialiased_bicubic_is_pillows(grid: tuple[int, int], rng) -> None:
    table = rng.normal(size=(1 + 6 * 6, 3)).astype(np.float32)
    got = resample_positions(torch.from_numpy(table), (6, 6), grid, "bicubic_aa").numpy()
    for channel in range(3):
        plane = Image.fromarray(table[1:, channel].reshape(6, 6))
        expected = np.asarray(plane.resize((grid[1], grid[0]), Image.Resampling.BICUBIC))
        np.testing.assert_allclose(got[1:, channel].reshape(grid), expected, atol=1e-5)


@pytest.mark.parametrize("grid", [(5, 6), (9, 4)])
def test_bilinear_half_is_bilinear_rounded_to_float16_on_every_grid(grid: tuple[int, int], rng) -> None:
    table = rng.normal(size=(1 + 5 * 6, 4)).astype(np.float32)
    got = resample_positions(torch.from_numpy(table), (5, 6), grid, "bilinear_half").numpy()
    exact = reference(table, (5, 6), grid, "bilinear")
    assert np.array_equal(got, got.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(got, exact, rtol=2**-11, atol=1e-6)
    assert np.abs(got - exact).max() > 1e-4


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "bilinear_half"])
def test_the_native_grid_gets_the_table_itself(policy: PositionalPolicy) -> None:
    table = torch.randn(1 + 14 * 14, 8)
    assert torch.equal(resample_positions(table, (14, 14), (14, 14), policy), table)


@pytest.mark.parametrize("policy", POLICIES)
def test_as_many_patches_in_another_shape_are_resampled(policy: PositionalPolicy) -> None:
    table = torch.randn(1 + 14 * 14, 8).half().float()
    before = table.clone()
    got = resample_positions(table, (14, 14), (7, 28), policy)
    assert got.shape == table.shape
    assert not torch.allclose(got, table)
    assert torch.equal(got[0], table[0])
    assert torch.equal(table, before)


@pytest.mark.skipif(not REAL_TABLE.is_file(), reason="the real positional table is not here")
def test_policies_differ_on_a_real_table_but_tell_the_same_story() -> None:
    table = torch.from_numpy(np.load(REAL_TABLE)).float()
    grids = {policy: resample_positions(table, (14, 14), (21, 28), policy)[1:] for policy in POLICIES}
    for policy, values in grids.items():
        alike = torch.cosine_similarity(values, grids["bicubic"], dim=-1)
        assert alike.min() > 0.8, policy
        assert policy == "bicubic" or (values - grids["bicubic"]).abs().max() > 1e-3, policy
