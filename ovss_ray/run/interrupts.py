"""Signals that wait: Ctrl-C raised within Ray's own code can leave a core that crashes when the process ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_PATIENCE_S = 5.0  # for threads that finish what they read or write


def end_for_certain(code: int) -> None:
    """Let the process end with this code after some seconds, whatever its threads wait for.

    Python waits for all of them, and one that reads from a disk that stopped answering never comes back.
    """

    def end() -> None:
        time.sleep(_PATIENCE_S)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    threading.Thread(target=end, name="end", daemon=True).start()


class HeldInterrupt:
    """Whether SIGINT has come. The second one is raised at once, for those who cannot wait."""

    def __init__(self) -> None:
        self.is_noted = False

    def __call__(self, _signum: int, _frame: FrameType | None) -> None:
        if self.is_noted:
            raise KeyboardInterrupt
        self.is_noted = True

    def raise_noted(self) -> None:
        """Raise what was held.

        Raises:
            KeyboardInterrupt: SIGINT has come.
        """
        if self.is_noted:
            raise KeyboardInterrupt


@contextmanager
def held_interrupts() -> Iterator[HeldInterrupt]:
    """SIGINT is noted, and raised at the end, also in place of an error.

    Where it is ignored, and outside the main thread, nothing changes.

    Raises:
        KeyboardInterrupt: SIGINT has come.
    """
    held = HeldInterrupt()
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or previous in (signal.SIG_IGN, None):
        yield held
        return
    signal.signal(signal.SIGINT, held)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, previous)
        if held.is_noted:
            signal.raise_signal(signal.SIGINT)  # whoever held it before is told: it may be held once more


class StopSignal:
    """What has been received so far."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.since = 0.0
        self.count = 0
        self.announced = False

    def __call__(self, signum: int, _frame: FrameType | None) -> None:
        self.count += 1
        if self.received is None:
            self.received, self.since = signum, time.monotonic()


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """SIGINT and SIGTERM are noted instead of raising in the middle of something; outside the main thread, ignored."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    previous = {signum: signal.signal(signum, stop) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
