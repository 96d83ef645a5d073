"""Estimates of real jobs: what they find, what they refuse, and that they leave nothing behind."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray

from ovss_ray.errors import InputError, RunFailedError, SettingError
from ovss_ray.estimate import estimate as estimate_module
from ovss_ray.estimate.estimate import estimate_job
from ovss_ray.estimate.explaining import advise, caveats, describe, estimate_text
from ovss_ray.images.stores import open_store
from ovss_ray.run import worker as worker_module
from ovss_ray.run.driver import run_job
from ovss_ray.spec import JobSpec
from tests.processes import ovss_ray
from tests.run.conftest import CLIP, draw_photos
from tests.run.faulty import METHOD, draw_fault

MakeSpec = Callable[..., JobSpec]
STAGES = ["fetch", "decode", "segment", "encode", "write"]


@pytest.fixture(scope="module")
def embedded_ray() -> Iterator[None]:
    """An estimate uses a Ray that is already there."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_an_estimate_in_this_process(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(run=str(tmp_path / "not/yet/there"), batch_size=2, cpus_per_worker=1)
    estimate = estimate_job(spec, sample_images=12, cpu_price=0.5, cpus=4)
    assert (estimate.images, estimate.images_listed, estimate.sample_images, estimate.sample_parts) == (40, 40, 12, 4)
    assert (estimate.failures, estimate.failed_fraction, estimate.device) == ([], 0.0, "cpu")
    ahead = estimate.forecast
    assert [stage.stage for stage in ahead.stages] == STAGES
    assert all(stage.images_per_s is not None and stage.images_per_s > 0 for stage in ahead.stages)
    assert estimate.binding_stage == "segment"  # random files of 3 KB are read and written in no time
    assert ahead.start_up_s > 0
    assert ahead.images_per_s.low is not None
    assert ahead.images_per_s.low <= ahead.images_per_s.value
    assert (ahead.workers, ahead.shards, ahead.shard_size) == (4, 5, 8)
    assert (estimate.stopped_early, estimate.listing, estimate.sample_asked) == (False, "whole", 12)
    assert ahead.price is not None
    assert ahead.price.value == pytest.approx(0.5 * 4 * ahead.hours.value)
    assert everything_in(tmp_path) == []


def test_the_output_is_as_large_as_that_of_the_run(make_spec: MakeSpec) -> None:
    spec = make_spec(shard_size=10)
    estimate = estimate_job(spec, sample_images=40)
    run_job(spec)
    shards = [path.stat().st_size for path in Path(spec.run, "shards").iterdir()]
    assert estimate.forecast.output_bytes == pytest.approx(sum(shards), rel=0.05)
    assert estimate.forecast.shard_bytes == pytest.approx(sum(shards) / len(shards), rel=0.05)
    assert (estimate.forecast.shards, estimate.images) == (len(shards), 40)


