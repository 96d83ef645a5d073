"""The job files that label and score in one go, run as a user runs them, on data sets of two images."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
import yaml

from ovss_ray import open_run
from ovss_ray.errors import SettingError
from ovss_ray.evaluation.ground_truth import BENCHMARKS
from ovss_ray.evaluation.job import open_truth
from ovss_ray.run.job import images_of
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import load_vocabulary
from tests.evaluation.benchmark_trees import HEIGHT, TREES, WIDTH, save_photo
from tests.evaluation.label_files import Labels, save_grey
from tests.processes import ovss_ray

ROOT = Path(__file__).parents[2]
CAMVID = ROOT / "../shared/data/camvid"
SMALL = ["--clip", "demo", "--templates", "single", "--engine", "local", "--set", "short_side=32", "--set", "crop=32",
         "--set", "stride=16"]  # fmt: skip


def run(job: str | Path, *flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "COLUMNS": "120", **environment}
    return ovss_ray("run", str(job), *flags, env=variables, cwd=ROOT)


def mean_iou(truths: list[Labels], labels: list[Labels]) -> float:
    """Over all pixels whose truth is not -1, of the classes that are true or predicted somewhere."""
    counted = [truth >= 0 for truth in truths]
    true = np.concatenate([truth[where] for truth, where in zip(truths, counted, strict=True)])
    predicted = np.concatenate([label[where] for label, where in zip(labels, counted, strict=True)]).astype(int)
    classes = {*true.tolist(), *predicted.tolist()}
    ious = [np.mean((predicted == c)[(true == c) | (predicted == c)] & (true == c)[(true == c) | (predicted == c)])
            for c in classes]  # fmt: skip
    return float(np.mean(ious))


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_every_benchmark_has_a_job_file_that_finds_images_and_truth(
    benchmark: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    TREES[benchmark].write(tmp_path, rng)
    monkeypatch.setenv("DATA", str(tmp_path))
    spec = JobSpec.from_file(ROOT / "jobs" / f"{benchmark}.yaml")
    assert spec.evaluate is not None
    assert (spec.evaluate.page, spec.evaluate.json_file) == (None, None)
    truth = open_truth(spec, spec.evaluate)
    assert truth.name == benchmark
    assert load_vocabulary(spec.classes).names == truth.vocabulary.names
    assert [truth.name_of(image.uri) for image in images_of(spec)] == list(truth.names())


@pytest.mark.parametrize("benchmark", ["voc21", "coco_object", "cityscapes", "ade20k"])
def test_a_job_file_labels_and_scores_the_split(benchmark: str, tmp_path: Path, rng: np.random.Generator) -> None:
    tree = TREES[benchmark]
    values = tree.write(tmp_path / "data", rng)
    scores = tmp_path / "scores.json"
    found = run(f"jobs/{benchmark}.yaml", *SMALL, DATA=str(tmp_path / "data"), RUN=str(tmp_path / "run"),
                JSON=str(scores))  # fmt: skip
    assert found.returncode == 5, found.stderr  # two images are not the split
    assert "2 of 2 images labelled" in found.stdout
    assert f"2 images of {benchmark} scored" in found.stdout
    assert "published are " in found.stdout
    assert "not the scores of the whole split: exit code 5" in found.stderr
    record = json.loads(scores.read_text())
    assert (record["protocol"], record["method"]) == (f"sclip/{benchmark}", "sclip")
    assert (record["images_evaluated"], record["problems"]) == (2, {})
    with open_run(str(tmp_path / "run")) as labelled:
        labels = [labels for _, labels in labelled.label_maps()]
    truths = [tree.truth(values[name]) for name in tree.names]
    assert record["scores"]["miou"] == pytest.approx(mean_iou(truths, labels), abs=1e-12)
    assert f"{100 * record['scores']['miou']:.2f}" in found.stdout


def test_images_truth_and_run_may_lie_in_a_bucket(s3: str, tmp_path: Path, rng: np.random.Generator) -> None:
    tree = TREES["cityscapes"]
    values = tree.write(tmp_path, rng)
    fsspec.filesystem("s3").put(f"{tmp_path}/", f"{s3}/data", recursive=True)
    flags = [*SMALL, "--engine", "ray", "--workers", "1"]
    found = run("jobs/cityscapes.yaml", *flags, DATA=f"{s3}/data", RUN=f"{s3}/run", JSON=str(tmp_path / "scores.json"))
    assert found.returncode == 5, found.stderr
    record = json.loads((tmp_path / "scores.json").read_text())
    with open_run(f"{s3}/run") as labelled:
        assert labelled.job["input"] == f"benchmark://cityscapes/val::{s3}/data"
        labels = [labels for _, labels in labelled.label_maps()]
    truths = [tree.truth(values[name]) for name in tree.names]
    assert record["scores"]["miou"] == pytest.approx(mean_iou(truths, labels), abs=1e-12)


def own_job(folder: Path, rng: np.random.Generator, **evaluate: Any) -> Path:
    """A job over five photos with label images of one's own; a shard holds two."""
    for name in "abcde":
        save_photo(folder / "photos" / f"{name}.jpg", rng)
        save_grey(folder / "labels" / f"{name}.png", rng.choice([1, 7, 9], (HEIGHT, WIDTH)).astype(np.uint8))
    job = {
        "input": str(folder / "photos"),
        "run": str(folder / "run"),
        "classes": ["circle", "grass"],
        "shard_size": 2,
        "evaluate": {
            "ground_truth": str(folder / "labels"),
            "id_map": {1: "circle", 7: "grass", 9: "ignore"},
            "page": str(folder / "scores.html"),
            "json": str(folder / "scores.json"),
            **evaluate,
        },
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder / "job.yaml"


def test_the_same_command_continues_both(tmp_path: Path, rng: np.random.Generator) -> None:
    job = own_job(tmp_path, rng)
    first = run(job, *SMALL)
    assert first.returncode == 0, first.stderr
    assert "5 images of labels scored" in first.stdout
    assert (tmp_path / "scores.html").read_text().startswith("<!")
    scores = json.loads((tmp_path / "scores.json").read_text())
    files = {path: path.stat().st_mtime_ns for path in tmp_path.glob("run/**/*.parquet")}

    # As it is after a kill while shard 1 was labelled, and another one scored.
    lost = [tmp_path / "run/shards/00000001.parquet", *tmp_path.glob("run/evaluation/*/0000000[12].parquet")]
    assert len(lost) == 3
    for path in lost:
        path.unlink()
    # Scores are no part of what a run is: another look at the same labels is no other run.
    again = run(own_job(tmp_path, np.random.default_rng(0), seen=["grass"]), *SMALL)
    assert again.returncode == 0, again.stderr
    assert "mIoU, unseen" in again.stdout
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["fingerprint"] == scores["fingerprint"]
    assert record["scores"]["classes"] == scores["scores"]["classes"]
    kept = [path for path in files if path not in lost and path.name != "text.parquet"]
    assert all(path.stat().st_mtime_ns == files[path] for path in kept)
    assert all(path.exists() for path in lost)


def test_a_look_at_part_of_it_says_that_it_is_one(tmp_path: Path, rng: np.random.Generator) -> None:
    found = run(own_job(tmp_path, rng), *SMALL, "--limit", "2")
    assert found.returncode == 5
    assert "warning: 3 images of the ground truth are not scored, such as c d e" in found.stdout


@pytest.mark.parametrize(
    ("evaluate", "code", "said"),
    [
        ({"ground_truth": "nowhere"}, 3, "there is no folder nowhere"),
        ({"classes": ["cat", "dog", "cow"], "id_map": None}, 2, "the run has no class of the ground truth"),
        ({"id_map": {1: "circel"}}, 2, "'circel' is neither one of the classes"),
        ({"seen": "cat"}, 2, "seen: custom has no class 'cat'"),
    ],
)
def test_what_cannot_be_scored_is_said_before_anything_is_labelled(
    evaluate: dict[str, Any], code: int, said: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    found = run(own_job(tmp_path, rng, **evaluate), *SMALL)
    assert (found.returncode, found.stdout) == (code, "")
    assert said in found.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("evaluate", "said"),
    [
        ("voc21", "test: evaluate must hold 'field: value' lines"),
        ({"benchmark": "voc21", "rot": "x"}, "test: evaluate: unknown setting 'rot'; did you mean 'root'"),
        ({"benchmark": "voc21"}, "test: evaluate: benchmark and root belong together"),
        ({"ground_truth": "x", "root": "y"}, "test: evaluate: benchmark and root belong together"),
        ({}, "test: evaluate: name the ground truth: either benchmark and root, or ground_truth"),
        ({"benchmark": "voc21", "root": "x", "ground_truth": "y"}, "test: evaluate: name the ground truth: either"),
        ({"benchmark": "voc21", "root": "x", "id_map": "y"}, "test: evaluate: id_map is not for a benchmark"),
        ({"ground_truth": "x", "split": "train"}, "test: evaluate: split is for a benchmark; leave it out"),
        ({"ground_truth": "x"}, "test: setting 'input' is missing"),
        ({"ground_truth": "x", "boundary": "perhaps"}, "test: evaluate: boundary = 'perhaps': should be a valid bool"),
    ],
)
def test_a_wrong_evaluate_gets_one_sentence(evaluate: Any, said: str) -> None:
    with pytest.raises(SettingError, match=said) as caught:
        JobSpec.build({"run": "out", "classes": "cat", "evaluate": evaluate}, source="test")
    assert "\n" not in str(caught.value)


def test_images_may_be_named_beside_the_benchmark() -> None:
    values = {"run": "out", "classes": "voc21", "evaluate": {"benchmark": "voc21", "root": "data", "json": "x.json"}}
    spec = JobSpec.build(values, source="test")
    assert spec.input == "benchmark://voc21/val::data"
    assert JobSpec.build(spec.model_dump(mode="json"), source="run.json") == spec
    assert JobSpec.build({**values, "input": "s3://bucket/voc"}, source="test").input == "s3://bucket/voc"


@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs CamVid")
def test_camvid_is_labelled_and_scored(tmp_path: Path) -> None:
    data = tmp_path / "CamVid"
    for folder in ("val", "valannot"):
        (data / folder).mkdir(parents=True)
        for path in sorted((CAMVID / folder).iterdir())[:2]:
            shutil.copy(path, data / folder)
    found = run("jobs/camvid.yaml", *SMALL, DATA=str(data), RUN=str(tmp_path / "run"), PAGE=str(tmp_path / "page.html"))
    assert found.returncode == 0, found.stderr
    assert "2 images of valannot scored" in found.stdout
    assert "Bicyclist" in (tmp_path / "page.html").read_text()
