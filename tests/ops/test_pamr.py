"""PAMR against its definition in plain loops, and its fixed points."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from ovss_ray.ops.pamr import pamr


def loop_pamr(image: np.ndarray, maps: np.ndarray, iterations: int, dilations: tuple[int, ...]) -> np.ndarray:
    _, height, width = image.shape
    offsets = [(dy * d, dx * d) for d in dilations for dy in (-1, 0, 1) for dx in (-1, 0, 1)]

    def at(plane: np.ndarray, y: int, x: int) -> np.ndarray:
        return plane[:, min(max(y, 0), height - 1), min(max(x, 0), width - 1)]

    for _ in range(iterations):
        out = np.zeros_like(maps)
        for y in range(height):
            for x in range(width):
                samples = np.stack([at(image, y + dy, x + dx) for dy, dx in offsets])
                spread = samples.std(axis=0, ddof=1)
                around = [(dy, dx) for dy, dx in offsets if (dy, dx) != (0, 0)]
                logits = np.array(
                    [
                        np.mean(-np.abs(image[:, y, x] - at(image, y + dy, x + dx)) / (1e-8 + 0.1 * spread))
                        for dy, dx in around
                    ]
                )
                weights = np.exp(logits - logits.max())
                weights /= weights.sum()
                for weight, (dy, dx) in zip(weights, around, strict=True):
                    out[:, y, x] += weight * at(maps, y + dy, x + dx)
        maps = out
    return maps


@pytest.mark.parametrize("dilations", [(1,), (1, 3), (8, 16)])
def test_pamr_is_its_definition(dilations: tuple[int, ...], rng: np.random.Generator) -> None:
    image, maps = rng.normal(size=(3, 7, 9)), rng.normal(size=(2, 7, 9))
    got = pamr(torch.from_numpy(image), torch.from_numpy(maps), iterations=2, dilations=dilations)
    np.testing.assert_allclose(got.numpy(), loop_pamr(image, maps, 2, dilations), atol=1e-4)


def test_constant_maps_are_fixed_points_and_values_stay_in_range() -> None:
    image = torch.randn(3, 20, 24)
    maps = torch.stack([torch.full((20, 24), 0.3), torch.rand(20, 24)])
    got = pamr(image, maps)
    torch.testing.assert_close(got[0], maps[0])
    assert got[1].min() >= maps[1].min() - 1e-6
    assert got[1].max() <= maps[1].max() + 1e-6


def test_edges_of_the_image_are_kept() -> None:
    image = torch.zeros(3, 16, 16)
    image[:, :, 8:] = 1.0
    maps = (image[:1] + 0.2 * torch.randn(1, 16, 16)).clamp(0, 1)
    got = pamr(image, maps, iterations=10, dilations=(1, 2))[0]
    assert got[:, 8:].min() > 0.5 > got[:, :8].max()


def test_smaller_maps_are_enlarged_with_aligned_corners() -> None:
    maps = torch.randn(2, 4, 5)
    got = pamr(torch.randn(3, 10, 11), maps, iterations=0)
    torch.testing.assert_close(got, F.interpolate(maps[None], (10, 11), mode="bilinear", align_corners=True)[0])


def test_many_maps_equal_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    import ovss_ray.ops.pamr as module

    image, maps = torch.randn(3, 12, 12), torch.randn(7, 12, 12)
    whole = pamr(image, maps, iterations=3)
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 2 * 144)
    torch.testing.assert_close(pamr(image, maps, iterations=3), whole)
