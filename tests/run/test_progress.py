"""What is shown while a run goes on."""

from __future__ import annotations

import io
import logging
from collections import Counter

import pytest
from rich.console import Console

from ovss_ray.run.progress import LogReporter, Progress, TerminalReporter, duration
from ovss_ray.run.stats import WorkerProgress


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


def test_the_rate_leaves_start_up_out(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("ovss_ray.run.progress.time.monotonic", lambda: now)
    progress = Progress(images=100, images_before=0, shards=10)
    assert progress.remaining_s is None
    now += 60.0  # loading the model
    progress.observe({"a": WorkerProgress({"ok": 6}, {}, {})})
    assert progress.images_per_s == pytest.approx(6 / 60)  # nothing better is known yet
    now += 10.0
    progress.observe({"a": WorkerProgress({"ok": 46}, {}, {})})
    assert progress.images_per_s == pytest.approx(4.0)
    assert progress.remaining_s == pytest.approx(54 / 4)


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


def test_counting_passes_everything_on() -> None:
    reporter = TerminalReporter(Console(file=io.StringIO()))
    assert list(reporter.counting(range(2500))) == list(range(2500))
    assert list(LogReporter().counting(range(5))) == list(range(5))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (185, "3 min 05 s"), (7800, "2 h 10 min"), (273600, "3 d 4 h")]
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text
