"""Signs of life: each driver keeps one small file in `RUN/drivers/` that says what it is doing, until it ends.

Every driver writes its own file, so that several on one run do not get into each other's way. It is replaced in one
step, so that readers see a whole one at any moment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from ovss_ray.errors import OvssError
from ovss_ray.labels.layout import DRIVERS_FOLDER
from ovss_ray.redaction import redacted
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.progress import Progress
from ovss_ray.version import __version__

log = logging.getLogger(__name__)

DriverState = Literal["planning", "loading", "running", "stopping", "finished", "stopped"]

ENDED: tuple[DriverState, ...] = ("finished", "stopped")
EVERY_S = 30.0
_FIRST_S = 5.0
EVERY_STORED_S = 60.0  # requests to object stores cost money
_MISSED = 3  # beats that may get lost, or be late, before a driver counts as gone
_SLACK_S = 30.0  # clocks of two machines
_LAST_ATTEMPTS = 3
_LAST_BEAT_S = 60.0
_LONGEST_REASON = 1000


class Beat(BaseModel):
    """What a driver says of itself; times are ISO 8601 in UTC, by the clock of the driver's machine.

    Attributes:
        driver: its id: when it started, and a random part.
        host, pid, process: where it runs; `process` tells a process from a later one with the same number.
        state, since: what it does, and since when.
        beat_at: when this was written.
        every_s: at most this many seconds pass until the next one, unless the store fails.
        claims: whether it plans the run or records an addition, or means to; see `alone.py`.
        fingerprint: of the run that it works on; None while that is planned.
        images, images_done, shards, shards_done: of the run; None while it is planned.
        failures: images without labels in this session.
        images_per_s: of this driver, smoothed; None before there is a rate.
        remaining_s: until the run is done, at the present rate of all drivers; None likewise.
        reason: why it stopped.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    driver: str
    host: str
    pid: int
    process: dict[str, str] | None = None
    package_version: str
    state: DriverState
    started_at: str
    since: str
    beat_at: str
    every_s: float
    claims: bool = False
    fingerprint: str | None = None
    images: int | None = None
    images_done: int | None = None
    shards: int | None = None
    shards_done: int | None = None
    failures: int = 0
    images_per_s: float | None = None
    remaining_s: float | None = None
    binding_stage: str | None = None
    reason: str | None = None

    @property
    def age_s(self) -> float:
        """Seconds since it was written, by this machine's clock; 0 if that is behind."""
        return max(time.time() - datetime.fromisoformat(self.beat_at).timestamp(), 0.0)

    @property
    def ahead_s(self) -> float:
        """Seconds that it was written in the future of this machine's clock; 0 if it was not."""
        return max(datetime.fromisoformat(self.beat_at).timestamp() - time.time(), 0.0)

    @property
    def is_gone(self) -> bool:
        """Whether the driver's process was on this machine and is no more."""
        here = _process(self.pid)
        mine = _process(os.getpid())
        if self.process is None or mine is None or any(mine[name] != self.process.get(name) for name in _MACHINE):
            return False
        return here != self.process

    @property
    def patience_s(self) -> float:
        """Seconds without a new one after which the driver counts as gone."""
        return _MISSED * self.every_s + _SLACK_S

    @property
    def where(self) -> str:
        """Its machine and process, for people."""
        return f"{self.host} (process {self.pid})"