def test_an_estimate_leaves_a_run_as_it_is(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(limit=8)
    run_job(spec)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert estimate_job(spec, sample_images=4).images == 8
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_an_estimate_with_one_actor_on_ray(make_spec: MakeSpec, tmp_path: Path, embedded_ray: None) -> None:
    spec = make_spec(engine="ray", workers=2, batch_size=2)
    estimate = estimate_job(spec, sample_images=12)
    assert (estimate.sample_images, estimate.forecast.workers) == (12, 2)
    threads = {stage.stage: stage.threads for stage in estimate.forecast.stages}
    assert threads == {"fetch": 32, "decode": 1, "segment": 1, "encode": 1, "write": 1}  # half of two cores
    assert everything_in(tmp_path) == []
    assert ray.is_initialized()


def test_images_and_run_in_s3(make_spec: MakeSpec, photos: Path, s3: str) -> None:
    fs, root = open_store(s3)
    fs.put(f"{photos}/", f"{root}/photos", recursive=True)
    before = sorted(fs.find(root))
    estimate = estimate_job(make_spec(input=f"{s3}/photos", run=f"{s3}/runs/first", batch_size=2), sample_images=8)
    assert (estimate.images, estimate.sample_images) == (40, 8)
    assert estimate.input_bytes == sum(path.stat().st_size for path in photos.rglob("*.jpg"))
    fs.invalidate_cache()
    assert sorted(fs.find(root)) == before


def test_images_inside_a_tar(make_spec: MakeSpec, photos: Path, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "photos.tar", "w") as tar:
        tar.add(photos, "photos")
    estimate = estimate_job(make_spec(input=str(tmp_path / "photos.tar"), batch_size=2), sample_images=8)
    assert (estimate.images, estimate.sample_images, estimate.failures) == (40, 8, [])


def test_a_known_number_of_images_spares_the_listing(make_spec: MakeSpec, photos: Path, tmp_path: Path) -> None:
    names = sorted(str(path) for path in photos.rglob("*.jpg"))
    source = tmp_path / "list.txt"
    source.write_text("\n".join(names * 10))
    spec = make_spec(input=str(source), shard_size="auto", batch_size=1)
    estimate = estimate_job(spec, sample_images=2, images=1_000_000)
    assert (estimate.images, estimate.images_listed) == (1_000_000, 200)
    assert (estimate.forecast.shard_size, estimate.forecast.shards) == (1024, 977)
    assert "the sample is from the first 200 images of the listing" in caveats(estimate, spec)
    shorter = estimate_job(spec.model_copy(update={"limit": 30}), sample_images=2, images=1_000_000)
    assert (shorter.images, shorter.images_listed) == (1_000_000, 30)


def test_failures_are_counted_by_reason(make_spec: MakeSpec, tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos", 6)
    for number in range(3):
        (photos / f"broken{number}.jpg").write_bytes(b"\xff\xd8\xff broken")
    spec = make_spec(input=str(photos), batch_size=2)
    estimate = estimate_job(spec, sample_images=9)
    assert [(failure["status"], failure["images"]) for failure in estimate.failures] == [("corrupt", 3)]
    assert estimate.failed_fraction == pytest.approx(1 / 3)
    assert "33% of the sample failed: the run would stop at max_failed_fraction = 0.2" in caveats(estimate, spec)


def test_a_sample_that_cannot_be_read_is_refused_with_its_reasons(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("\n".join(f"{tmp_path}/{number}.jpg" for number in range(5)))
    with pytest.raises(InputError, match=r"none of the 5 images of the sample could be labelled \(5 not_found: "):
        estimate_job(make_spec(input=str(tmp_path / "list.txt")))
    assert everything_in(tmp_path) == ["list.txt"]


def test_a_method_that_always_fails_is_refused(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    real = worker_module.load_segmenter

    class Broken:
        def __init__(self, segmenter: object) -> None:
            self._segmenter = segmenter

        def __getattr__(self, name: str) -> object:
            return getattr(self._segmenter, name)

        def segment(self, *_: object, **__: object) -> object:
            raise RuntimeError("no kernel for this device")

    monkeypatch.setattr(worker_module, "load_segmenter", lambda *a, **k: Broken(real(*a, **k)))
    with pytest.raises(RunFailedError, match="none of the 4 images .* RuntimeError: no kernel for this device"):
        estimate_job(make_spec(), sample_images=4)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("kill", "the worker failed while it labelled the sample: .*try another --sample-images"),
        ("hang", r"took over \d+ s \(hang\); .*try another --sample-images"),
    ],
)
def test_a_worker_that_is_lost_ends_the_estimate(
    make_spec: MakeSpec, tmp_path: Path, embedded_ray: None, fault: str, said: str
) -> None:
    photos = draw_photos(tmp_path / "photos", 4)
    draw_fault(photos / "0000", fault)
    before = everything_in(tmp_path)
    limit_s = 1 if fault == "hang" else 60  # a batch may take its time on a busy machine
    spec = make_spec(input=str(photos), method=METHOD, engine="ray", cpus_per_worker=1, batch_timeout_s=limit_s)
    with pytest.raises(RunFailedError, match=f"(?s){said}"):
        estimate_job(spec)
    assert everything_in(tmp_path) == before


def test_an_empty_input_is_refused(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no image found"):
        estimate_job(make_spec(input=str(tmp_path / "empty")))
    assert everything_in(tmp_path) == ["empty"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"sample_images": 0}, "sample_images is 0; give a number of at least 1"),
        ({"images": 0}, "images is 0; give a number of at least 1"),
        ({"gpus": 0}, "gpus is 0; give a number above 0"),
        ({"gpu_price": -1.0}, "gpu_price is -1; give a number of at least 0"),
        ({"cpu_price": math.nan}, "cpu_price is nan"),
        ({"cpus": math.inf}, "cpus is inf"),
        ({"max_minutes": 0}, "max_minutes is 0; give a number above 0"),
        ({"gpus": 8, "gpu_price": 2.5}, "gpus is given, but there is no GPU here"),
        ({"gpu_price": 2.5}, "gpu_price is given, but there is no GPU here, .* say cpus and cpu_price"),
    ],
)
def test_wrong_numbers_are_refused(make_spec: MakeSpec, tmp_path: Path, wrong: dict[str, int], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        estimate_job(make_spec(), **wrong)  # type: ignore[arg-type]
    assert everything_in(tmp_path) == []


def test_a_few_images_stand_for_the_whole_job(make_spec: MakeSpec, tmp_path: Path) -> None:
    source = draw_photos(tmp_path / "photos", 5)
    spec = make_spec(input=str(source), shard_size="auto")
    few = estimate_job(spec, images=10_000_000, cpus=64, cpu_price=0.04)
    assert (few.images, few.images_listed, few.sample_images, few.sample_parts) == (10_000_000, 5, 5, 2)
    ahead = few.forecast
    assert ahead.output_bytes > 10_000_000 * 100
    assert ahead.price is not None
    assert ahead.price.value == pytest.approx(64 * 0.04 * ahead.hours.value)
    assert ahead.price.high is not None  # two parts say little, and the interval says that
    assert ahead.price.high > 1.2 * ahead.price.value
    rows = dict(describe(few))
    assert rows["images"] == f"10,000,000 (--images); 5 of them listed in {source}"
    assert rows["sample"].startswith("5 of 128 images in ")
    notes = caveats(few, spec)
    assert any("the input has 5 images; all else is scaled up to the 10,000,000 of --images" in note for note in notes)
    assert any("has fewer images (5) than --sample-images (128), so intervals are wide" in note for note in notes)


@pytest.fixture
def slow_segmenter(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Is fast for 48 images, and then takes a second for each call; the list grows by the images of every call."""
    real, seen = worker_module.load_segmenter, []

    class Slow:
        def __init__(self, segmenter: Any) -> None:
            self._segmenter = segmenter

        def __getattr__(self, name: str) -> object:
            return getattr(self._segmenter, name)

        def segment(self, images: list[Any], *arguments: Any, **how: Any) -> object:
            time.sleep(1.0 if sum(seen) > 48 else 0.0)
            seen.append(len(images))
            return self._segmenter.segment(images, *arguments, **how)

    monkeypatch.setattr(worker_module, "load_segmenter", lambda *a, **k: Slow(real(*a, **k)))
    return seen


@pytest.mark.parametrize("parts_done", [True, False])
def test_when_the_time_is_over_what_was_done_is_told(
    make_spec: MakeSpec, tmp_path: Path, slow_segmenter: list[int], parts_done: bool
) -> None:
    # Parts of 8 images, some of which are done in time, or of 40, of which only the first few are.
    source = draw_photos(tmp_path / "photos", 400)
    spec = make_spec(input=str(source), batch_size=1 if parts_done else 4, templates="single")
    asked = 64 if parts_done else 320
    estimate = estimate_job(spec, sample_images=asked, max_minutes=0.15)
    assert estimate.stopped_early
    assert 0 < estimate.sample_images < asked
    assert estimate.failures == []
    assert estimate.forecast.images_per_s.value > 0
    (note,) = (note for note in caveats(estimate, spec) if "stopped" in note)
    assert note.startswith("stopped at --max-minutes 0.15")
    assert f"with {estimate.sample_images} of {asked} images of the sample labelled: intervals are wider" in note
    assert estimate.forecast.output_bytes > 0
    calls = len(slow_segmenter)
    time.sleep(0.5)
    assert len(slow_segmenter) == calls  # nobody goes on in the background
    assert everything_in(tmp_path) == everything_in(source.parent)
    assert not list(tmp_path.glob(".ovss-ray-estimate-*"))


def test_too_little_time_is_said(make_spec: MakeSpec, tmp_path: Path, slow_segmenter: list[int]) -> None:
    with pytest.raises(RunFailedError, match="give a larger --max-minutes"):
        estimate_job(make_spec(), max_minutes=0.0001)
    assert everything_in(tmp_path) == []


def test_a_listing_that_takes_too_long_is_cut(make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "LISTING_SHARE", 0.0)
    spec = make_spec()
    estimate = estimate_job(spec, sample_images=4)
    assert (estimate.listing, estimate.images) == ("cut", 1)
    assert dict(describe(estimate))["images"].startswith("at least 1 in ")
    assert any("there are more, say with --images how many" in note for note in caveats(estimate, spec))
    assert estimate_job(spec, sample_images=4, images=1000).images == 1000


def test_an_estimate_in_words(make_spec: MakeSpec, photos: Path) -> None:
    spec = make_spec(batch_size=2, cpus_per_worker=2)
    estimate = estimate_job(spec, sample_images=8, cpus=6, cpu_price=2.5)
    rows = dict(describe(estimate))
    names = ["images", "sample", "start-up", "one worker", "3 workers", "CPU core hours", "price", "output", "shards"]
    assert list(rows) == names
    assert rows["images"] == f"40 in {photos}"
    assert re.fullmatch(
        r"8 images in \d+ s all told, spread over the whole listing by a hash, on cpu in float32, none failed; "
        "warm-up not counted",
        rows["sample"],
    )
    assert rows["3 workers"].endswith(", on 6 CPU cores")
    assert rows["price"].endswith(", at 2.5 a CPU core hour")
    assert rows["shards"].startswith("5 of 8 images: ")
    assert advise(estimate, spec).startswith("Bound by segment. What would help: a GPU")
    text = estimate_text(estimate, spec)
    assert "In brackets: 95 % intervals, from the spread between 4 parts of the sample." in text
    notes = caveats(estimate, spec)
    assert notes[-1].startswith("not knowable from a sample: throttling")
    assert not any("idle" in note or "cpus_per_worker" in note for note in notes)
    idle = replace(estimate, forecast=replace(estimate.forecast, cpus=7.0, idle_cpus=1.0))
    assert "1 of 7 CPU cores are paid for and idle: one worker takes 2" in caveats(idle, spec)
    scarce = replace(estimate, forecast=replace(estimate.forecast, workers=1, cpus=1.0, scarce_cpus=2))
    assert any("cpus 1 is less than the 2 cores of the worker that was timed" in note for note in caveats(scarce, spec))


def test_the_command_says_the_same_as_text_and_as_json(photos: Path, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        f"input: {photos}\nrun: {tmp_path}/run\nclasses: [cat, dog]\nclip: {CLIP}\nengine: local\ntemplates: single\n"
        "batch_size: 2\n"
    )
    result = ovss_ray("estimate", "--job", str(job), "--sample-images", "8", "--cpus", "8", "--json")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert (found["images"], found["sample_images"], found["failures"]) == (40, 8, [])
    assert [stage["stage"] for stage in found["forecast"]["stages"]] == STAGES
    assert found["forecast"]["images_per_s"]["low"] <= found["forecast"]["images_per_s"]["value"]
    assert (found["forecast"]["cpus"], found["forecast"]["gpu_hours"], found["forecast"]["price"]) == (8, None, None)
    assert found["notes"]

    flags = ["--classes", "cat", "--clip", CLIP, "--engine", "local", "--templates", "single", "--batch-size", "2"]
    result = ovss_ray("estimate", str(photos), *flags, "--sample-images", "8", "--cpu-price", "2.5")
    assert result.returncode == 0, result.stderr
    for said in (f"40 in {photos}", "price", "images/s", "\nfetch ", "\nput ", "Bound by segment", "Note: "):
        assert said in result.stdout
    assert everything_in(tmp_path) == ["job.yaml"]


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        ([], 2, "INPUT is missing"),
        (["{folder}", "--gpu-price", "cheap"], 2, "--gpu-price"),
        (["{folder}", "--cpu-price", "-0.1"], 2, "--cpu-price is -0.1; give a number of at least 0"),
        (["{folder}", "--images", "ten"], 2, "--images"),
        (["{folder}/list.txt"], 3, "none of the 1 images of the sample could be labelled (1 not_found"),
    ],
)
def test_errors_are_one_sentence_with_a_documented_exit_code(
    tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    (tmp_path / "list.txt").write_text(f"{tmp_path}/missing.jpg\n")
    filled = [text.format(folder=tmp_path) for text in arguments]
    result = ovss_ray("estimate", *filled, "--classes", "cat", "--clip", CLIP, "--engine", "local")
    assert result.returncode == code, result.stderr
    assert said.format(folder=tmp_path) in result.stderr
    assert "Traceback" not in result.stderr
    assert everything_in(tmp_path) == ["list.txt"]


def test_sigterm_leaves_nothing_behind(tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos", 200)
    (tmp_path / "runs").mkdir()
    arguments = [str(photos), "--run", f"{tmp_path}/runs/x", "--classes", "cat,dog", "--templates", "single"]
    command = [sys.executable, "-m", "ovss_ray", "estimate", *arguments, "--clip", CLIP, "--engine", "local"]
    process = subprocess.Popen([*command, "--sample-images", "150"], stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "runs").glob(".ovss-ray-estimate-*/shards/*.parquet")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM; nothing of an estimate is kept" in said
    assert everything_in(tmp_path / "runs") == []
