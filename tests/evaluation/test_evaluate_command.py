"""`ovss-ray evaluate` as a user meets it: what it prints, its exit codes, killed and given again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from ovss_ray.demo.scenes import CLASSES
from ovss_ray.demo.tour import Tour, take_tour
from ovss_ray.evaluation.evaluate import evaluate_run
from ovss_ray.evaluation.ground_truth import open_folder_truth
from ovss_ray.images.stores import open_store
from tests.evaluation.tiny_runs import NAMES, TinyRun, draw_labels, scored_run, write_truth
from tests.processes import heed_interrupts, kill_tree, ovss_ray

ENVIRONMENT = {**os.environ, "COLUMNS": "120"}


def evaluate(*arguments: str) -> subprocess.CompletedProcess[str]:
    return ovss_ray("evaluate", *arguments, env={**ENVIRONMENT, **os.environ})


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Tour:
    return take_tour(tmp_path_factory.mktemp("tour"), scenes=3, seed=11, engine="local")


@pytest.fixture(scope="module")
def demo(tour: Tour) -> list[str]:
    """The command's arguments for the demo."""
    truth = ["--ground-truth", str(tour.images.parent / "labels"), "--classes", ",".join(CLASSES)]
    return [str(tour.run), *truth, "--engine", "local"]


def test_the_demo_is_scored_as_its_tour_says(tour: Tour, demo: list[str], tmp_path: Path) -> None:
    result = evaluate(*demo, "--json", str(tmp_path / "scores.json"), "--seen", "circle,square")
    assert result.returncode == 0, result.stderr
    lines = {line.split("  ")[0]: line for line in result.stdout.splitlines()}
    assert f"{100 * tour.miou:.2f}" in lines["mIoU"]
    assert "(95% interval " in lines["mIoU"]
    assert f"{100 * tour.pixel_accuracy:.2f}" in lines["aAcc"]
    for name in CLASSES:
        row = next(line for line in result.stdout.splitlines() if f" {name} " in line)
        iou = tour.class_iou[name]
        assert f" {100 * iou:.2f} " in row if not np.isnan(iou) else " - " in row
    assert {"mAcc", "fwIoU", "boundary IoU", "mIoU, seen", "mIoU, unseen", "hIoU"} <= lines.keys()
    assert "3 images of labels scored" in result.stdout
    record = json.loads((tmp_path / "scores.json").read_text())
    assert record["scores"]["miou"] == tour.miou
    assert {row["name"]: row["iou"] for row in record["scores"]["classes"]} == pytest.approx(
        {name: None if np.isnan(iou) else iou for name, iou in tour.class_iou.items()}
    )
    assert record["method"] == "maskclip"


def test_json_alone_goes_to_standard_output(tour: Tour, demo: list[str]) -> None:
    result = evaluate(*demo, "--no-boundary", "--json", "-")
    record = json.loads(result.stdout)
    assert (result.returncode, record["exit_code"]) == (0, 0)
    assert record["scores"]["boundary_iou"] is None