class Heartbeat:
    """Keeps a driver's file up to date from a thread of its own; a context manager around the driver's work.

    A beat that cannot be written is left out: the next one comes. When the context ends, the last beat says why: the
    work is finished, or stopped by an error. Ended without either (`finished` was not called), the file is removed.

    Args:
        directory: the run; prepared.
        state: what the driver does at first.
        fingerprint: of the run, if it exists.
    """

    def __init__(self, directory: RunDirectory, state: DriverState, *, fingerprint: str | None = None) -> None:
        now = _now()
        self._directory = directory
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._over = False
        self._put = threading.Lock()
        self._guard: Callable[[], OvssError | None] | None = None
        self._error: OvssError | None = None
        self._shown_at = 0.0
        self._started = time.monotonic()
        self._beat = Beat(
            driver=f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:8]}",
            host=socket.gethostname(),
            pid=os.getpid(),
            process=_process(os.getpid()),
            package_version=__version__,
            state=state,
            started_at=now,
            since=now,
            beat_at=now,
            every_s=EVERY_S if directory.is_local else EVERY_STORED_S,
            fingerprint=fingerprint,
        )
        self._name = f"{DRIVERS_FOLDER}/{self._beat.driver}.json"
        self._thread = threading.Thread(target=self._go_on, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        self._write()
        _remove_ended(self._directory, self._beat.driver)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over = True
        self._wake.set()
        self._thread.join(_LAST_BEAT_S)
        if error is not None:
            self._change(state="stopped", reason=_reason(error), claims=False)
        if self._beat.state in ENDED:
            for _ in range(_LAST_ATTEMPTS):
                if self._write():
                    break
        else:
            remove_beat(self._directory, self.driver)

    @property
    def driver(self) -> str:
        """The id of this driver."""
        return self._beat.driver

    def enter(self, state: DriverState, **facts: Any) -> None:
        """Say what the driver does now, and soon write it down."""
        self._change(state=state, **facts)
        self._wake.set()

    def update(self, progress: Progress) -> None:
        """Take in how far the run is; at most once a second, so that it may be called as often as convenient."""
        now = time.monotonic()
        begun = bool(progress.images_now)
        if now - self._shown_at < 1.0 and (begun or self._beat.state != "running"):
            return
        self._shown_at = now
        self._change(**_numbers(progress))
        if begun and self._beat.state == "loading":
            self.enter("running")

    def finished(self, progress: Progress) -> None:
        """The work is done; the last beat, when the context ends, says so."""
        self._change(**{**_numbers(progress), "state": "finished", "remaining_s": None})

    def claim(self, claims: bool) -> None:
        """Write down at once whether this driver claims the planning of the run.

        Raises:
            RunFailedError, StoreUnavailableError: it cannot be written.
        """
        self._change(claims=claims)
        with self._put:
            self._directory.replace(self._name, self._content())

    def watch_over(self, guard: Callable[[], OvssError | None]) -> None:
        """Call `guard` before each beat; `check` raises what it returns."""
        self._guard = guard

    def check(self) -> None:
        """Raise what the guard has found."""
        if self._error is not None:
            raise self._error

    def _change(self, **facts: Any) -> None:
        with self._lock:
            if "state" in facts and facts["state"] != self._beat.state:
                facts["since"] = _now()
            self._beat = self._beat.model_copy(update=facts)

    def _go_on(self) -> None:
        while True:
            # Soon after the start more often, when there is news: after 5, 10, 20, 40 seconds.
            self._wake.wait(min(self._beat.every_s, max(_FIRST_S, time.monotonic() - self._started)))
            self._wake.clear()
            if self._over:
                return
            if self._guard is not None and self._error is None:
                self._error = self._guard()
            self._write()

    def _content(self) -> bytes:
        with self._lock:
            return self._beat.model_copy(update={"beat_at": _now()}).model_dump_json(indent=1).encode()

    def _write(self) -> bool:
        with self._put:
            return self._directory.try_replace(self._name, self._content())


class Listener:
    """Tells which drivers are alive; one that is kept hears who writes and who does not, whatever the clocks say."""

    def __init__(self) -> None:
        self._beats: dict[str, str] = {}  # the last of each driver
        self._seen_at: dict[str, float] = {}  # when that was seen first, by the monotonic clock of this process
        self._writing: set[str] = set()  # drivers that have written while this one listened

    def alive(self, beats: list[Beat]) -> list[Beat]:
        """Those of the drivers that work, as far as can be told: of one that was not heard writing the clocks decide.

        A beat from the future counts no more than one from as long ago: the driver may have died since.
        """
        return [
            beat
            for beat in self.not_given_up(beats)
            if beat.driver in self._writing or max(beat.age_s, beat.ahead_s) <= beat.patience_s
        ]

    def not_given_up(self, beats: list[Beat]) -> list[Beat]:
        """Those that may work: each has its patience from the moment on in which its last beat was seen first."""
        return [
            beat
            for beat in beats
            if self._silent_s(beat) <= beat.patience_s and not (beat.state in ENDED or beat.is_gone)
        ]

    def _silent_s(self, beat: Beat) -> float:
        now = time.monotonic()
        before = self._beats.get(beat.driver)
        if before != beat.beat_at:
            self._beats[beat.driver], self._seen_at[beat.driver] = beat.beat_at, now
        if before not in (None, beat.beat_at):
            self._writing.add(beat.driver)
        return now - self._seen_at[beat.driver]


def read_beats(directory: RunDirectory) -> list[Beat]:
    """The last beats of a run's drivers, the latest start first: one listing, and one read of each."""
    beats = []
    for name in directory.files_in(DRIVERS_FOLDER):
        data = directory.read(name) if name.endswith(".json") else None
        if data is not None:  # else it has just been removed
            with contextlib.suppress(ValidationError):
                beats.append(Beat.model_validate_json(data))
    return sorted(beats, key=lambda beat: beat.driver, reverse=True)


def remove_beat(directory: RunDirectory, driver: str) -> None:
    """Remove the file of a driver that is no more, if that is possible: it does no harm."""
    with contextlib.suppress(OvssError, OSError):
        directory.remove(f"{DRIVERS_FOLDER}/{driver}.json")


def _remove_ended(directory: RunDirectory, driver: str) -> None:
    """Remove the files of drivers that are no more: a new one has taken over.

    One that claims to plan the run, and may live if clocks are wrong, keeps its file; see `alone.wait_for_turn`.
    """
    with contextlib.suppress(OvssError, OSError):  # they do no harm
        beats = read_beats(directory)
        listener = Listener()
        kept = [beat for beat in listener.not_given_up(beats) if beat.claims] + listener.alive(beats)
        for beat in beats:
            if beat.driver != driver and beat not in kept:
                remove_beat(directory, beat.driver)


def _numbers(progress: Progress) -> dict[str, Any]:
    begun = bool(progress.images_now)
    return {
        "images": progress.images,
        "images_done": progress.images_before + progress.images_now,
        "shards": progress.shards,
        "shards_done": progress.shards_finished,
        "failures": progress.failures,
        "images_per_s": round(progress.rate, 3) if progress.rate is not None else None,
        "remaining_s": round(progress.remaining_s, 1) if begun and progress.remaining_s is not None else None,
        "binding_stage": progress.binding_stage,
    }


def _reason(error: BaseException) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "stopped by SIGINT"
    text = str(error) if isinstance(error, OvssError) else f"{type(error).__name__}: {error}"
    return redacted(text.strip())[:_LONGEST_REASON]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="milliseconds")


_MACHINE = ("boot", "pids")


def _process(pid: int) -> dict[str, str] | None:
    """What tells a process from all others, on all machines; None where Linux does not tell, or if it is not there."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        if state in ("Z", "X"):  # dead, and nobody has asked for its exit code yet
            return None
        return {
            "boot": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            "pids": str(Path("/proc/self/ns/pid").readlink()),  # numbers of processes differ between containers
            "start": fields[18],
        }
    except (OSError, IndexError, ValueError):
        return None
