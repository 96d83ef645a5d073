"""How far a run is: images per second, time left, failures and the stage that binds; on a terminal or in the log."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as RichProgress

from ovss_ray.printable import printable
from ovss_ray.run.incidents import Incidents
from ovss_ray.run.pace import Pace
from ovss_ray.run.stats import Failures, WorkerProgress

log = logging.getLogger(__name__)

T = TypeVar("T")

LOG_EVERY_S = 30.0
PLANNING_STEP = 1000


class Progress:
    """Counts of one session of a run; images of unfinished shards included.

    Args:
        images: images of the whole run.
        images_before: images of shards that were finished before this session.
        shards: shards of the whole run.
        shards_before: those that were finished before this session.

    Attributes:
        shards_finished: those finished by now.
        incidents: what happened to workers and attempts.
    """

    def __init__(self, *, images: int, images_before: int, shards: int, shards_before: int = 0) -> None:
        self.images = images
        self.images_before = images_before
        self.shards = shards
        self.shards_finished = shards_before
        self.incidents = Incidents()
        self.started = time.monotonic()
        self._first: tuple[float, int] | None = None  # when images were first seen to be done, and how many
        self._pace = Pace()
        self.statuses: Counter[str] = Counter()
        self._reasons: Failures = Counter()  # of finished shards
        self._reported: Counter[str] = Counter()  # images of finished shards, by worker
        self._reported_reasons: dict[str, Failures] = {}
        self._live: dict[str, WorkerProgress] = {}
        self._retried: Counter[str] = Counter()  # of `statuses`, images that had failed before
        self._retried_reasons: Failures = Counter()
        self._retriers: set[str] = set()
        self._theirs = 0  # images of shards that another driver has finished
        self._own_pace = Pace()
        self._seconds_of_gone: Counter[str] = Counter()
        self._retries_of_gone: Counter[str] = Counter()

    def shard_done(
        self,
        worker: str,
        statuses: Mapping[str, int],
        failures: Mapping[tuple[str, str], int],
        *,
        labelled: bool = True,
        counts: bool = True,
        retried: bool = False,
    ) -> None:
        """Count a finished shard.

        Args:
            labelled: this worker has worked on it, and has counted its images in its progress.
            counts: False if the shard was finished before by another worker.
            retried: its images had failed before.
        """
        if labelled:
            self._reported[worker] += sum(statuses.values())
            self._reported_reasons.setdefault(worker, Counter()).update(failures)
        if counts:
            self.shards_finished += 1
            self.statuses.update(statuses)
            self._reasons.update(failures)
            self._theirs += 0 if labelled else sum(statuses.values())
            if retried:
                self._retried.update(statuses)
                self._retried_reasons.update(failures)

    def retrying(self, worker: str) -> None:
        """This worker gets images that had failed before."""
        self._retriers.add(worker)

    def first_attempts(self) -> tuple[int, Failures]:
        """Images labelled or failed that had not failed before, and the failed ones by (status, reason).

        Of workers that retry, only finished shards count: what they count themselves does not tell which is which.
        """
        seen = self.statuses.total() - self._retried.total()
        failures = self._reasons - self._retried_reasons
        for worker, said in self._live.items():
            if worker not in self._retriers:
                seen += max(sum(said.images.values()) - self._reported[worker], 0)
                failures += Counter(said.failures) - self._reported_reasons.get(worker, Counter())
        return seen, failures

    def observe(self, live: Mapping[str, WorkerProgress]) -> None:
        """Take in what the live workers say."""
        for gone in set(self._live) - set(live):
            self._seconds_of_gone.update(self._live[gone].stage_seconds)
            self._retries_of_gone.update(self._live[gone].retries)
        self._live = dict(live)
        now = time.monotonic()
        if self._first is None and self.images_labelled:
            self._first = now, self.images_labelled
        self._pace.see(self.images_now, now)
        self._own_pace.see(self.images_labelled, now)

    @property
    def images_now(self) -> int:
        """Images labelled, or found impossible, in this session, by other drivers included."""
        unfinished = sum(
            max(sum(said.images.values()) - self._reported[worker], 0) for worker, said in self._live.items()
        )
        return min(self.statuses.total() + unfinished, self.images - self.images_before)

    @property
    def images_labelled(self) -> int:
        """Those that this driver's workers have worked on."""
        return max(self.images_now - self._theirs, 0)

    @property
    def failures(self) -> int:
        """Images found so far to have no labels."""
        return self.reasons.total()

    @property
    def reasons(self) -> Failures:
        """Those images by (status, reason)."""
        total = Counter(self._reasons)
        for worker, said in self._live.items():
            total += Counter(said.failures) - self._reported_reasons.get(worker, Counter())
        return total

    @property
    def retries(self) -> dict[str, int]:
        """Requests made again in this session, by the kind of failure before them."""
        total = Counter(self._retries_of_gone)
        for said in self._live.values():
            total.update(said.retries)
        return dict(total)

    @property
    def seconds(self) -> float:
        """Since the session began."""
        return time.monotonic() - self.started

    @property
    def images_per_s(self) -> float:
        """Of this driver since images were first seen to be done: start-up does not count.

        Of the whole session if that is short.
        """
        if self._first is not None:
            since, before = time.monotonic() - self._first[0], self.images_labelled - self._first[1]
            if since > 1.0 and before:
                return before / since
        return self.images_labelled / max(self.seconds, 1e-9)

    @property
    def rate(self) -> float | None:
        """Images per second of this driver of late, smoothed; None before it can be told."""
        return self._own_pace.per_s

    @property
    def remaining_s(self) -> float | None:
        """Expected seconds until the end at the present rate of all drivers, once there is one."""
        rate = self._pace.per_s
        return (self.images - self.images_before - self.images_now) / rate if rate else None

    @property
    def beginning(self) -> str | None:
        """What workers do before the first image; None from then on."""
        if self.images_now:
            return None
        done, total = self.texts
        return f"encoding the vocabulary: {done:,} of {total:,} texts" if total else "loading the model"

    @property
    def texts(self) -> tuple[int, int]:
        """How many texts of the vocabulary are encoded, and of how many; zeros if no worker is at it."""
        return max((said.texts for said in self._live.values()), default=(0, 0))

    @property
    def stage_seconds(self) -> dict[str, float]:
        """Seconds by stage over all workers of this session."""
        total = Counter(self._seconds_of_gone)
        for said in self._live.values():
            total.update(said.stage_seconds)
        return dict(total)

    @property
    def binding_stage(self) -> str | None:
        """The stage that the others wait for; None before there is anything to tell it from."""
        seconds = self.stage_seconds
        device = {name: seconds.get(name, 0.0) for name in ("segment", "wait_for_images", "wait_for_encode")}
        if not any(device.values()):
            return None
        slowest = max(device, key=lambda name: device[name])
        if slowest == "wait_for_images":
            return "fetch" if seconds.get("fetch", 0.0) > seconds.get("decode", 0.0) else "decode"
        return "encode" if slowest == "wait_for_encode" else "segment"

    def line(self) -> str:
        """One line for a log."""
        done = self.images_before + self.images_now
        parts = [f"{done:,} of {self.images:,} images"]
        if self.beginning:
            return ", ".join([*parts, self.beginning])
        if self.rate is not None:
            parts.append(f"{self.rate:.1f} images/s")
        if self.remaining_s is not None:
            parts.append(f"{duration(self.remaining_s)} left")
        parts.append(f"{self.failures:,} failed")
        if self.binding_stage:
            parts.append(f"bound by {self.binding_stage}")
        return ", ".join(parts)