def test_a_partial_evaluation_tells_what_is_missing_and_why(tmp_path: Path) -> None:
    run, truth = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"))
    labels = [None if image_id in (0, 1, 2, 3, 5) else labels for image_id, labels in enumerate(run.labels)]
    TinyRun(run.uri, labels).write(done=(0, 1))
    write_truth(str(tmp_path / "truth"), {6: truth[6][1:]})
    arguments = [run.uri, "--ground-truth", str(tmp_path / "truth"), "--classes", ",".join(NAMES), "--engine", "local"]
    result = evaluate(*arguments)
    assert result.returncode == 5
    assert "       5  no_labels\n" in result.stdout
    shown = [line.strip() for line in result.stdout.splitlines() if "corrupt, the file ends too early" in line]
    assert [line[: len("s3://photos/a00.jpg:")] for line in shown] == [f"s3://photos/a0{i}.jpg:" for i in range(3)]
    assert "          ...\n" in result.stdout
    assert "       1  size_mismatch\n" in result.stdout
    assert "warning: 1 of 3 shards are not written yet" in result.stdout
    assert "warning: 8 images of the ground truth are not scored, such as a00 a01 a02" in result.stdout
    assert "not the scores of the whole split: exit code 5" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "name the ground truth: --benchmark NAME --root DATA, or --ground-truth DIR --classes FILE"),
        (["--benchmark", "voc21"], "name the ground truth"),
        (["--ground-truth", "x"], "--ground-truth needs --classes"),
        (["--ground-truth", "x", "--root", "y"], "--ground-truth, or --benchmark and --root, not both"),
        (["--benchmark", "voc21", "--root", "x", "--id-map", "y"], "--id-map is for --ground-truth; voc21 knows"),
        (["--benchmark", "voc12", "--root", "x"], "there is no benchmark 'voc12'"),
        (["--ground-truth", "{labels}", "--classes", "a,b", "--engine", "spark"], "spark is neither ray nor local"),
        (["--ground-truth", "{labels}", "--classes", "a,b"], "the run has no class of the ground truth"),
        (["--ground-truth", "{labels}", "--classes", "circle,b", "--seen", "cat"], "seen: custom has no class 'cat'"),
    ],
)
def test_wrong_settings_end_in_one_sentence(tour: Tour, arguments: list[str], said: str) -> None:
    labels = str(tour.images.parent / "labels")
    result = evaluate(str(tour.run), *[labels if item == "{labels}" else item for item in arguments])
    assert (result.returncode, result.stdout) == (2, "")
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_run_and_truth_may_lie_in_a_store_that_options_describe(s3: str, s3_endpoint: str, tmp_path: Path) -> None:
    run, _ = scored_run(f"{s3}/run", f"{s3}/truth")
    run.write()
    options = json.dumps({"s3": {"key": "test", "secret": "test", "endpoint_url": s3_endpoint}})
    bare = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    arguments = [run.uri, "--ground-truth", f"{s3}/truth", "--classes", ",".join(NAMES), "--engine", "local"]
    result = ovss_ray("evaluate", *arguments, "--storage-options", options, "--json", "-", env=bare)
    assert result.returncode == 0, result.stderr
    here = evaluate_run(run.uri, open_folder_truth(f"{s3}/truth", list(NAMES)), engine="local")
    assert json.loads(result.stdout)["scores"] == here.scores.record()


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_killed_and_given_again_it_goes_on(tmp_path: Path, engine: str) -> None:
    run_shards, rng = 23, np.random.default_rng(5)
    truth = {image_id: draw_labels(rng, len(NAMES)).repeat(12, 0).repeat(12, 1) for image_id in range(90)}
    write_truth(str(tmp_path / "truth"), truth)
    run = TinyRun(str(tmp_path / "run"), list(truth.values())).write()
    arguments = [run.uri, "--ground-truth", str(tmp_path / "truth"), "--classes", ",".join(NAMES), "--engine", engine]
    command = [sys.executable, "-m", "ovss_ray", "evaluate", *arguments]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    while len(before := tables(run.uri)) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    kill_tree(process.pid)
    process.wait()
    before = tables(run.uri)
    assert 3 <= len(before) < run_shards
    again = evaluate(*arguments, "--json", "-")
    assert again.returncode == 0, again.stderr
    record = json.loads(again.stdout)
    assert (record["images_evaluated"], record["scores"]["miou"]) == (90, 1.0)
    after = tables(run.uri)
    assert len(after) == run_shards
    assert {name: after[name] for name in before} == before


@pytest.mark.parametrize(
    "engine",
    [["local"], ["local", "--workers", "2"], ["ray"]],
    ids=["here", "processes", "ray"],
)
def test_ctrl_c_ends_with_the_command_that_goes_on(tmp_path: Path, engine: list[str]) -> None:
    rng = np.random.default_rng(5)
    truth = {image_id: draw_labels(rng, len(NAMES)).repeat(12, 0).repeat(12, 1) for image_id in range(90)}
    write_truth(str(tmp_path / "truth"), truth)
    run = TinyRun(str(tmp_path / "run"), list(truth.values())).write()
    arguments = [run.uri, "--ground-truth", str(tmp_path / "truth"), "--classes", ",".join(NAMES)]
    command = [sys.executable, "-m", "ovss_ray", "evaluate", *arguments, "--engine", *engine]
    process = subprocess.Popen(
        command,
        start_new_session=True,
        preexec_fn=heed_interrupts,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    while len(tables(run.uri)) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes get it
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "stopped by SIGINT; the shards that were scored are kept" in said
    assert "Continue with:" in said
    assert "Traceback" not in said


def tables(run: str) -> dict[str, int]:
    """The tables that are kept, with the time of their writing."""
    fs, root = open_store(run)
    return {path: Path(path).stat().st_mtime_ns for path in fs.glob(f"{root}/evaluation/*/*.parquet")}
