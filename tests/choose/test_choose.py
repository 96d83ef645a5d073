"""Choices on real images, in this process and on Ray: what they find, what is kept, what is refused."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovss_ray import cli
from ovss_ray.choose.assessing import SampledImage
from ovss_ray.choose.candidates import Candidate
from ovss_ray.choose.choose import Question, choose
from ovss_ray.choose.explaining import choice_record, choice_text, label_command
from ovss_ray.choose.judge import Judge
from ovss_ray.choose.records import ChoiceFolder
from ovss_ray.demo.scenes import Scene
from ovss_ray.errors import InputError, OvssError, RunMismatchError, SettingError, WeightsError
from ovss_ray.images.stores import open_store
from ovss_ray.segmenters import load_segmenter
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import load_vocabulary
from tests.choose.conftest import NAMES, TEMPLATE
from tests.processes import heed_interrupts


def spec_of(folder: Path | str, **settings: Any) -> JobSpec:
    values = {"input": str(folder), "run": "RUN", "classes": NAMES, "templates": TEMPLATE, "clip": "demo"}
    return JobSpec.build({**values, "engine": "local", **settings}, source="test")


def asked(*methods: str, **more: Any) -> Question:
    return Question(methods or ("maskclip", "clipbase:crop=0"), **more)


def sample_in(out: Path | str) -> list[SampledImage]:
    return ChoiceFolder(str(out), {}).read_sample() or []


def files_in(out: Path) -> dict[str, int]:
    """Names and times of change; a file that was written again has another."""
    return {str(path.relative_to(out)): path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}


def test_rewards_are_those_of_segmenter_and_judge(
    folder: Path, class_file: Path, scenes: list[Scene], tmp_path: Path
) -> None:
    choice = choose(spec_of(folder), asked(image_classes=str(class_file)), out=str(tmp_path / "out"))
    vocabulary = load_vocabulary(NAMES, templates=TEMPLATE)
    judge = Judge.load("demo", vocabulary, device="cpu", dtype="float32")
    classes = [tuple(int(k) for k in np.unique(scene.labels)) for scene in scenes]
    expected = {}
    for method, settings in (("maskclip", {}), ("clipbase", {"crop": 0})):
        segmenter = load_segmenter(method, clip="demo", device="cpu", **settings)
        labels = [segmenter.segment(scene.image, vocabulary).labels for scene in scenes]
        accepted = judge.accepted([judge.square(scene.image) for scene in scenes], labels, classes)
        expected[method] = sum(sum(found) for found, ids in zip(accepted, classes, strict=True) if len(ids) > 1)
    found = {choice.candidates[one.key].candidate.method: one.reward for one in choice.ranking.standings}
    assert found == expected
    assert choice.ranking.standings[0].reward == max(expected.values())
    by_name = {Path(image.row.uri).name: image.classes for image in sample_in(tmp_path / "out")}
    assert by_name == {f"{number}.png": ids for number, ids in enumerate(classes)}


def test_classes_are_taken_from_clip_without_a_file(folder: Path, scenes: list[Scene], tmp_path: Path) -> None:
    choose(spec_of(folder), asked("maskclip", class_threshold=0.01), out=str(tmp_path))
    judge = Judge.load("demo", load_vocabulary(NAMES, templates=TEMPLATE), device="cpu", dtype="float32")
    expected = judge.present([judge.square(scene.image) for scene in scenes], 0.01)
    by_name = {Path(image.row.uri).name: image.classes for image in sample_in(tmp_path)}
    assert by_name == {f"{number}.png": ids for number, ids in enumerate(expected)}


def test_a_choice_goes_on_where_it_was_and_takes_more_candidates(
    folder: Path, class_file: Path, tmp_path: Path
) -> None:
    question = asked("maskclip", image_classes=str(class_file), sample=3)
    first = choose(spec_of(folder), question, out=str(tmp_path))
    before = files_in(tmp_path)
    more = asked("clipbase", "maskclip:logit_scale=40", "maskclip", image_classes=str(class_file), sample=3)
    second = choose(spec_of(folder), more, out=str(tmp_path))
    assert len(second.candidates) == 2  # 40 is the default
    assert (first.taken_over, second.taken_over) == (0, 1)
    after = files_in(tmp_path)
    assert {name: after[name] for name in before} == before
    assert len(after) == len(before) + 1
    (one,) = first.ranking.standings
    again = next(standing for standing in second.ranking.standings if standing.key == one.key)
    assert (again.reward, again.images_per_s) == (one.reward, one.images_per_s)


@pytest.mark.parametrize(
    ("spec", "question", "field"),
    [({}, {"sample": 2}, "sample"), ({"classes": "cat,dog"}, {}, "classes"), ({}, {"class_threshold": 0.2}, "image_")],
)
def test_a_folder_of_another_choice_is_refused(
    folder: Path, tmp_path: Path, spec: dict[str, Any], question: dict[str, Any], field: str
) -> None:
    choose(spec_of(folder), asked("maskclip", sample=3, class_threshold=0.001), out=str(tmp_path))
    before = files_in(tmp_path)
    changed = {"sample": 3, "class_threshold": 0.001, **question}
    with pytest.raises(RunMismatchError, match=rf"holds another choice(.|\n)*  {field}"):
        choose(spec_of(folder, **spec), asked("maskclip", **changed), out=str(tmp_path))
    assert files_in(tmp_path) == before


def test_the_directory_of_a_run_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    with pytest.raises(RunMismatchError, match="is the directory of a run"):
        choose(spec_of(folder), asked("maskclip"), out=str(tmp_path))
    assert set(files_in(tmp_path)) == {"run.json"}


def test_images_that_cannot_be_read_are_listed(folder: Path, scenes: list[Scene], tmp_path: Path) -> None:
    for number in range(3):
        Image.fromarray(scenes[number].image).save(tmp_path / f"{number}.png")
    (tmp_path / "broken.png").write_bytes(b"\xff\xd8\xff no image")
    choice = choose(spec_of(tmp_path), asked("maskclip", class_threshold=0.001))
    assert choice.ranking.images == 3
    (reason,) = choice.ranking.unread.values()
    assert reason.startswith("corrupt: ")
    assert "could not be read, left out for all: 1 (e.g. corrupt: " in choice_text(choice, "")
    rows = ["image,classes", *(f"{name}.png,circle;square" for name in ("0", "1", "broken"))]
    (tmp_path / "classes.csv").write_text("\n".join(rows))
    given = choose(spec_of(tmp_path), asked("maskclip", image_classes=str(tmp_path / "classes.csv")))
    assert (given.ranking.images, len(given.ranking.unread)) == (2, 1)


def test_images_that_a_method_fails_on_are_listed(folder: Path, class_file: Path, scenes: list[Scene]) -> None:
    failing = sum(int(scene.image[0, 0].sum()) % 2 for scene in scenes)
    assert 0 < failing < len(scenes)
    method = "tests.choose.failing:FailsOnSome"
    choice = choose(spec_of(folder), asked(method, "maskclip", image_classes=str(class_file)))
    by_method = {choice.candidates[one.key].candidate.method: one for one in choice.ranking.standings}
    assert (by_method[method].unsegmented, by_method["maskclip"].unsegmented) == (failing, 0)
    assert by_method[method].reward < by_method["maskclip"].reward
    assert f"Images that {method} failed on, whose classes count as not accepted: {failing}." in choice_text(choice, "")


def test_search_draws_what_methods_declare(folder: Path, class_file: Path) -> None:
    question = asked("naclip", search=2, seed=4, sample=1, image_classes=str(class_file))
    choice = choose(spec_of(folder), question)
    assert 2 <= len(choice.candidates) <= 3  # a draw may be the default
    declared = type(load_segmenter("naclip", clip="demo").settings).SEARCH
    for settled in choice.candidates.values():
        for name, value in settled.candidate.settings.items():
            assert value in declared[name]


@pytest.mark.parametrize(
    ("spec", "question", "kind", "sentence"),
    [
        ({}, {"methods": ["slip"]}, SettingError, "no method 'slip'.*did you mean 'sclip'"),
        ({}, {"methods": ["sclip:sigmoid=1"]}, SettingError, "unknown setting 'sigmoid'"),
        ({}, {"methods": ["naclip:sigma=-1"]}, SettingError, "sigma = -1"),
        ({"classes": "cat,"}, {}, SettingError, "at least two"),
        ({"classes": "cat,ground", "background": "ground"}, {}, SettingError, "names 1 beside the background"),
        ({"input": "/nowhere/at/all"}, {}, InputError, "there is no /nowhere/at/all"),
        ({"clip": "ovss-demo//nowhere.pt"}, {}, WeightsError, r"nowhere\.pt"),
        ({}, {"judge": "RN50/openai"}, WeightsError, "its vision tower is a ResNet"),
        ({}, {"class_threshold": 1.0}, InputError, "two classes or more.*lower --class-threshold"),
        ({}, {"class_threshold": 0.0}, SettingError, "class_threshold is 0"),
        ({}, {"sample": 0}, SettingError, "sample is 0"),
    ],
)
def test_what_cannot_be_used_is_explained(
    folder: Path, spec: dict[str, Any], question: dict[str, Any], kind: type[OvssError], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        choose(spec_of(folder, **spec), Question(**{"methods": ["maskclip"], **question}))


@pytest.mark.parametrize(
    ("rows", "kind", "sentence"),
    [
        ("other.png,circle;square", InputError, r"names no image of .*it has for example 'other\.png'"),
        ("0.png,circle;squair", SettingError, "the class 'squair'.*did you mean 'square'"),
        ("0.png,circle\n1.png,", InputError, "two classes or more.*take a sample of images with more"),
    ],
)
def test_class_files_that_do_not_fit_are_explained(
    folder: Path, tmp_path: Path, rows: str, kind: type[OvssError], sentence: str
) -> None:
    (tmp_path / "classes.csv").write_text(f"image,classes\n{rows}\n")
    with pytest.raises(kind, match=sentence):
        choose(spec_of(folder), asked("maskclip", image_classes=str(tmp_path / "classes.csv")))


def test_no_readable_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "0.png").write_bytes(b"\xff\xd8\xff no image")
    with pytest.raises(InputError, match=r"none of the 1 images of the sample could be read \(corrupt: "):
        choose(spec_of(tmp_path), asked("maskclip"))


def test_on_ray_and_in_object_storage(folder: Path, class_file: Path, s3: str) -> None:
    """Two tasks, and files that are created once in a bucket; the rewards are those of one process."""
    fs, bucket = open_store(s3)
    fs.put(f"{folder}/", f"{bucket}/images/", recursive=True)
    question = asked(image_classes=f"{s3}/images/classes.csv")
    there = choose(spec_of(f"{s3}/images", engine="ray"), question, out=f"{s3}/choice")
    fs.invalidate_cache()
    assert len(fs.ls(f"{bucket}/choice/candidates")) == 2
    here = choose(spec_of(folder), asked(image_classes=str(class_file)))
    rewards = [{one.key: one.reward for one in choice.ranking.standings} for choice in (there, here)]
    assert rewards[0] == rewards[1]


def command(folder: Path, class_file: Path, out: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "ovss_ray", "choose", str(folder), "--classes", NAMES),
        *(
            "--templates",
            TEMPLATE,
            "--clip",
            "demo",
            "--engine",
            "local",
            "--methods",
            "maskclip,clipbase",
            "--methods",
            "sclip,naclip:sigma=2.5",
        ),
        *("--image-classes", str(class_file), "--out", str(out), *more),
    ]


def test_a_killed_process_is_continued_by_the_same_command(folder: Path, class_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "choice"
    process = subprocess.Popen(command(folder, class_file, out), stdout=subprocess.DEVNULL)
    while process.poll() is None and not list((out / "candidates").glob("*.parquet")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = files_in(out)
    kept = [name for name in before if name.startswith("candidates/")]
    assert 0 < len(kept) < 4
    result = subprocess.run(command(folder, class_file, out, "--json"), capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    after = files_in(out)
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert sum(name.startswith("candidates/") for name in after) == 4
    assert not (out / ".tmp").exists()
    record = json.loads(result.stdout)
    whole = choose(spec_of(folder), asked("maskclip,clipbase", "sclip,naclip:sigma=2.5", image_classes=str(class_file)))
    expected = choice_record(whole, "")["candidates"]
    for rows in (record["candidates"], expected):
        for row in rows:
            del row["images_per_s"]  # measured
    assert record["candidates"] == expected


def test_ctrl_c_keeps_what_is_finished(folder: Path, class_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "choice"
    process = subprocess.Popen(
        command(folder, class_file, out),
        preexec_fn=heed_interrupts,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and not list((out / "candidates").glob("*.parquet")):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finished candidates are kept" in said
    assert "Continue with:" in said


def test_the_command_prints_a_command_that_labels(folder: Path, class_file: Path, tmp_path: Path) -> None:
    choice = choose(
        spec_of(folder, background="snow"), asked("naclip:sigma=2.5:crop=0", image_classes=str(class_file), sample=2)
    )
    words = shlex.split(label_command(choice))
    assert words[:4] == ["ovss-ray", "label", str(folder), "RUN"]
    assert words[-6:] == ["--method", "naclip", "--set", "sigma=2.5", "--set", "crop=0"]
    words[3] = str(tmp_path / "run")
    result = subprocess.run(
        [sys.executable, "-m", "ovss_ray", *words[1:], "--limit", "1"], capture_output=True, text=True, timeout=240
    )
    assert result.returncode == 0, result.stderr
    job = json.loads((tmp_path / "run" / "run.json").read_text())["job"]
    assert (job["method"], job["settings"]["sigma"], job["settings"]["crop"]) == ("naclip", 2.5, 0)
    assert (job["background"], job["clip"]) == ("snow", "demo")


@pytest.mark.parametrize(
    "settings",
    [
        {"trust_weights": True, "allow_schemes": ("s3", "file"), "background": 0, "sample": 0.01, "max_pixels": "50M"},
        {"trust_weights": False, "templates": ["a {}, big.", "{} 'there'"], "keep_columns": ("a", "b"), "limit": None},
        {"classes": ["circle", '"square, x"'], "templates": "-{}", "allow_hosts": ()},
        {"classes": {"circle": ["ring", "disc, round"], "square": []}, "components": 20},
        {"protocol": "sclip/voc21"},
    ],
)
def test_the_printed_command_is_read_back_as_the_same_job(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any]
) -> None:
    values = {"input": "my photos", "run": "RUN", "method": "sclip"}
    spec = JobSpec.build(
        {**values, **({} if "protocol" in settings else {"classes": "a,b"}), **settings}, source="test"
    )
    best = SimpleNamespace(candidate=Candidate("sclip", {"crop": 0}))
    words = shlex.split(label_command(SimpleNamespace(spec=spec, best=best)))  # type: ignore[arg-type]
    read: list[JobSpec] = []
    monkeypatch.setattr(cli, "_run", lambda job, _: read.append(job))
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code in (0, None)
    (job,) = read
    assert (job.method, job.settings) == ("sclip", {"crop": 0})
    parsed_otherwise = {"classes", "templates", "background", "settings", "protocol"}
    assert job.model_dump(exclude=parsed_otherwise) == spec.model_dump(exclude=parsed_otherwise)
    one, other = (load_vocabulary(s.classes, templates=s.templates, background=s.background) for s in (job, spec))
    assert one == other


def test_the_table_and_the_words(folder: Path, class_file: Path) -> None:
    words = command(folder, class_file, Path("unused"), "--sample", "2")
    at = words.index("--out")
    result = subprocess.run(words[:at] + words[at + 2 :], capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert "mean reward" in result.stdout
    assert "best" in result.stdout
    assert f"given by {class_file}; judged by demo" in result.stdout
    assert "ovss-ray label" in result.stdout
    assert all(name in result.stdout for name in ("maskclip", "clipbase", "sclip", "naclip"))