class Reporter(Protocol):
    """Shows what a run does."""

    def message(self, text: str) -> None:
        """Say one thing."""
        ...

    def doing(self, what: str) -> AbstractContextManager[object]:
        """Say what is being done while the context is open: something that may take its time."""
        ...

    def counting(self, images: Iterable[T]) -> Iterator[T]:
        """Pass the planned images on and show how many there are so far."""
        ...

    def showing(self, progress: Progress) -> AbstractContextManager[object]:
        """Keep `progress` in view while the context is open."""
        ...

    def update(self, progress: Progress) -> None:
        """Show the latest."""
        ...


class SilentReporter:
    """Shows nothing."""

    def message(self, text: str) -> None:
        log.info("%s", text)

    def doing(self, what: str) -> AbstractContextManager[object]:
        log.info("%s", what)
        return nullcontext()

    def counting(self, images: Iterable[T]) -> Iterator[T]:
        yield from images

    def showing(self, progress: Progress) -> AbstractContextManager[object]:  # noqa: ARG002
        return nullcontext()

    def update(self, progress: Progress) -> None:
        pass


class LogReporter(SilentReporter):
    """A log line now and then, for runs without a terminal."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def counting(self, images: Iterable[T]) -> Iterator[T]:
        for count, image in enumerate(images, 1):
            if count % PLANNING_STEP == 0 and time.monotonic() - self._last >= LOG_EVERY_S:
                self._last = time.monotonic()
                log.info("planning: %d images so far", count)
            yield image

    def update(self, progress: Progress) -> None:
        if time.monotonic() - self._last >= LOG_EVERY_S:
            self._last = time.monotonic()
            log.info("%s", progress.line())


class TerminalReporter(SilentReporter):
    """A progress bar with rate, time left, failures and the binding stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task = self._bar.add_task("starting", total=None, note="")

    def message(self, text: str) -> None:
        self._console.print(printable(text), highlight=False, soft_wrap=True)

    def doing(self, what: str) -> AbstractContextManager[object]:
        return self._console.status(what)

    def counting(self, images: Iterable[T]) -> Iterator[T]:
        with self._console.status("planning") as status:
            for count, image in enumerate(images, 1):
                if count % PLANNING_STEP == 0:
                    status.update(f"planning: {count:,} images")
                yield image

    @contextmanager
    def showing(self, progress: Progress) -> Iterator[None]:
        with self._bar:
            yield
            self.update(progress)

    def update(self, progress: Progress) -> None:
        if progress.beginning:
            self._show_beginning(progress, progress.beginning)
            return
        note = "" if progress.rate is None else f"{progress.rate:.1f}/s"
        if progress.remaining_s is not None:
            note += f"  {duration(progress.remaining_s)} left"
        if progress.failures:
            note += f"  [red]{progress.failures:,} failed[/red]"
        if progress.binding_stage:
            note += f"  bound by {progress.binding_stage}"
        done = progress.images_before + progress.images_now
        self._bar.update(self._task, description="labelling", completed=done, total=progress.images, note=note)

    def _show_beginning(self, progress: Progress, what: str) -> None:
        done, total = progress.texts
        if total:
            self._bar.update(
                self._task, description="encoding the vocabulary", completed=done, total=total, note="texts"
            )
        else:
            done = progress.images_before
            self._bar.update(self._task, description="starting", completed=done, total=progress.images, note=what)


def duration(seconds: float) -> str:
    """Seconds for people: "42 s", "3 min 05 s", "2 h 10 min", "3 d 4 h"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
