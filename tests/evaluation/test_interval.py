"""Bootstrap intervals against a loop over draws, and what they are for: how often they hold the true score."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import csr_array

from ovss_ray.evaluation import interval
from ovss_ray.evaluation.interval import ImageCounts, bootstrap_miou


def draw_counts(rng: np.random.Generator, images: int, classes: int = 5) -> list[np.ndarray]:
    """Hits, predicted and true pixels of images in which some classes are absent; class 4 is in no image."""
    true = rng.integers(0, 1000, (images, classes)) * (rng.random((images, classes)) < 0.6)
    true[:, 4] = 0
    hits = (true * rng.beta(6, 3, (images, 1))).astype(np.int64)
    predicted = hits + rng.integers(0, 300, (images, classes)) * (np.arange(classes) < 4)
    return [hits, predicted, true]


def counts_of(dense: list[np.ndarray]) -> ImageCounts:
    return ImageCounts(*(csr_array(part) for part in dense))


def miou(hits: np.ndarray, predicted: np.ndarray, true: np.ndarray) -> float:
    values = [h / (p + t - h) for h, p, t in zip(hits, predicted, true, strict=True) if p + t - h > 0]
    return float(np.mean(values))


def test_draws_are_scores_of_resampled_images() -> None:
    dense = draw_counts(np.random.default_rng(0), 30)
    got, scores = bootstrap_miou(counts_of(dense), resamples=50, seed=3)
    times = np.random.default_rng(3).multinomial(30, np.full(30, 1 / 30), size=50)
    expected = [miou(*(np.repeat(part, row, axis=0).sum(0) for part in dense)) for row in times]
    np.testing.assert_allclose(scores, expected, atol=1e-12)
    assert (got.low, got.high) == pytest.approx((np.quantile(expected, 0.025), np.quantile(expected, 0.975)))


def test_many_images_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = counts_of(draw_counts(np.random.default_rng(1), 40))
    whole = bootstrap_miou(counts, resamples=20)[1]
    monkeypatch.setattr(interval, "_CHUNK_ELEMENTS", 40 * 7)
    assert np.array_equal(bootstrap_miou(counts, resamples=20)[1], whole)


def test_the_interval_mostly_holds_the_score_of_all_images() -> None:
    rng = np.random.default_rng(5)
    world = draw_counts(rng, 20_000)
    target = miou(*(part.sum(0) for part in world))
    held = 0
    for _ in range(60):
        chosen = rng.integers(0, 20_000, 120)
        found, _ = bootstrap_miou(counts_of([part[chosen] for part in world]), resamples=300)
        held += found.low <= target <= found.high
    assert 50 <= held <= 60
