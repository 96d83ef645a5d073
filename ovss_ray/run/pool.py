"""The running workers, seen from the driver: calls go out as futures, what happened comes back as events."""

from __future__ import annotations

import logging
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import Any, Protocol

from ovss_ray.errors import OvssError, RunFailedError
from ovss_ray.run.directory import is_final
from ovss_ray.run.job import LabellingJob
from ovss_ray.run.prefetch import WorkerProgress
from ovss_ray.run.scheduler import ShardFailed, WorkerDied, WorkerFailedToStart, WorkerJoined
from ovss_ray.run.worker import ShardReport
from ovss_ray.segmenters import TextEmbeddings

log = logging.getLogger(__name__)


class WorkerGoneError(Exception):
    """A call did not return because the worker's process is gone."""

    def __init__(self, reason: str, *, blameless: bool) -> None:
        super().__init__(reason)
        self.blameless = blameless


class WorkerHandle(Protocol):
    """One running worker."""

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method of `Worker`; the future raises `WorkerGoneError` if the worker dies meanwhile."""
        ...

    def kill(self) -> None:
        """End the worker at once."""
        ...


class Engine(Protocol):
    """Where workers run.

    Attributes:
        workers: how many to keep.
        device: "cuda" if every worker has a GPU, else "cpu".
    """

    workers: int
    device: str

    def launch(self, job: LabellingJob) -> WorkerHandle:
        """Start one worker; returns at once."""
        ...

    def share(self, value: Any) -> Any:
        """Make a value cheap to pass to many workers."""
        ...

    def close(self) -> None:
        """End all that `launch` started."""
        ...


@dataclass(frozen=True)
class WorkerLoaded:
    """A worker has loaded its segmenter and waits for the encoded vocabulary."""

    worker: str


@dataclass(frozen=True)
class TextEncoded:
    """A worker has encoded the vocabulary."""

    worker: str
    text: TextEmbeddings


@dataclass(frozen=True)
class ShardReported:
    """A worker has finished a shard."""

    worker: str
    report: ShardReport


PoolEvent = WorkerLoaded | TextEncoded | WorkerJoined | ShardReported | WorkerFailedToStart | WorkerDied | ShardFailed


@dataclass(frozen=True)
class _Call:
    worker: str
    on_success: Callable[[Any], PoolEvent]
    shard: int | None = None  # None: the call is part of starting the worker


class WorkerPool:
    """Starts workers, gives them work and tells what became of it."""

    def __init__(self, engine: Engine, job: LabellingJob) -> None:
        self._engine = engine
        self._job = job
        self._handles: dict[str, WorkerHandle] = {}
        self._calls: dict[Future[Any], _Call] = {}
        self._progress: dict[str, WorkerProgress] = {}
        self._progress_calls: dict[str, Future[Any]] = {}
        self._shared_text: Any = None

    def start(self, worker: str) -> None:
        """Start a worker; `WorkerLoaded` or `WorkerFailedToStart` follows."""
        self._handles[worker] = self._engine.launch(self._job)
        self._call(worker, "load", on_success=lambda _: WorkerLoaded(worker))

    def encode_text(self, worker: str) -> None:
        """Have a loaded worker encode the vocabulary; `TextEncoded` or `WorkerFailedToStart` follows."""
        self._call(worker, "encode_text", on_success=lambda text: TextEncoded(worker, text))

    def begin(self, worker: str, text: TextEmbeddings) -> None:
        """Hand the encoded vocabulary to a loaded worker; `WorkerJoined` or `WorkerFailedToStart` follows."""
        if self._shared_text is None:
            self._shared_text = self._engine.share(text)
        self._call(worker, "begin", self._shared_text, on_success=lambda _: WorkerJoined(worker))

    def assign(self, worker: str, shard: int, attempt: int) -> None:
        """Give a shard to a worker; `ShardReported`, `ShardFailed` or `WorkerDied` follows."""
        self._call(
            worker, "label_shard", shard, attempt, shard=shard, on_success=lambda report: ShardReported(worker, report)
        )

    def stop(self, worker: str) -> None:
        """End a worker that has nothing left to do."""
        self._forget(worker)

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Wait until something happened, `timeout_s` at most, and say what."""
        done, _ = wait(self._calls, timeout=timeout_s, return_when=FIRST_COMPLETED)
        events: list[PoolEvent] = []
        for future in [future for future in self._calls if future in done]:  # in the order of the calls
            call = self._calls.pop(future, None)
            if call is not None:  # else: its worker was found dead through another call
                events.append(self._outcome(call, future))
        return events

    def progress(self) -> dict[str, WorkerProgress]:
        """The last known progress of every live worker; asks for news without waiting for it."""
        for worker, handle in self._handles.items():
            asked = self._progress_calls.get(worker)
            if asked is not None and not asked.done():
                continue
            if asked is not None and asked.exception() is None:
                self._progress[worker] = asked.result()
            self._progress_calls[worker] = handle.call("progress")
        return {worker: self._progress[worker] for worker in self._handles if worker in self._progress}

    def close(self) -> None:
        """End all workers."""
        for worker in list(self._handles):
            self._forget(worker)

    def _call(
        self,
        worker: str,
        method: str,
        *arguments: Any,
        on_success: Callable[[Any], PoolEvent],
        shard: int | None = None,
    ) -> None:
        future = self._handles[worker].call(method, *arguments)
        self._calls[future] = _Call(worker, on_success, shard)

    def _outcome(self, call: _Call, future: Future[Any]) -> PoolEvent:
        try:
            return call.on_success(future.result())
        except Exception as error:  # whatever happened to the worker becomes an event; the scheduler decides
            log.warning("%s: %s", call.worker, _explain(error))
            if call.shard is None:
                self._forget(call.worker)
                return WorkerFailedToStart(call.worker, _explain(error))
            if isinstance(error, WorkerGoneError):
                self._forget(call.worker)
                return WorkerDied(call.worker, str(error), blameless=error.blameless)
            final = isinstance(error, RunFailedError) or (isinstance(error, OSError) and is_final(error))
            return ShardFailed(call.worker, call.shard, _explain(error), final=final)

    def _forget(self, worker: str) -> None:
        handle = self._handles.pop(worker, None)
        if handle is not None:
            handle.kill()
        self._progress.pop(worker, None)
        self._progress_calls.pop(worker, None)
        self._calls = {future: call for future, call in self._calls.items() if call.worker != worker}


def _explain(error: Exception) -> str:
    return str(error) if isinstance(error, OvssError | WorkerGoneError) else f"{type(error).__name__}: {error}"
