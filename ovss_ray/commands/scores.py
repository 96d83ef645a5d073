"""What `ovss-ray evaluate` prints: the scores as people compare them, in percent."""

from __future__ import annotations

import math
from collections.abc import Sequence

from rich.table import Table

from ovss_ray.evaluation.compare import Comparison, published_beside
from ovss_ray.evaluation.interval import Interval
from ovss_ray.evaluation.metrics import Metrics
from ovss_ray.evaluation.result import Evaluation
from ovss_ray.printable import printable
from ovss_ray.terminal import complain, out, say


def print_evaluation(found: Evaluation) -> None:
    """By class, then means, then what is not in them and why."""
    out.print(_class_table(found.scores))
    for name, value, remark in _means(found.scores):
        say(f"{name:<14}{_percent(value):>7}{remark}")
    say(f"{found.images_evaluated:,} images of {found.truth} scored; counts are kept in {found.run}/{found.kept}")
    for problem in found.problems:
        say(f"{problem.images:>8,}  {problem.status}")
        for example in problem.examples:
            say(f"          {example.uri}: {example.detail or 'another image of this name is scored'}")
        if problem.images > len(problem.examples):
            say("          ...")
    for warning in found.warnings:
        say(f"warning: {warning}")
    if found.is_partial:
        complain("These are not the scores of the whole split: exit code 5.")


def print_comparison(found: Comparison) -> None:
    """The runs with their scores, best first, and the differences of every pair."""
    runs = Table("run", title=f"On the {found.images:,} images that all runs have", title_justify="left")
    for heading in ("mIoU", "interval", "aAcc"):
        runs.add_column(heading, justify="right")
    for run in found.runs:
        runs.add_row(printable(run.label), _percent(run.miou), _range(run.interval), _percent(run.pixel_accuracy))
    out.print(runs)
    for difference in found.differences:
        first, second = found.runs[difference.first].label, found.runs[difference.second].label
        verdict = "clear" if difference.is_clear else "not clear: other images could turn it around"
        say(f"{100 * difference.miou:+.2f} from {first} to {second} ({_range(difference.interval)}), {verdict}")
    for warning in found.warnings():
        say(f"warning: {warning}")


def print_published(evaluations: Sequence[Evaluation]) -> None:
    """What was published of the methods on the ground truth, a line each; nothing if nothing was."""
    published = published_beside(evaluations)
    if published:
        say("published mIoU, as printed:")
    for score in published:
        remarks = f" ({score.remarks})" if score.remarks else ""
        say(f"{score.miou:>8.2f}  {score.label}, {score.backbone or 'model not said'}: {score.source}{remarks}")


def _class_table(scores: Metrics) -> Table:
    has_boundary = scores.boundary_iou is not None
    table = Table("class")
    for heading in ("IoU", "Acc", *(["boundary IoU"] if has_boundary else []), "pixels"):
        table.add_column(heading, justify="right")
    boundaries = scores.boundary_iou if scores.boundary_iou is not None else scores.class_iou
    rows = zip(scores.names, scores.class_iou, scores.class_accuracy, boundaries, scores.pixels, strict=True)
    for name, iou, accuracy, boundary, pixels in rows:
        shown = [_percent(iou), _percent(accuracy), *([_percent(boundary)] if has_boundary else []), f"{pixels:,}"]
        table.add_row(printable(name), *shown)
    return table


def _means(scores: Metrics) -> list[tuple[str, float, str]]:
    interval = scores.interval
    sure = f"  ({interval.confidence:.0%} interval {_percent(interval.low)} to {_percent(interval.high)})"
    found = [
        ("mIoU", scores.miou, sure),
        ("mAcc", scores.mean_accuracy, ""),
        ("aAcc", scores.pixel_accuracy, ""),
        ("fwIoU", scores.frequency_weighted_iou, ""),
    ]
    if _percent(scores.miou_of_true_classes) != _percent(scores.miou):
        remark = "  (of the classes that are true somewhere, as in detectron2)"
        found.append(("mIoU, true", scores.miou_of_true_classes, remark))
    if scores.mean_boundary_iou is not None:
        found.append(("boundary IoU", scores.mean_boundary_iou, ""))
    if scores.split is not None:
        found += [("mIoU, seen", scores.split.seen, ""), ("mIoU, unseen", scores.split.unseen, "")]
        found.append(("hIoU", scores.split.harmonic, ""))
    return found


def _range(interval: Interval) -> str:
    return f"{_percent(interval.low)} to {_percent(interval.high)}"


def _percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"
