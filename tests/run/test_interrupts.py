"""Ctrl-C that waits, with real signals."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest

from ovss_ray.run.interrupts import held_interrupts


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


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
