"""Semantic feedback against its definition in plain loops over pairs of patches, and its invariants."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch

import ovss_ray.ops.semantic_feedback as module
from ovss_ray.ops.semantic_feedback import majority_labels, semantic_feedback


def loop_feedback(labels: np.ndarray, sigma: float, decay_by_path: bool, full_path: bool) -> np.ndarray:
    """One pair of patches at a time, in float32 where rounding decides."""
    height, width = labels.shape
    places = [(row, column) for row in range(height) for column in range(width)]
    longest = max(height, width) - 1
    shares = [np.float32(u) for u in torch.linspace(0, 1, longest + 1).tolist()]

    def on_line(a: int, b: int, u: np.float32) -> int:
        return int(np.round(np.float32(a) * (np.float32(1) - u) + np.float32(b) * u))

    def belonging(a: tuple[int, int], b: tuple[int, int]) -> float:
        if labels[a] != labels[b]:
            return 0.0
        apart = max(abs(a[0] - b[0]), abs(a[1] - b[1]))
        tested = shares if full_path else shares[: apart + 1]
        stays = all(labels[on_line(a[0], b[0], u), on_line(a[1], b[1], u)] == labels[a] for u in tested)
        return 1.0 if stays or not decay_by_path else float(np.exp(-apart / longest))

    count = len(places)
    raw = np.array([[belonging(a, b) for b in places] for a in places])
    size = min(count, int(6 * sigma + 1))
    size += size % 2 == 0
    kernel = [np.exp(-((i - size // 2) ** 2) / (2 * sigma**2)) for i in range(size)]
    blurred = np.zeros_like(raw)
    for column in range(count):
        for i, weight in enumerate(kernel):
            if 0 <= column + i - size // 2 < count:
                blurred[:, column] += weight / sum(kernel) * raw[:, column + i - size // 2]
    return np.asarray(blurred / (blurred.sum(1, keepdims=True) + 1e-8))


@pytest.mark.parametrize("grid", [(9, 13), (9, 5), (7, 7), (1, 6), (2, 1), (1, 1)])
@pytest.mark.parametrize("options", [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("sigma", [5.0, 0.7])
def test_feedback_is_its_definition(grid, options, sigma, rng: np.random.Generator) -> None:
    labels = (rng.random(grid) < 0.2).astype(np.int64) + 2 * (rng.random(grid) < 0.1)
    (got,) = semantic_feedback(
        torch.from_numpy(labels)[None], sigma=sigma, decay_by_path=options[0], full_path=options[1]
    )
    np.testing.assert_allclose(got.numpy(), loop_feedback(labels, sigma, *options), atol=1e-6)


def test_rows_sum_to_one(rng: np.random.Generator) -> None:
    labels = torch.from_numpy(rng.integers(0, 4, (2, 6, 11)))
    torch.testing.assert_close(semantic_feedback(labels).sum(-1), torch.ones(2, 66))


@pytest.mark.parametrize("full_path", [False, True])
def test_no_path_leaves_a_single_label(full_path: bool) -> None:
    labels = torch.full((1, 6, 9), 3)
    without = semantic_feedback(labels, decay_by_path=False)
    torch.testing.assert_close(semantic_feedback(labels, full_path=full_path), without)
    torch.testing.assert_close(semantic_feedback(labels, sigma=0.1), torch.full((1, 54, 54), 1 / 54))


def test_only_the_full_path_sees_what_lies_between_near_patches() -> None:
    labels = torch.zeros(1, 1, 12, dtype=torch.int64)
    labels[0, 0, 1] = 1
    early, full = (semantic_feedback(labels, sigma=0.1, full_path=choice)[0, 0] for choice in (False, True))
    assert early[2] == early[0]
    assert full[2] == pytest.approx(full[0].item() * np.exp(-2 / 11))


def test_windows_and_rows_do_not_meet(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    labels = torch.from_numpy(rng.integers(0, 3, (3, 5, 8)))
    labels[1] = 0
    together = semantic_feedback(labels)
    assert torch.equal(together, torch.cat([semantic_feedback(one[None]) for one in labels]))
    monkeypatch.setattr(module, "_CHUNK_ELEMENTS", 2 * 3 * 5 * 8 * 8)
    assert torch.equal(together, semantic_feedback(labels))


@pytest.mark.parametrize("size", [(12, 20), (15, 22), (4, 4)])
def test_cells_take_their_most_frequent_label(size: tuple[int, int], rng: np.random.Generator) -> None:
    labels = rng.integers(2, 7, size)
    got = majority_labels(torch.from_numpy(labels), 4)
    assert got.shape == (size[0] // 4, size[1] // 4)
    for (row, column), label in np.ndenumerate(got.numpy()):
        counts = Counter(labels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4].flatten().tolist())
        assert label == min(counts, key=lambda candidate: (-counts[candidate], candidate))


def test_ties_go_to_the_smallest_label() -> None:
    assert majority_labels(torch.tensor([[5, 2], [2, 5]]), 2).item() == 2
