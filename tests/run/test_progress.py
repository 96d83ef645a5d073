"""What is shown while a run goes on."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.driver import run_job
from ovss_ray.run.heartbeat import Heartbeat, read_beats
from ovss_ray.run.progress import LogReporter, Progress, SilentReporter, TerminalReporter, duration
from ovss_ray.run.stats import WorkerProgress
from ovss_ray.spec import JobSpec


def test_images_of_unfinished_shards_count_once() -> None:
    progress = Progress(images=100, images_before=20, shards=10)
    progress.observe({"a": WorkerProgress({"ok": 7}, {}, {}), "b": WorkerProgress({"ok": 2, "corrupt": 1}, {})})
    assert progress.images_now == 10
    progress.shard_done("a", Counter(ok=10), {})
    assert progress.images_now == 13  # a's shard is known to be whole; its own count is older
    progress.observe({"a": WorkerProgress({"ok": 12}, {}, {}), "b": WorkerProgress({"ok": 2, "corrupt": 1}, {})})
    assert progress.images_now == 15
    progress.observe({"a": WorkerProgress({"ok": 12}, {}, {})})
    assert progress.images_now == 12  # b is gone, and its unfinished shard with it
    assert progress.failures == 0


def test_images_that_had_failed_before_are_told_from_others() -> None:
    reason = ("corrupt", "cut off")
    progress = Progress(images=100, images_before=0, shards=10)
    progress.retrying("b")
    progress.shard_done("a", {"ok": 8, "corrupt": 2}, {reason: 2})
    progress.shard_done("b", {"ok": 1, "corrupt": 9}, {reason: 9}, retried=True)
    progress.observe(
        {
            "a": WorkerProgress({"ok": 10, "corrupt": 5}, {reason: 5}),
            "b": WorkerProgress({"ok": 1, "corrupt": 12}, {reason: 12}),
        }
    )
    assert progress.first_attempts() == (15, {reason: 5})
    assert progress.failures == 17


def test_the_rate_leaves_start_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("ovss_ray.run.progress.time.monotonic", lambda: now)
    progress = Progress(images=100, images_before=0, shards=10)
    assert progress.remaining_s is None
    now += 60.0  # loading the model
    progress.observe({"a": WorkerProgress({"ok": 6}, {}, {})})
    assert progress.images_per_s == pytest.approx(6 / 60)  # nothing better is known yet
    assert progress.remaining_s is None
    now += 10.0
    progress.observe({"a": WorkerProgress({"ok": 46}, {}, {})})
    assert progress.images_per_s == pytest.approx(4.0)
    assert progress.remaining_s == pytest.approx(54 / 4)


def test_of_two_drivers_each_tells_its_own_rate_and_both_the_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr("ovss_ray.run.progress.time.monotonic", lambda: now)
    drivers = [Progress(images=12_000, images_before=0, shards=120) for _ in range(2)]
    for _ in range(50):
        now += 10.0
        for progress in drivers:
            progress.shard_done("a", {"ok": 100}, {})
            progress.shard_done("a", {"ok": 100}, {}, labelled=False)  # the other one has written it
            progress.observe({})
    for progress in drivers:
        assert (progress.images_now, progress.images_labelled) == (10_000, 5_000)
        assert progress.images_per_s == pytest.approx(10.0, rel=0.05)
        assert progress.remaining_s == pytest.approx(2_000 / 20, rel=0.01)
    monkeypatch.undo()
    directory = RunDirectory(str(tmp_path / "run"))
    directory.prepare()
    with Heartbeat(directory, "loading") as heart:
        heart.finished(drivers[0])
    (beat,) = read_beats(directory)
    assert beat.images_per_s == pytest.approx(10.0, rel=0.01)


def test_after_continuing_the_time_left_is_told_from_this_session_and_of_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("ovss_ray.run.progress.time.monotonic", lambda: now)
    progress = Progress(images=100_000, images_before=90_000, shards=10)
    for done in [*range(100, 1100, 100), *range(1120, 5000, 20)]:  # 10 images/s, then 2
        now += 10.0
        progress.observe({"a": WorkerProgress({"ok": done}, {}, {})})
    assert progress.images_per_s > 2.4
    assert progress.remaining_s == pytest.approx(5020 / 2, rel=0.05)
    assert "2.0 images/s" in progress.line()


def test_before_the_first_image_it_says_what_workers_do(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress(images=100, images_before=0, shards=10)
    assert progress.line() == "0 of 100 images, loading the model"
    progress.observe({"a": WorkerProgress(), "b": WorkerProgress(texts=(2560, 67_760))})
    assert progress.line() == "0 of 100 images, encoding the vocabulary: 2,560 of 67,760 texts"
    screen = io.StringIO()
    reporter = TerminalReporter(Console(file=screen, force_terminal=True, width=150))
    with reporter.showing(progress):
        reporter.update(progress)
    assert "encoding the vocabulary" in screen.getvalue()
    assert "2560/67760" in screen.getvalue()
    progress.observe({"a": WorkerProgress({"ok": 1})})
    assert progress.beginning is None
    with caplog.at_level(logging.INFO, logger="ovss_ray"), LogReporter().doing("starting Ray"):
        pass
    assert "starting Ray" in caplog.text


@pytest.mark.parametrize(
    ("seconds", "stage"),
    [
        ({"segment": 9.0, "wait_for_images": 1.0, "fetch": 50.0}, "segment"),
        ({"segment": 1.0, "wait_for_images": 9.0, "fetch": 50.0, "decode": 3.0}, "fetch"),
        ({"segment": 1.0, "wait_for_images": 9.0, "fetch": 5.0, "decode": 30.0}, "decode"),
        ({"segment": 1.0, "wait_for_images": 2.0, "wait_for_encode": 9.0}, "encode"),
        ({}, None),
    ],
)
def test_the_stage_that_the_others_wait_for_is_named(seconds: dict[str, float], stage: str | None) -> None:
    progress = Progress(images=10, images_before=0, shards=1)
    progress.observe({"a": WorkerProgress({"ok": 1}, {}, seconds)})
    assert progress.binding_stage == stage


def test_seconds_of_workers_that_are_gone_stay_counted() -> None:
    progress = Progress(images=10, images_before=0, shards=1)
    progress.observe({"a": WorkerProgress({}, {}, {"segment": 3.0}), "b": WorkerProgress({}, {"segment": 1.0})})
    progress.observe({"b": WorkerProgress({}, {}, {"segment": 2.0})})
    assert progress.stage_seconds == {"segment": 5.0}


def test_without_a_terminal_a_log_line_appears_now_and_then(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ovss_ray.run.progress.LOG_EVERY_S", 0.0)
    progress = Progress(images=100, images_before=20, shards=10)
    progress.observe({"a": WorkerProgress({"ok": 10}, {}, {"segment": 1.0})})
    with caplog.at_level(logging.INFO, logger="ovss_ray"):
        LogReporter().update(progress)
    assert "30 of 100 images" in caplog.text
    assert "0 failed, bound by segment" in caplog.text


def test_the_terminal_shows_rate_failures_and_stage() -> None:
    screen = io.StringIO()
    reporter = TerminalReporter(Console(file=screen, force_terminal=True, width=150))
    progress = Progress(images=100, images_before=0, shards=10)
    with reporter.showing(progress):
        progress.observe({"a": WorkerProgress({"ok": 9, "corrupt": 1}, {}, {"segment": 1.0})})
        progress.shard_done("a", Counter(ok=9, corrupt=1), {("corrupt", "truncated"): 1})
        reporter.update(progress)
    text = screen.getvalue()
    assert "10/100" in text
    assert "1 failed" in text
    assert "bound by segment" in text


class Watching(SilentReporter):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.texts: list[tuple[int, int]] = []

    def message(self, text: str) -> None:
        self.told.append(text)

    def update(self, progress: Progress) -> None:
        self.texts.append(progress.texts)


def test_a_run_says_first_what_will_run_and_how_far_the_encoding_of_its_vocabulary_is(
    make_spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ovss_ray.run.driver.POLL_S", 0.01)
    monkeypatch.setattr("ovss_ray.run.pool.ASK_EVERY_S", 0.0)
    monkeypatch.setattr("ovss_ray.models.text._TEXTS_PER_PASS", 32)
    spec = make_spec(classes=[f"thing {number}" for number in range(30)], templates="imagenet_80", limit=8)
    watching = Watching()
    run_job(spec, reporter=watching)
    first, classes, ahead, *_ = watching.told
    assert first.startswith(f"Labelling {spec.input} with maskclip (ovss-demo/random); classes: thing 0, thing 1, ")
    assert first.endswith(f"...; run directory: {spec.run}")
    assert classes.startswith("30 classes (custom): thing 0, ")
    assert ahead == "8 images in 1 shard, 1 CPU worker"
    counts = [done for done, total in watching.texts if total]
    assert {total for _, total in watching.texts} == {0, 30 * 80}
    assert counts == sorted(counts)
    assert any(0 < done < 30 * 80 for done in counts)


def test_the_first_line_comes_before_anything_that_takes_its_time(tmp_path: Path) -> None:
    """What is heavy to import, weights, input and run directory are not looked at before it."""
    code = f"""
import sys
from ovss_ray.run.driver import run_job
from ovss_ray.run.progress import SilentReporter
from ovss_ray.spec import JobSpec
class Stop(SilentReporter):
    def message(self, text):
        print(text, sorted({{"torch", "ray", "open_clip"}} & set(sys.modules)))
        sys.exit(0)
values = {{"input": "s3://nowhere/photos", "run": "{tmp_path}/run", "classes": "cat", "clip": "no/weights"}}
run_job(JobSpec.build(values, source="test"), reporter=Stop())
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.endswith(" []\n"), result.stderr
    assert result.stdout.startswith(
        "Labelling s3://nowhere/photos with maskclip (no/weights); classes: cat; run directory"
    )


def test_counting_passes_everything_on() -> None:
    reporter = TerminalReporter(Console(file=io.StringIO()))
    assert list(reporter.counting(range(2500))) == list(range(2500))
    assert list(LogReporter().counting(range(5))) == list(range(5))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (273600, "3 d 4 h")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
