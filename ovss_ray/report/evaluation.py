"""The page of an evaluation: scores, published numbers, confusions, classes, worst and best images, what is missing."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ovss_ray.evaluation.compare import Comparison, published_beside
from ovss_ray.evaluation.ground_truth.truth import GroundTruth
from ovss_ray.evaluation.metrics import Metrics
from ovss_ray.evaluation.result import Evaluation
from ovss_ray.images.stores import StorageOptions
from ovss_ray.labels.reading import open_run
from ovss_ray.report.galleries import class_galleries
from ovss_ray.report.matrix import MOST_CLASSES, confusion_picture
from ovss_ray.report.page import Bar, Block, Figures, Section, Swatch, Table, Text, Warnings, render_page
from ovss_ray.version import __version__

SHOWN_CLASSES, WORST, BEST = 6, 3, 1

_REASONS = {
    "no_labels": "the run has no labels for it",
    "no_annotation": "its annotation is missing",
    "unknown_ids": "its annotation has values that the data set does not define",
    "size_mismatch": "labels and annotation differ in size",
    "damaged_annotation": "its annotation cannot be read",
    "not_in_split": "the split does not have it",
    "repeated_name": "another image of the run has its name",
}


def evaluation_page(
    evaluation: Evaluation,
    truth: GroundTruth,
    *,
    comparison: Comparison | None = None,
    classes: int = SHOWN_CLASSES,
    worst: int = WORST,
    best: int = BEST,
    storage_options: StorageOptions | None = None,
) -> str:
    """The HTML of an evaluation, everything inside: a few megabytes with the default number of pictures.

    Args:
        evaluation: what to show.
        truth: its ground truth, read again for the pictures.
        comparison: of this run with others, shown too.
        classes: how many get a gallery: those with the lowest IoU of all that are true somewhere.
        worst, best: images of each gallery.
        storage_options: fsspec options by protocol, of the run and its images.

    Raises:
        OvssError: the run cannot be read. Single images, labels or annotations that are gone are said in their place.
    """
    scores = evaluation.scores
    chosen = [index for index in _worst_first(scores) if scores.pixels[index]][:classes]
    with open_run(evaluation.run, storage_options) as run:
        parts = class_galleries(run, truth, evaluation.images, chosen, worst=worst, best=best)
    galleries: list[Block] = [Text(_GALLERIES)] if parts else []
    blocks: list[Block] = [
        Figures(_figures(evaluation)),
        Warnings(evaluation.warnings),
        *([] if comparison is None else [comparison_section(comparison)]),
        _published_section([evaluation] if comparison is None else [run.evaluation for run in comparison.runs]),
        _confusions(evaluation),
        Section("Classes", (Text(_CLASSES), _class_table(evaluation, truth))),
        Section("Worst and best images", (*galleries, *parts)),
        _unscored(evaluation),
        Section("Settings of the run", (Text(_settings(evaluation)),)),
    ]
    return render_page(
        f"{evaluation.method} on {evaluation.truth}",
        _lead(evaluation),
        blocks,
        footer=f"ovss-ray {__version__}; run {evaluation.run}, {evaluation.fingerprint[:12]}; ground truth "
        f"{evaluation.truth_root}; counts of every image in {evaluation.kept}.",
    )


def comparison_section(comparison: Comparison) -> Section:
    """Runs side by side: scores, differences, classes."""
    runs = tuple(
        (run.label, Bar(run.miou), _range(run.interval.low, run.interval.high), _percent(run.pixel_accuracy),
         run.evaluation.run)
        for run in comparison.runs
    )  # fmt: skip
    labels = [run.label for run in comparison.runs]
    differences = tuple(
        (labels[difference.first], labels[difference.second], f"{100 * difference.miou:+.2f}",
         _range(difference.interval.low, difference.interval.high), "yes" if difference.is_clear else "no")
        for difference in comparison.differences
    )  # fmt: skip
    spread = np.array([run.class_iou for run in comparison.runs])
    order = np.argsort(-np.nan_to_num(np.ptp(spread, axis=0), nan=-1.0), kind="stable")
    by_class = tuple(
        (comparison.names[index], *(Bar(float(run.class_iou[index])) for run in comparison.runs)) for index in order
    )
    confidence = comparison.runs[0].interval.confidence
    return Section(
        "Runs side by side",
        (
            Text(_COMPARISON.format(images=comparison.images, confidence=f"{confidence:.0%}")),
            Warnings(comparison.warnings()),
            Table(("run", "mIoU", f"{confidence:.0%} interval", "pixel accuracy", "directory"), runs),
            Table(("from", "to", "mIoU", "interval of the difference", "clear"), differences),
            Text("IoU by class, those that differ most first:"),
            Table(("class", *labels), by_class),
        ),
    )


def _lead(evaluation: Evaluation) -> str:
    how = f", by the protocol {evaluation.protocol}" if evaluation.protocol else ""
    return (
        f"{evaluation.images_evaluated:,} images labelled by {evaluation.method} with CLIP {evaluation.clip}{how}, "
        f"scored against the ground truth {evaluation.truth}."
    )


def _settings(evaluation: Evaluation) -> str:
    settings = (f"{name} = {value}" for name, value in evaluation.settings.items() if value is not None)
    return ", ".join((f"{evaluation.method}, clip = {evaluation.clip}", *settings))


def _figures(evaluation: Evaluation) -> tuple[tuple[str, str], ...]:
    scores = evaluation.scores
    interval = scores.interval
    found = [
        (_percent(scores.miou), f"mIoU, {_range(interval.low, interval.high)} with other images"),
        (_percent(scores.pixel_accuracy), "of all pixels right (aAcc)"),
        (_percent(scores.mean_accuracy), "mean accuracy of classes (mAcc)"),
        (_percent(scores.frequency_weighted_iou), "frequency-weighted IoU"),
    ]
    if _percent(scores.miou_of_true_classes) != _percent(scores.miou):
        found.append((_percent(scores.miou_of_true_classes), "mIoU of classes that are true (detectron2)"))
    if scores.mean_boundary_iou is not None:
        found.append((_percent(scores.mean_boundary_iou), "boundary IoU"))
    if scores.split is not None:
        found.append((_percent(scores.split.harmonic), f"hIoU: seen {_percent(scores.split.seen)}, "
                                                       f"unseen {_percent(scores.split.unseen)}"))  # fmt: skip
    expected = evaluation.expected_images
    found.append((f"{evaluation.images_evaluated:,}", "images" if expected is None else f"of {expected:,} images"))
    return tuple(found)


def _confusions(evaluation: Evaluation) -> Section:
    names = evaluation.scores.names
    text = _MATRIX if len(names) <= MOST_CLASSES else f"{_MATRIX} {_MANY.format(shown=MOST_CLASSES)}"
    return Section("Confusions", (Text(text), confusion_picture(evaluation.images.pixels, names)))


def _class_table(evaluation: Evaluation, truth: GroundTruth) -> Table:
    scores = evaluation.scores
    total = max(int(scores.pixels.sum()), 1)
    boundaries = scores.boundary_iou
    rows = []
    for index in _worst_first(scores):
        name, color = scores.names[index], truth.vocabulary.classes[index].color
        bars = [scores.class_iou[index], scores.class_accuracy[index]]
        bars += [] if boundaries is None else [boundaries[index]]
        cells: tuple[str | Bar | Swatch, ...] = (Swatch(name, color), *(Bar(float(share)) for share in bars))
        rows.append((*cells, f"{100 * scores.pixels[index] / total:.2f} %", _mistaken_for(evaluation, index)))
    boundary = () if boundaries is None else ("boundary IoU",)
    return Table(("class", "IoU", "accuracy", *boundary, "of all pixels", "otherwise mostly labelled"), tuple(rows))


def _mistaken_for(evaluation: Evaluation, index: int) -> str:
    row = evaluation.images.pixels[index].copy()
    total = row.sum()
    row[index] = 0
    if not row.any():
        return "-"
    label = int(row.argmax())
    return f"{(*evaluation.scores.names, 'nothing')[label]} {100 * row[label] / total:.0f} %"


def _published_section(evaluations: Sequence[Evaluation]) -> Section:
    published = published_beside(evaluations)
    if not published:
        methods = " and ".join(dict.fromkeys(evaluation.method for evaluation in evaluations))
        nothing = f"No published mIoU of {methods} on {evaluations[0].truth} is known to this package."
        return Section("Published numbers", (Text(nothing),))
    rows: list[tuple[str | Bar, ...]] = [
        (f"{evaluation.method}, measured", evaluation.clip, Bar(evaluation.scores.miou), evaluation.run, "")
        for evaluation in evaluations
    ]
    rows += [
        (score.label, score.backbone or "not said", Bar(score.miou / 100), score.source, score.remarks)
        for score in published
    ]
    columns = 5 if any(score.remarks for score in published) else 4
    header = ("method", "model", "mIoU", "source", "remarks")
    table = Table(header[:columns], tuple(row[:columns] for row in rows))
    return Section("Published numbers", (Text(_PUBLISHED), table))


def _unscored(evaluation: Evaluation) -> Section:
    if not evaluation.problems:
        return Section("Images that are not scored", (Text("None: every image of the run is scored."),))
    rows = tuple(
        (_REASONS.get(problem.status, problem.status), f"{problem.images:,}", image.name, image.detail or image.uri)
        for problem in evaluation.problems
        for image in problem.examples
    )
    return Section("Images that are not scored", (Table(("reason", "images", "such as", "in detail"), rows),))


def _worst_first(scores: Metrics) -> list[int]:
    """Class ids by ascending IoU, of equal ones those with more pixels first; at the end those without one."""
    order: list[int] = np.lexsort((-scores.pixels, np.nan_to_num(scores.class_iou, nan=math.inf))).tolist()
    return order


def _percent(share: float) -> str:
    return "-" if math.isnan(share) else f"{100 * share:.1f} %"


def _range(low: float, high: float) -> str:
    return f"{100 * low:.1f} to {100 * high:.1f}"


_MATRIX = (
    "Each row is a true class; a cell shows how many of its pixels got the label of the column, in percent. Green is "
    "right, red is wrong, and the stronger the colour, the larger the share. Rest the pointer on a cell to read it."
)
_MANY = "Shown are the {shown} classes with the most true pixels."
_CLASSES = "Lowest IoU first, in percent."
_GALLERIES = (
    "For the classes with the lowest IoU, the images where they came out worst and best. Pixels that do not count in "
    "the ground truth, and those without a label, are white."
)
_PUBLISHED = (
    "Percent, as printed in the sources. A fair comparison needs the same model, weights, class names, templates and "
    "settings, and all images of the split."
)
_COMPARISON = (
    "On the {images:,} images that all runs have. The interval is that of the mIoU if other images of the same kind "
    "had been taken. A difference is clear if its {confidence} interval, with equal images for both runs in every "
    "draw, does not hold 0. With many runs, some of many pairs look clear by chance."
)
