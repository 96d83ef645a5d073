"""What a worker counts while it works, from any of its threads: images, failures, seconds by stage, what is running."""

from __future__ import annotations

import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from ovss_ray.labels.reasons import OTHER_REASONS, kind_of

REASONS_KEPT = 50

Failures = Counter[tuple[str, str]]
"""Images by (status, kind of reason)."""


@dataclass(frozen=True)
class WorkerProgress:
    """What a worker has done since it started.

    Attributes:
        images: finished images by status.
        failures: those without labels by (status, kind of reason).
        stage_seconds: seconds by stage, added up over threads (`fetch`, `decode`, `segment`, `encode`, `write`), and
            what the device's thread spent waiting (`wait_for_images`, `wait_for_encode`).
        retries: requests made again, by the kind of failure before them.
        busy_s: age of the oldest image in decoding or micro-batch on the device; 0 if there is none.
        batch_s: mean seconds of a micro-batch; 0 before the first.
        batch_limits: micro-batch sizes that fit into memory, by shape (height, width), where they had to be reduced.
        texts: texts of the vocabulary that are encoded, and all there are; zeros while it does something else.
    """

    images: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[tuple[str, str], int] = field(default_factory=dict)
    stage_seconds: Mapping[str, float] = field(default_factory=dict)
    retries: Mapping[str, int] = field(default_factory=dict)
    busy_s: float = 0.0
    batch_s: float = 0.0
    batch_limits: Mapping[tuple[int, ...], int] = field(default_factory=dict)
    texts: tuple[int, int] = (0, 0)


class WorkerStats:
    """Counts images and seconds from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._images: Counter[str] = Counter()
        self._failures: Failures = Counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._times: Counter[str] = Counter()
        self._retries: Counter[str] = Counter()
        self._running: dict[object, float] = {}

    @contextmanager
    def stage(self, name: str, *, watched: bool = False) -> Iterator[None]:
        """Add the time spent inside to a stage; if watched, it counts for `busy_s` until it ends."""
        key, start = object(), time.perf_counter()
        if watched:
            with self._lock:
                self._running[key] = start
        try:
            yield
        finally:
            with self._lock:
                self._running.pop(key, None)
                self._seconds[name] += time.perf_counter() - start
                self._times[name] += 1

    def count_image(self, status: str, reason: str | None) -> None:
        """Count one finished image."""
        with self._lock:
            self._images[status] += 1
            if reason is not None:
                count_failure(self._failures, status, reason)

    def count_retry(self, kind: str) -> None:
        """Count a request that is made again."""
        with self._lock:
            self._retries[kind] += 1

    def snapshot(
        self, batch_limits: Mapping[tuple[int, ...], int] | None = None, texts: tuple[int, int] = (0, 0)
    ) -> WorkerProgress:
        """The sums so far."""
        with self._lock:
            oldest = min(self._running.values(), default=None)
            return WorkerProgress(
                images=dict(self._images),
                failures=dict(self._failures),
                stage_seconds=dict(self._seconds),
                retries=dict(self._retries),
                busy_s=0.0 if oldest is None else time.perf_counter() - oldest,
                batch_s=self._seconds["segment"] / max(self._times["segment"], 1),
                batch_limits=dict(batch_limits or {}),
                texts=texts,
            )


def count_failure(failures: Failures, status: str, reason: str, images: int = 1) -> None:
    """Count failed images by status and kind of reason (`kind_of`); the first fifty different ones are kept apart."""
    key = (status, kind_of(reason))
    failures[key if key in failures or len(failures) < REASONS_KEPT else (status, OTHER_REASONS)] += images
