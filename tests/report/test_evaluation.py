"""The page of an evaluation of real runs: numbers, pictures, and what cannot be shown."""

from __future__ import annotations

import base64
import dataclasses
import io
import re
import shutil
import tarfile
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

import ovss_ray
from ovss_ray.demo.scenes import CLASSES
from ovss_ray.evaluation.compare import compare_evaluations
from ovss_ray.evaluation.confusion import ConfusionMatrix, confusion_counts
from ovss_ray.evaluation.evaluate import evaluate_run
from ovss_ray.evaluation.ground_truth import open_folder_truth
from ovss_ray.report.evaluation import evaluation_page
from ovss_ray.report.galleries import LONGEST_SIDE
from ovss_ray.report.page import paint_labels
from ovss_ray.run.driver import run_job
from ovss_ray.spec import JobSpec
from tests.report.test_page import Outline
from tests.scored_demo import ENLARGED, SCENES, ScoredDemo, read_labels


@pytest.fixture(scope="module")
def page(scored_demo: ScoredDemo) -> str:
    return evaluation_page(scored_demo.evaluations["maskclip"], scored_demo.truth)


def words(page: str) -> str:
    return " ".join("".join(f"{part} " for part in Outline(page).text).split())


def pictures(page: str) -> dict[str, np.ndarray]:
    """The pictures by their description."""
    found = re.findall(r'<img src="data:image/(?:png|jpeg);base64,([^"]+)" alt="([^"]+)"', page)
    return {text: np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")) for data, text in found}


def label_map(demo: ScoredDemo, run: str, name: str) -> np.ndarray:
    with ovss_ray.open_run(demo.folder / run) as opened:
        ids = {Path(row["uri"]).stem: row["image_id"] for row in opened.images(["image_id", "uri"]).to_pylist()}
        return opened.label_map(ids[name])


def test_everything_is_inside_and_the_page_stays_small(page: str) -> None:
    outline = Outline(page)
    assert outline.sources
    assert all(source.startswith("data:image/") for source in outline.sources)
    assert len(page) < 3_000_000


def test_the_scores_are_on_it(page: str, scored_demo: ScoredDemo) -> None:
    found = scored_demo.evaluations["maskclip"]
    text = words(page)
    assert f"{100 * found.scores.miou:.1f} %" in text
    assert f"{100 * found.scores.interval.low:.1f} to {100 * found.scores.interval.high:.1f} with other images" in text
    for name, iou, boundary in zip(CLASSES, found.scores.class_iou, found.scores.boundary_iou, strict=True):  # type: ignore[arg-type]
        assert re.search(rf"{name} {100 * iou:.1f} [\d.]+ {100 * boundary:.1f} ", text), name
    assert "every image of the run is scored" in text
    assert "No published mIoU of maskclip on labels" in text
    assert "stride = 48" in text


def test_classes_come_worst_first_with_what_they_are_taken_for(page: str, scored_demo: ScoredDemo) -> None:
    found = scored_demo.evaluations["maskclip"]
    table = words(page).partition("otherwise mostly labelled")[2].partition("Worst and best images")[0]
    positions = [table.index(f"{CLASSES[index]} {100 * found.scores.class_iou[index]:.1f}")
                 for index in np.argsort(found.scores.class_iou)]  # fmt: skip
    assert positions == sorted(positions)
    worst = int(np.argmin(found.scores.class_iou))
    counts = found.images.confusion().counts[worst]
    wrong = {name: count for name, count in zip(CLASSES, counts[:-1], strict=True) if name != CLASSES[worst]}
    most = max(wrong, key=lambda name: wrong[name])
    assert f" % {most} {100 * wrong[most] / counts.sum():.0f} % " in table[: positions[1]]


def test_each_of_the_worst_classes_has_its_worst_and_best_images(page: str, scored_demo: ScoredDemo) -> None:
    found = scored_demo.evaluations["maskclip"]
    shown = re.findall(r'<h3 class="part">(\w+)</h3>', page)
    assert shown == [CLASSES[index] for index in np.argsort(found.scores.class_iou)[:6]]
    names = dict(zip(found.images.image_ids.tolist(), found.images.names, strict=True))
    parts = re.split(r'<h3 class="part">', page)[1:]
    for name, part in zip(shown, parts, strict=True):
        class_id = CLASSES.index(name)
        remarks = re.findall(r"<figcaption>(\d+): (worst|best), IoU ([\d.]+) %</figcaption>", part)
        worst = [names[image_id] for image_id in found.images.worst(class_id, 3)]
        best = [names[image_id] for image_id in found.images.best(class_id, 1)]
        assert [(image, kind) for image, kind, _ in remarks] == [
            *((image, "worst") for image in worst),
            *((image, "best") for image in best if image not in worst),
        ]
        for image, _, iou in remarks:
            truth = read_labels(scored_demo.labels / f"{image}.png")
            counts = confusion_counts(label_map(scored_demo, "maskclip", image), truth, 12)
            assert float(iou) == pytest.approx(100 * ConfusionMatrix(12, counts=counts).class_iou[class_id], abs=0.051)


def test_pictures_show_the_labels_and_the_truth_of_the_image(page: str, scored_demo: ScoredDemo) -> None:
    colours = [entry.color for entry in scored_demo.truth.vocabulary.classes]
    shown = pictures(page)
    names = {text.split()[-1] for text in shown}
    assert len(names) > 3
    for name in names - {ENLARGED}:
        truth = read_labels(scored_demo.labels / f"{name}.png")
        np.testing.assert_array_equal(shown[f"ground truth of {name}"], paint_labels(truth, colours))
        labels = label_map(scored_demo, "maskclip", name)
        np.testing.assert_array_equal(shown[f"labels of {name}"], paint_labels(labels, colours))
        with Image.open(scored_demo.folder / f"images/{name}.jpg") as photo:
            difference = np.abs(np.asarray(photo).astype(int) - shown[f"image {name}"])
        assert difference.mean() < 10


def test_large_images_are_shrunk_to_pictures_of_one_size(scored_demo: ScoredDemo) -> None:
    page = evaluation_page(scored_demo.evaluations["maskclip"], scored_demo.truth, classes=12, worst=SCENES)
    shown = pictures(page)
    truth = read_labels(scored_demo.labels / f"{ENLARGED}.png")
    height, width = round(truth.shape[0] * LONGEST_SIDE / truth.shape[1]), LONGEST_SIDE
    for text in (f"image {ENLARGED}", f"labels of {ENLARGED}", f"ground truth of {ENLARGED}"):
        assert shown[text].shape == (height, width, 3)
    colours = [entry.color for entry in scored_demo.truth.vocabulary.classes]
    exact = np.asarray(Image.fromarray(truth).resize((width, height), Image.Resampling.NEAREST))
    assert (shown[f"ground truth of {ENLARGED}"] == paint_labels(exact, colours)).all(axis=2).mean() > 0.99


def test_notes_say_what_became_of_the_class_in_the_image(page: str, scored_demo: ScoredDemo) -> None:
    notes = re.findall(r"<figcaption>(\w+) is labelled ([^<]*)</figcaption></figure><figure><img [^>]*"
                       r'alt="ground truth of (\d+)"><figcaption>\w+: ([\d.]+)', page)  # fmt: skip
    assert len(notes) > 3
    for name, went, image, share in notes:
        truth = read_labels(scored_demo.labels / f"{image}.png")
        there = truth == CLASSES.index(name)
        assert float(share) == pytest.approx(100 * there.mean(), abs=0.051)
        labels = np.bincount(label_map(scored_demo, "maskclip", image)[there], minlength=12) / there.sum()
        for part in went.replace("\N{NO-BREAK SPACE}", " ").split(", "):
            label, percent, _ = part.split()
            assert int(percent) == pytest.approx(100 * labels[CLASSES.index(label)], abs=0.51)


def test_images_that_are_gone_leave_labels_and_truth(scored_demo: ScoredDemo) -> None:
    images, away = scored_demo.folder / "images", scored_demo.folder / "away"
    images.rename(away)
    try:
        page = evaluation_page(scored_demo.evaluations["maskclip"], scored_demo.truth)
    finally:
        away.rename(images)
    shown = pictures(page)
    assert not any(text.startswith("image ") for text in shown)
    assert any(text.startswith("labels of ") for text in shown)
    assert "image 0 cannot be shown: not_found" in words(page)
    assert f"(image 0, {images}/00000.jpg)" in words(page)


def test_a_truth_that_is_gone_leaves_images_and_labels(scored_demo: ScoredDemo, tmp_path: Path) -> None:
    copy = tmp_path / "labels"
    shutil.copytree(scored_demo.labels, copy)
    truth = open_folder_truth(str(copy), list(CLASSES))
    truth.names()
    for file in copy.iterdir():
        file.unlink()
    page = evaluation_page(scored_demo.evaluations["maskclip"], truth)
    shown = pictures(page)
    assert not any(text.startswith("ground truth of ") for text in shown)
    assert any(text.startswith("labels of ") for text in shown)
    assert any(text.startswith("image ") for text in shown)
    assert "no-picture" in page.partition("</style>")[2]


def test_what_is_missing_is_said_with_reasons(scored_demo: ScoredDemo, tmp_path: Path) -> None:
    fewer = tmp_path / "labels"
    shutil.copytree(scored_demo.labels, fewer)
    (fewer / "00000.png").unlink()
    (fewer / "00001.png").write_bytes(b"no picture")
    found = scored_demo.evaluate("maskclip", fewer)
    text = words(evaluation_page(found, open_folder_truth(str(fewer), list(CLASSES)), classes=1))
    assert "the split does not have it 1 00000" in text
    assert "its annotation cannot be read 1 00001" in text
    assert found.warnings
    for warning in found.warnings:
        assert warning in text


def test_runs_stand_side_by_side(scored_demo: ScoredDemo) -> None:
    found = scored_demo.evaluations
    comparison = compare_evaluations(list(found.values()), resamples=50)
    text = words(evaluation_page(found["maskclip"], scored_demo.truth, comparison=comparison, classes=0))
    assert f"On the {SCENES} images that all runs have" in text
    for run in comparison.runs:
        assert f"{run.label} {100 * run.miou:.1f} " in text
    for difference in comparison.differences:
        first, second = comparison.runs[difference.first].label, comparison.runs[difference.second].label
        interval = f"{100 * difference.interval.low:.1f} to {100 * difference.interval.high:.1f}"
        clear = "yes" if difference.is_clear else "no"
        assert f"{first} {second} {100 * difference.miou:+.2f} {interval} {clear}" in text


def test_published_numbers_stand_beside_with_their_source(scored_demo: ScoredDemo) -> None:
    found = dataclasses.replace(scored_demo.evaluations["maskclip"], truth="voc21", method="naclip")
    text = words(evaluation_page(found, scored_demo.truth, classes=0))
    assert f"naclip, measured demo {100 * found.scores.miou:.1f} {found.run} NACLIP " in text
    assert "NACLIP CLIP ViT-B/16 58.9 A Survey on Training-free Open-Vocabulary Semantic Segmentation" in text
    assert "NACLIP, PAMR, 10 steps, dilations 8 and 16 CLIP ViT-B/16 64.1 repository sinahmr/NACLIP, README" in text


def test_remarks_and_the_methods_of_all_compared_runs_are_among_the_published(scored_demo: ScoredDemo) -> None:
    changed = {"truth": "coco_stuff"}
    first = dataclasses.replace(scored_demo.evaluations["maskclip"], method="tagclip", **changed)  # type: ignore[arg-type]
    second = dataclasses.replace(scored_demo.evaluations["clipbase"], method="gem", **changed)  # type: ignore[arg-type]
    third = dataclasses.replace(scored_demo.evaluations["coarser"], method="clip_surgery", **changed)  # type: ignore[arg-type]
    comparison = compare_evaluations([first, second, third], resamples=5)
    text = words(evaluation_page(first, scored_demo.truth, comparison=comparison, classes=0))
    assert "quoted from the ITACLIP paper (reproduction)" in text
    assert "CLIP Surgery CLIP ViT-B/16 21.9" in text
    for method in ("tagclip", "gem", "clip_surgery"):
        assert f"{method}, measured demo" in text


def test_images_inside_a_tar_in_a_bucket_are_found(scored_demo: ScoredDemo, s3: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "scenes.tar", "w") as tar:
        for name in ("00004", "00005"):
            tar.add(scored_demo.folder / f"images/{name}.jpg", f"{name}.jpg")
    fs, bucket = fsspec.core.url_to_fs(s3)
    fs.put(str(tmp_path / "scenes.tar"), f"{bucket}/scenes.tar")
    fs.put(str(scored_demo.labels), f"{bucket}/labels", recursive=True)
    job = {"input": f"{s3}/scenes.tar", "run": f"{s3}/run", "classes": list(CLASSES), "clip": "demo", "engine": "local"}
    run_job(JobSpec.build(job, source="test"))
    truth = open_folder_truth(f"{s3}/labels", list(CLASSES))
    found = evaluate_run(f"{s3}/run", truth, engine="local")
    shown = pictures(evaluation_page(found, truth, classes=2))
    for name in ("00004", "00005"):
        with Image.open(scored_demo.folder / f"images/{name}.jpg") as photo:
            assert np.abs(np.asarray(photo).astype(int) - shown[f"image {name}"]).mean() < 10
