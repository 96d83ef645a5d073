"""Ctrl-C that waits, with real signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from ovss_ray.labels.reading import open_run
from ovss_ray.run import summary
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.driver import RunInterrupted, run_job
from ovss_ray.run.interrupts import held_interrupts
from ovss_ray.spec import JobSpec


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def test_while_the_summary_is_counted_it_does_not_say_that_labelling_had_not_begun(
    make_spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    def open_late(*arguments: Any) -> Any:
        ctrl_c()
        return open_run(*arguments)

    spec = make_spec(limit=8)
    with monkeypatch.context() as patch:
        patch.setattr(summary, "open_run", open_late)
        with pytest.raises(RunInterrupted, match="stopped by SIGINT; labelling is done") as stopped:
            run_job(spec)
    assert stopped.value.continue_with == RunDirectory(spec.run).continue_command
    assert run_job(spec).statuses == {"ok": 8}


def test_it_is_raised_at_the_end_in_place_of_an_error() -> None:
    reached: list[str] = []

    def body() -> None:
        with held_interrupts():
            ctrl_c()
            reached.append("what follows")
            raise RuntimeError("a child was stopped by the same key")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert reached == ["what follows"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loop_can_ask_for_it() -> None:
    reached: list[str] = []

    def body() -> None:
        with held_interrupts() as interrupts:
            interrupts.raise_noted()
            ctrl_c()
            reached.append("before it asks")
            interrupts.raise_noted()
            reached.append("after")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert reached == ["before it asks"]


def test_the_second_one_does_not_wait() -> None:
    reached: list[str] = []

    def body() -> None:
        with held_interrupts():
            ctrl_c()
            reached.append("after the first")
            ctrl_c()
            reached.append("after the second")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert reached == ["after the first"]


def test_within_another_it_is_held_by_the_outer_one() -> None:
    reached: list[str] = []

    def body() -> None:
        with held_interrupts():
            with held_interrupts():
                ctrl_c()
            reached.append("after the inner one")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert reached == ["after the inner one"]


def test_ignored_it_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held_interrupts():
        ctrl_c()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
