"""From verdicts to a ranking: the reward of every candidate, and which differences may be chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovss_ray.choose.assessing import Assessment, SampledImage
from ovss_ray.choose.reward import FEWEST_CLASSES
from ovss_ray.evaluation.interval import CONFIDENCE, RESAMPLES, Interval


@dataclass(frozen=True)
class Standing:
    """How a candidate did.

    Attributes:
        key: of the candidate.
        reward: the sum over images, as the paper has it.
        mean_reward: per image.
        accepted_share: of all classes of all images, 0..1.
        behind: the best one's mean reward minus this one's, on images drawn anew; None for the best.
        tied: whether 0 is in that interval, or below: the sample cannot tell it from the best.
        unsegmented: images on which the method failed; their classes count as not accepted.
        images_per_s: of the segmenter alone.
    """

    key: str
    reward: int
    mean_reward: float
    accepted_share: float
    behind: Interval | None
    tied: bool
    unsegmented: int
    images_per_s: float


@dataclass(frozen=True)
class Ranking:
    """The candidates in order, best first, and what they were compared on.

    Attributes:
        standings: equal rewards stand in the order in which the candidates were named.
        images: that count: read with every candidate, of two classes or more.
        classes: of those images, all together.
        too_few_classes: images left out because they have fewer than two classes.
        unread: images left out because they could not be read, with the reason, by image id.
    """

    standings: tuple[Standing, ...]
    images: int
    classes: int
    too_few_classes: int
    unread: Mapping[int, str]


def rank(sample: Sequence[SampledImage], assessments: Mapping[str, Assessment]) -> Ranking:
    """Rank candidates on the images that all of them saw.

    Args:
        sample: the images with their classes.
        assessments: by key of the candidate.
    """
    unread = {image.row.image_id: image.error for image in sample if image.error is not None}
    for assessment in assessments.values():
        for verdict in assessment.verdicts:
            if verdict.status == "unread":
                unread.setdefault(verdict.image_id, verdict.error or "")
    readable = [image for image in sample if image.row.image_id not in unread]
    counted = [image for image in readable if len(image.classes) >= FEWEST_CLASSES]
    ids = {image.row.image_id for image in counted}
    classes = sum(len(image.classes) for image in counted)
    rewards = {
        key: np.array([sum(v.accepted) for v in assessment.verdicts if v.image_id in ids], dtype=np.int64)
        for key, assessment in assessments.items()
    }
    order = sorted(rewards, key=lambda key: -int(rewards[key].sum()))
    standings = tuple(_standing(key, rewards, order[0], classes, assessments[key]) for key in order)
    return Ranking(standings, len(counted), classes, len(readable) - len(counted), unread)


def _standing(
    key: str, rewards: Mapping[str, NDArray[np.int64]], best: str, classes: int, assessment: Assessment
) -> Standing:
    mine = rewards[key]
    behind = None if key == best else paired_interval(rewards[best], mine)
    segmented = sum(verdict.status != "unread" for verdict in assessment.verdicts)
    return Standing(
        key=key,
        reward=int(mine.sum()),
        mean_reward=float(mine.mean()) if len(mine) else 0.0,
        accepted_share=float(mine.sum() / classes) if classes else 0.0,
        behind=behind,
        tied=behind is None or behind.low <= 0,
        unsegmented=sum(verdict.status == "unsegmented" for verdict in assessment.verdicts),
        images_per_s=segmented / assessment.seconds if assessment.seconds else 0.0,
    )


def paired_interval(
    first: NDArray[np.int64],
    second: NDArray[np.int64],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
    seed: int = 0,
) -> Interval:
    """The bootstrap interval of the mean of `first - second` when the images are drawn anew with replacement.

    Args:
        first, second: [n] rewards of two candidates on the same images.
        resamples: draws.
        confidence: share of the draws inside the interval, 0..1.
        seed: of the draws.
    """
    images = len(first)
    times = np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=resamples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(times @ (first - second) / images, [tail, 1 - tail])
    return Interval(float(low), float(high), confidence)
