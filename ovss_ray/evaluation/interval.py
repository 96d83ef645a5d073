"""How much a score would differ on other images of the same kind: bootstrap over images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

RESAMPLES = 1000
CONFIDENCE = 0.95
_CHUNK_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Interval:
    """A percentile interval. Scores are fractions in 0..1; `confidence` is the share of resamples inside."""

    low: float
    high: float
    confidence: float = CONFIDENCE


@dataclass(frozen=True)
class ImageCounts:
    """Pixels of every image by class, as sparse matrices [images, classes]: right, predicted, true."""

    hits: Any
    predicted: Any
    true: Any


def bootstrap_miou(
    counts: ImageCounts, *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> tuple[Interval, npt.NDArray[np.float64]]:
    """The interval of the mIoU when the images are drawn anew, with replacement, as often as there are images.

    Args:
        counts: of n images.
        resamples: draws.
        confidence: share of the draws inside the interval, 0..1.
        seed: of the draws; equal seeds draw equal images, so that runs over the same images can be compared in pairs.

    Returns:
        the interval, and the mIoU [resamples] of every draw.
    """
    images = counts.hits.shape[0]
    rng = np.random.default_rng(seed)
    step = max(1, _CHUNK_ELEMENTS // max(images, 1))
    parts = []
    for first in range(0, resamples, step):
        times = rng.multinomial(images, np.full(images, 1 / images), size=min(step, resamples - first))
        hits, predicted, true = (times @ part for part in (counts.hits, counts.predicted, counts.true))
        union = predicted + true - hits
        with np.errstate(invalid="ignore"):
            parts.append(np.nanmean(np.where(union > 0, hits / union, np.nan), axis=1))
    scores = np.concatenate(parts)
    tail = (1 - confidence) / 2
    low, high = np.quantile(scores, [tail, 1 - tail])
    return Interval(float(low), float(high), confidence), scores
