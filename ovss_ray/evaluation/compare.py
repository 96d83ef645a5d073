"""Several runs against one ground truth: which differences the choice of the images does not explain."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np

from ovss_ray.errors import SettingError
from ovss_ray.evaluation.confusion import FloatVector
from ovss_ray.evaluation.interval import CONFIDENCE, RESAMPLES, ImageCounts, Interval, bootstrap_miou
from ovss_ray.evaluation.published import PublishedScore, backbone_of, published_for
from ovss_ray.evaluation.result import Evaluation


@dataclass(frozen=True, eq=False)
class ComparedRun:
    """One run of a comparison, scored on the images that all of them have. Scores are fractions in 0..1.

    Attributes:
        evaluation: of all its images.
        label: what tells it from the other runs: the method, and what else differs.
        miou, pixel_accuracy: as in `Metrics`, on the shared images; so are the next two.
        class_iou: [C] NaN for classes that are neither true nor predicted.
        interval: of `miou`.
    """

    evaluation: Evaluation
    label: str
    miou: float
    pixel_accuracy: float
    class_iou: FloatVector
    interval: Interval


@dataclass(frozen=True)
class Difference:
    """The mIoU of the second run minus that of the first, and the interval of that when images are drawn anew.

    Both runs get the same images in every draw, so that what makes an image hard for both cancels out. `first` and
    `second` are positions in `Comparison.runs`.
    """

    first: int
    second: int
    miou: float
    interval: Interval

    @property
    def is_clear(self) -> bool:
        """Whether it is more than the choice of the images explains: the interval does not hold 0."""
        return not self.interval.low <= 0.0 <= self.interval.high


@dataclass(frozen=True, eq=False)
class Comparison:
    """Runs side by side, best first.

    Attributes:
        truth: name of the ground truth.
        names: its C classes.
        images: number of images that all runs have scored; everything here is about these.
        runs: by descending mIoU.
        differences: of every pair of them.
        published: published scores of their methods on this ground truth; those with the model of a run first.
    """

    truth: str
    names: tuple[str, ...]
    images: int
    runs: tuple[ComparedRun, ...]
    differences: tuple[Difference, ...]
    published: tuple[PublishedScore, ...]

    def warnings(self) -> tuple[str, ...]:
        """What is left out of the comparison, a sentence each."""
        return tuple(
            f"{run.label} has {run.evaluation.images_evaluated:,} scored images; only the {self.images:,} that all "
            "runs have are compared"
            for run in self.runs
            if run.evaluation.images_evaluated > self.images
        )

    def record(self) -> dict[str, Any]:
        """As JSON holds it."""
        return {
            "ground_truth": self.truth,
            "images": self.images,
            "warnings": list(self.warnings()),
            "runs": [
                {
                    "run": run.evaluation.run,
                    "label": run.label,
                    "miou": _number(run.miou),
                    "interval": _interval(run.interval),
                    "pixel_accuracy": _number(run.pixel_accuracy),
                    "class_iou": {
                        name: _number(float(iou)) for name, iou in zip(self.names, run.class_iou, strict=True)
                    },
                }
                for run in self.runs
            ],
            "differences": [
                {
                    "first": self.runs[difference.first].evaluation.run,
                    "second": self.runs[difference.second].evaluation.run,
                    "miou": _number(difference.miou),
                    "interval": _interval(difference.interval),
                    "clear": difference.is_clear,
                }
                for difference in self.differences
            ],
            "published": [asdict(score) for score in self.published],
        }


def compare_evaluations(
    evaluations: Sequence[Evaluation], *, resamples: int = RESAMPLES, confidence: float = CONFIDENCE, seed: int = 0
) -> Comparison:
    """Compare runs on the images that all of them have scored.

    Args:
        evaluations: two or more, of the same ground truth.
        resamples, confidence, seed: of the bootstrap, see `bootstrap_miou`.

    Raises:
        SettingError: there are fewer than two, a run is given twice, the ground truths differ in name, classes or what
            they say about an image, or no image is scored in all runs.
    """
    _require_same_truth(evaluations)
    shared = sorted(set.intersection(*(set(evaluation.images.names) for evaluation in evaluations)))
    if not shared:
        counted = ", ".join(f"{evaluation.run} has {evaluation.images_evaluated:,}" for evaluation in evaluations)
        raise SettingError(
            f"no image of {evaluations[0].truth} is scored in all runs ({counted}); label the same images"
        )
    counts = [_counts_of(evaluation, shared) for evaluation in evaluations]
    _require_equal_truths(evaluations, counts, shared)
    runs, draws = [], []
    for evaluation, label, own in zip(evaluations, _labels(evaluations), counts, strict=True):
        interval, drawn = bootstrap_miou(own, resamples=resamples, confidence=confidence, seed=seed)
        iou, accuracy = _scores(own)
        runs.append(ComparedRun(evaluation, label, _mean(iou), accuracy, iou, interval))
        draws.append(drawn)
    order = sorted(range(len(runs)), key=lambda index: -runs[index].miou)
    runs, draws = [runs[index] for index in order], [draws[index] for index in order]
    return Comparison(
        truth=evaluations[0].truth,
        names=evaluations[0].scores.names,
        images=len(shared),
        runs=tuple(runs),
        differences=tuple(
            Difference(a, b, runs[b].miou - runs[a].miou, _percentiles(draws[b] - draws[a], confidence))
            for a, b in combinations(range(len(runs)), 2)
        ),
        published=published_beside([run.evaluation for run in runs]),
    )


def published_beside(evaluations: Sequence[Evaluation]) -> tuple[PublishedScore, ...]:
    """What was published of the methods on the ground truth; scores with the model of a run come first."""
    found: dict[PublishedScore, bool] = {}
    for evaluation in evaluations:
        backbone = backbone_of(evaluation.clip)
        for score in published_for(method=evaluation.method, benchmark=evaluation.truth):
            found[score] = found.get(score, False) or score.backbone == backbone
    return tuple(sorted(found, key=lambda score: not found[score]))


def _require_same_truth(evaluations: Sequence[Evaluation]) -> None:
    if len(evaluations) < 2:
        raise SettingError("one run alone cannot be compared; give at least two")
    repeated = [run for run, times in Counter(evaluation.run for evaluation in evaluations).items() if times > 1]
    if repeated:
        raise SettingError(f"{repeated[0]} is given twice; compare different runs")
    first = evaluations[0]
    for other in evaluations[1:]:
        if other.truth != first.truth:
            raise SettingError(
                f"{first.run} was evaluated against {first.truth}, {other.run} against {other.truth}; evaluate both "
                "against the same ground truth"
            )
        if other.scores.names != first.scores.names:
            raise SettingError(
                f"{first.run} and {other.run} were evaluated against two ground truths called {first.truth} with "
                "different classes; evaluate both against the same one"
            )


def _require_equal_truths(
    evaluations: Sequence[Evaluation], counts: Sequence[ImageCounts], shared: Sequence[str]
) -> None:
    """The true pixels of an image follow from the ground truth alone, so they must not depend on the run."""
    for evaluation, own in zip(evaluations[1:], counts[1:], strict=True):
        differ = np.unique((own.true - counts[0].true).nonzero()[0])
        if differ.size:
            raise SettingError(
                f"{evaluations[0].run} and {evaluation.run} were evaluated against different ground truths: the "
                f"annotations of {differ.size:,} of {len(shared):,} images differ, such as that of "
                f"{shared[differ[0]]}; evaluate both against the same one"
            )


def _counts_of(evaluation: Evaluation, names: Sequence[str]) -> ImageCounts:
    """The counts of these images in this order."""
    rows = {name: row for row, name in enumerate(evaluation.images.names)}
    chosen = [rows[name] for name in names]
    counts = evaluation.images.counts()
    return ImageCounts(counts.hits[chosen], counts.predicted[chosen], counts.true[chosen])


def _scores(counts: ImageCounts) -> tuple[FloatVector, float]:
    """IoU of each class [C] and pixel accuracy."""
    hits, predicted, true = (
        np.asarray(part.sum(axis=0)).ravel() for part in (counts.hits, counts.predicted, counts.true)
    )
    with np.errstate(invalid="ignore"):
        return np.true_divide(hits, predicted + true - hits), float(np.true_divide(hits.sum(), true.sum()))


def _percentiles(draws: FloatVector, confidence: float) -> Interval:
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(low), float(high), confidence)


def _labels(evaluations: Sequence[Evaluation]) -> list[str]:
    """The method of each, with what differs between runs of one method; the run directory where nothing does."""
    fields = [
        {"clip": evaluation.clip, "protocol": evaluation.protocol, **evaluation.settings} for evaluation in evaluations
    ]
    labels = []
    for own, evaluation in zip(fields, evaluations, strict=True):
        same = [other for other, e in zip(fields, evaluations, strict=True) if e.method == evaluation.method]
        differing = [name for name in own if any(other.get(name) != own[name] for other in same)]
        parts = [f"{name}={own[name]}" for name in differing if own[name] is not None]
        labels.append(", ".join([evaluation.method, *parts]))
    times = Counter(labels)
    return [
        label if times[label] == 1 else f"{label} ({evaluation.run})"
        for label, evaluation in zip(labels, evaluations, strict=True)
    ]


def _mean(iou: FloatVector) -> float:
    present = iou[~np.isnan(iou)]
    return float(present.mean()) if present.size else math.nan


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


def _interval(interval: Interval) -> dict[str, float | None]:
    return {"low": _number(interval.low), "high": _number(interval.high), "confidence": interval.confidence}
