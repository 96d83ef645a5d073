"""Comparisons against resampling done by hand, and what cannot be compared."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ovss_ray
from ovss_ray.errors import SettingError
from ovss_ray.evaluation.compare import Difference, compare_evaluations, published_beside
from ovss_ray.evaluation.confusion import ConfusionMatrix, confusion_counts
from ovss_ray.evaluation.interval import Interval
from ovss_ray.evaluation.result import Evaluation
from tests.scored_demo import SCENES, ScoredDemo, read_labels

DRAWS = 60


def matrices(demo: ScoredDemo, run: str, names: list[str]) -> list[np.ndarray]:
    """The confusion matrix of each image, from its files."""
    with ovss_ray.open_run(demo.folder / run) as opened:
        ids = {Path(row["uri"]).stem: row["image_id"] for row in opened.images(["image_id", "uri"]).to_pylist()}
        return [
            confusion_counts(opened.label_map(ids[name]), read_labels(demo.labels / f"{name}.png"), 12)
            for name in names
        ]


def drawn_mious(counts: list[np.ndarray], draws: np.ndarray) -> list[float]:
    """The mIoU of each draw: the matrices of the images drawn, each as often as it was, added up."""
    return [
        ConfusionMatrix(12, counts=sum(times * own for times, own in zip(draw, counts, strict=True))).miou
        for draw in draws
    ]


@pytest.fixture
def fewer_labels(scored_demo: ScoredDemo, tmp_path: Path) -> Path:
    """Ground truth of the same name without the first three images."""
    return copy_labels(scored_demo, tmp_path, leave_out={"00000", "00001", "00002"})


def copy_labels(demo: ScoredDemo, folder: Path, leave_out: set[str]) -> Path:
    shutil.copytree(demo.labels, folder / "labels", ignore=lambda *_: {f"{name}.png" for name in leave_out})
    return folder / "labels"


def test_differences_are_those_of_runs_scored_on_equal_draws(scored_demo: ScoredDemo) -> None:
    evaluations = scored_demo.evaluations
    found = compare_evaluations(list(evaluations.values()), resamples=DRAWS, confidence=0.8, seed=3)
    names = sorted(path.stem for path in scored_demo.labels.iterdir())
    draws = np.random.default_rng(3).multinomial(SCENES, [1 / SCENES] * SCENES, size=DRAWS)
    by_run = {str(scored_demo.folder / run): matrices(scored_demo, run, names) for run in evaluations}
    drawn = {run: np.array(drawn_mious(counts, draws)) for run, counts in by_run.items()}

    whole = {run: ConfusionMatrix(12, counts=sum(counts)) for run, counts in by_run.items()}
    for run in found.runs:
        uri = run.evaluation.run
        assert run.miou == pytest.approx(whole[uri].miou)
        assert run.pixel_accuracy == pytest.approx(whole[uri].pixel_accuracy)
        np.testing.assert_allclose(run.class_iou, whole[uri].class_iou)
        assert (run.interval.low, run.interval.high) == pytest.approx(np.quantile(drawn[uri], [0.1, 0.9]))
    assert len(found.differences) == 3
    for difference in found.differences:
        first, second = (found.runs[index].evaluation.run for index in (difference.first, difference.second))
        low, high = np.quantile(drawn[second] - drawn[first], [0.1, 0.9])
        assert (difference.interval.low, difference.interval.high) == pytest.approx((low, high))
        assert difference.miou == pytest.approx(whole[second].miou - whole[first].miou)
        assert difference.is_clear == (low > 0 or high < 0)


def test_runs_come_best_first_and_a_clear_difference_is_called_clear(scored_demo: ScoredDemo) -> None:
    found = compare_evaluations([scored_demo.evaluations["clipbase"], scored_demo.evaluations["maskclip"]])
    assert [run.label for run in found.runs] == ["maskclip", "clipbase"]
    (difference,) = found.differences
    assert difference.miou < -0.05
    assert difference.is_clear
    assert (found.images, found.warnings()) == (SCENES, ())


@pytest.mark.parametrize(
    ("low", "high", "clear"), [(0.01, 0.2, True), (-0.2, -0.01, True), (-0.01, 0.2, False), (0.0, 0.2, False)]
)
def test_a_difference_is_clear_if_its_interval_leaves_out_zero(low: float, high: float, clear: bool) -> None:
    assert Difference(0, 1, 0.1, Interval(low, high)).is_clear is clear


def test_a_difference_that_images_turn_around_is_not_clear(scored_demo: ScoredDemo) -> None:
    found = compare_evaluations([scored_demo.evaluations["maskclip"], scored_demo.evaluations["coarser"]])
    (difference,) = found.differences
    assert difference.interval.low < 0 < difference.interval.high
    assert not difference.is_clear


def test_labels_name_what_differs_between_runs_of_one_method(scored_demo: ScoredDemo) -> None:
    found = compare_evaluations(list(scored_demo.evaluations.values()))
    labels = {Path(run.evaluation.run).name: run.label for run in found.runs}
    assert labels == {"maskclip": "maskclip, stride=48", "coarser": "maskclip, stride=56", "clipbase": "clipbase"}
    twin = dataclasses.replace(scored_demo.evaluations["clipbase"], run="elsewhere")
    twins = compare_evaluations([scored_demo.evaluations["clipbase"], twin])
    assert [run.label for run in twins.runs] == [
        f"clipbase ({scored_demo.folder / 'clipbase'})",
        "clipbase (elsewhere)",
    ]


def test_only_images_that_all_runs_have_are_compared(scored_demo: ScoredDemo, fewer_labels: Path) -> None:
    fewer = scored_demo.evaluate("clipbase", fewer_labels)
    found = compare_evaluations([scored_demo.evaluations["maskclip"], fewer], resamples=DRAWS)
    shared = sorted(path.stem for path in fewer_labels.iterdir())
    assert found.images == len(shared) == SCENES - 3
    maskclip = ConfusionMatrix(12, counts=sum(matrices(scored_demo, "maskclip", shared)))
    assert found.runs[0].miou == pytest.approx(maskclip.miou)
    assert found.warnings() == ("maskclip has 8 scored images; only the 5 that all runs have are compared",)


def test_runs_without_a_shared_image_are_refused(scored_demo: ScoredDemo, fewer_labels: Path, tmp_path: Path) -> None:
    others = copy_labels(scored_demo, tmp_path / "others", {path.stem for path in fewer_labels.iterdir()})
    evaluations = [scored_demo.evaluate("maskclip", fewer_labels), scored_demo.evaluate("clipbase", others)]
    with pytest.raises(SettingError, match=r"no image of labels is scored in all runs \(.*maskclip has 5, .* has 3\)"):
        compare_evaluations(evaluations)


def test_ground_truths_that_differ_in_one_image_are_refused(scored_demo: ScoredDemo, tmp_path: Path) -> None:
    other = copy_labels(scored_demo, tmp_path, set())
    labels = read_labels(other / "00004.png").copy()
    labels[0, 0] = (labels[0, 0] + 1) % 12
    Image.fromarray(labels).save(other / "00004.png")
    changed = scored_demo.evaluate("clipbase", other)
    with pytest.raises(SettingError, match="annotations of 1 of 8 images differ, such as that of 00004"):
        compare_evaluations([scored_demo.evaluations["maskclip"], changed])


def test_other_ground_truths_other_classes_and_one_run_are_refused(scored_demo: ScoredDemo) -> None:
    first, second = scored_demo.evaluations["maskclip"], scored_demo.evaluations["clipbase"]

    def refused(evaluations: list[Evaluation], reason: str) -> None:
        with pytest.raises(SettingError, match=reason):
            compare_evaluations(evaluations)

    refused([first], "at least two")
    refused([first, first], "is given twice")
    refused([first, dataclasses.replace(second, truth="voc21")], "against labels, .* against voc21")
    renamed = dataclasses.replace(second.scores, names=("disc", *second.scores.names[1:]))
    refused([first, dataclasses.replace(second, scores=renamed)], "called labels with different classes")


def test_published_scores_of_the_model_of_a_run_come_first(scored_demo: ScoredDemo) -> None:
    base = scored_demo.evaluations["maskclip"]
    large = dataclasses.replace(base, truth="voc21", method="naclip", clip="ViT-L-14-quickgelu/openai")
    small = dataclasses.replace(base, truth="voc21", method="sclip", clip="ViT-B-16-quickgelu/openai", run="b")
    assert [score.miou for score in published_beside([large])] == [57.9, 58.9, 64.07]
    scores = published_beside([large, small])
    assert [score.miou for score in scores] == [57.9, 59.1, 59.63, 58.9, 64.07, 59.1]
    assert [score.backbone for score in scores[:3]] == ["CLIP ViT-L/14", "CLIP ViT-B/16", "CLIP ViT-B/16"]
    found = compare_evaluations([large, small], resamples=5)
    assert set(found.published) == set(scores)
    assert published_beside([base]) == ()


def test_the_record_is_plain_json(scored_demo: ScoredDemo) -> None:
    first, second = scored_demo.evaluations["maskclip"], scored_demo.evaluations["clipbase"]
    found = compare_evaluations([first, second], resamples=DRAWS)
    record = json.loads(json.dumps(found.record(), allow_nan=False))
    assert record["images"] == SCENES
    assert [run["run"] for run in record["runs"]] == [first.run, second.run]
    assert record["differences"][0]["clear"] is True
    assert record["differences"][0]["second"] == second.run
    iou = record["runs"][0]["class_iou"]
    for name, value in zip(first.scores.names, found.runs[0].class_iou, strict=True):
        assert iou[name] is None if math.isnan(value) else iou[name] == value
