"""The running workers, seen from the driver: calls go out as futures, what happened comes back as events."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ovss_ray.errors import OvssError, RunFailedError
from ovss_ray.run.directory import is_final
from ovss_ray.run.events import (
    CapacityChanged,
    GroupDone,
    ShardFailed,
    ShardTask,
    WorkerDied,
    WorkerFailedToStart,
    WorkerJoined,
    WorkerLeaving,
    WorkerPlaced,
)
from ovss_ray.run.job import LabellingJob
from ovss_ray.run.logs import LogSettings, package_level
from ovss_ray.run.reports import DeviceLostError, ShardReport
from ovss_ray.run.stats import WorkerProgress
from ovss_ray.segmenters import TextEmbeddings

if TYPE_CHECKING:
    from ovss_ray.run.memory import Shape

log = logging.getLogger(__name__)

SURVEY_EVERY_S = 5.0
ASK_EVERY_S = 1.0  # each worker, for its progress: shards of many workers are reported much more often
SLOWEST_BATCH = 20.0  # times the mean


class WorkerGoneError(Exception):
    """A call did not return because the worker's process is gone.

    Attributes:
        blameless: its node went with it, or it was told to go.
        memory: it was killed because the memory of its node ran out.
    """

    def __init__(self, reason: str, *, blameless: bool = False, memory: bool = False) -> None:
        super().__init__(reason)
        self.blameless = blameless
        self.memory = memory


@dataclass(frozen=True)
class Place:
    """Where a worker runs: its node, and the name of its GPU ("node/index") if it has one for itself."""

    node: str
    gpu: str | None = None


class WorkerHandle(Protocol):
    """One running worker."""

    def place(self) -> Future[Place]:
        """Where it runs, once it does; the future raises `WorkerGoneError` if it never will."""
        ...

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        """Call a method of `Worker`; the future raises `WorkerGoneError` if the worker dies meanwhile."""
        ...

    def kill(self) -> None:
        """End the worker at once."""
        ...


class Engine(Protocol):
    """Where workers run.

    Attributes:
        device: "cuda" if every worker has a GPU, else "cpu".
        isolates: whether a worker that hangs can be killed without the driver.
    """

    device: str
    isolates: bool

    def capacity(self) -> int:
        """How many workers there should be now."""
        ...

    def leaving_nodes(self) -> set[str]:
        """Nodes that have been told to go."""
        ...

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


PoolEvent = (
    WorkerPlaced
    | WorkerLoaded
    | TextEncoded
    | WorkerJoined
    | WorkerLeaving
    | GroupDone
    | ShardReported
    | WorkerFailedToStart
    | WorkerDied
    | ShardFailed
    | CapacityChanged
)


@dataclass(frozen=True)
class _Call:
    worker: str
    on_success: Callable[[Any], PoolEvent | None]
    shard: int | None = None  # None: the call is part of starting the worker


@dataclass
class _Member:
    handle: WorkerHandle
    place: Place | None = None
    group: tuple[int, ...] = ()  # announced, and perhaps begun
    leaving: bool = False
    progress: WorkerProgress = field(default_factory=WorkerProgress)
    asked: Future[Any] | None = None  # for progress
    asked_at: float = 0.0


class WorkerPool:
    """Starts workers, gives them work and tells what became of it.

    Args:
        engine: where they run.
        job: what they do; a micro-batch that takes longer than its `batch_timeout_s`, and longer than twenty mean
            ones, counts as hanging.
    """

    def __init__(self, engine: Engine, job: LabellingJob) -> None:
        self._engine = engine
        self._job = job
        self._batch_timeout_s = job.batch_timeout_s
        self._members: dict[str, _Member] = {}
        self._calls: dict[Future[Any], _Call] = {}
        self._shared_text: Any = None
        self._capacity = engine.capacity()
        self._surveyed_at = time.monotonic()

    def start(self, worker: str) -> None:
        """Start a worker; `WorkerPlaced` or `WorkerFailedToStart` follows."""
        handle = self._engine.launch(self._job)
        self._members[worker] = _Member(handle)
        self._calls[handle.place()] = _Call(worker, lambda place: self._placed(worker, place))

    def load(self, worker: str) -> None:
        """Have a placed worker load its segmenter; `WorkerLoaded` or `WorkerFailedToStart` follows."""
        self._call(worker, "load", self._log_settings(worker), on_success=lambda _: WorkerLoaded(worker))

    def encode_text(self, worker: str) -> None:
        """Have a loaded worker encode the vocabulary; `TextEncoded` or `WorkerFailedToStart` follows."""
        self._call(worker, "encode_text", on_success=lambda text: TextEncoded(worker, text))

    def begin(self, worker: str, text: TextEmbeddings) -> None:
        """Hand the encoded vocabulary to a loaded worker; `WorkerJoined` or `WorkerFailedToStart` follows."""
        if self._shared_text is None:
            self._shared_text = self._engine.share(text)
        limits: dict[Shape, int] = {}
        for member in self._members.values():
            for shape, limit in member.progress.batch_limits.items():
                limits[shape] = min(limit, limits.get(shape, limit))
        self._call(worker, "begin", self._shared_text, limits, on_success=lambda _: WorkerJoined(worker))

    def assign(self, worker: str, task: ShardTask) -> None:
        """Give a shard to a worker; `ShardReported`, `ShardFailed` or `WorkerDied` follows."""
        method = "open_carefully" if task.careful else "label_shard"
        self._call(
            worker, method, task, shard=task.shard, on_success=lambda said: self._heard(worker, task.shard, said)
        )

    def stop(self, worker: str) -> None:
        """End a worker that has nothing left to do."""
        self._forget(worker)

    def poll(self, timeout_s: float) -> list[PoolEvent]:
        """Wait until something happened, `timeout_s` at most, and say what."""
        if not self._calls:  # no worker at all: wait for a place to appear
            time.sleep(timeout_s)
        done, _ = wait(self._calls, timeout=timeout_s, return_when=FIRST_COMPLETED)
        events: list[PoolEvent] = []
        for future in [future for future in self._calls if future in done]:  # in the order of the calls
            call = self._calls.pop(future, None)
            if call is not None:  # else: its worker was found dead through another call
                event = self._outcome(call, future)
                events += [] if event is None else [event]
        if time.monotonic() - self._surveyed_at > SURVEY_EVERY_S:
            events += self._survey()
        return events + self._hanging()

    def progress(self) -> dict[str, WorkerProgress]:
        """The last known progress of every live worker; asks for news without waiting for it."""
        now = time.monotonic()
        for member in self._members.values():
            if member.asked is not None and not member.asked.done():
                continue
            if member.asked is not None and member.asked.exception() is None:
                member.progress = member.asked.result()
            member.asked = None
            if member.place is not None and now - member.asked_at >= ASK_EVERY_S:
                member.asked, member.asked_at = member.handle.call("progress"), now
        return {worker: member.progress for worker, member in self._members.items()}

    def close(self) -> None:
        """End all workers."""
        for worker in list(self._members):
            self._forget(worker)

    def _log_settings(self, worker: str) -> LogSettings | None:
        """Those of a worker in a process of its own."""
        if not self._engine.isolates:
            return None
        spec = self._job.spec
        return LogSettings(package_level(), spec.log_format, {"run": spec.run_name, "worker": worker})

    # -- what the calls came to --------------------------------------------------------------------------------

    def _call(
        self,
        worker: str,
        method: str,
        *arguments: Any,
        on_success: Callable[[Any], PoolEvent | None],
        shard: int | None = None,
    ) -> None:
        future = self._members[worker].handle.call(method, *arguments)
        self._calls[future] = _Call(worker, on_success, shard)

    def _placed(self, worker: str, place: Place) -> PoolEvent:
        self._members[worker].place = place
        return WorkerPlaced(worker, place.gpu, place.node)

    def _heard(self, worker: str, shard: int, said: tuple[int, ...] | ShardReport) -> PoolEvent | None:
        """A shard is finished, or, if it is done carefully, the worker says which group comes next."""
        member = self._members[worker]
        if isinstance(said, ShardReport):
            member.group = ()
            member.progress, member.asked = said.progress, None  # newer than what has been asked for before
            return ShardReported(worker, said)
        before, member.group = member.group, said
        self._call(worker, "label_next", shard=shard, on_success=lambda said: self._heard(worker, shard, said))
        return GroupDone(worker) if before else None

    def _outcome(self, call: _Call, future: Future[Any]) -> PoolEvent | None:
        try:
            return call.on_success(future.result())
        except Exception as error:  # whatever happened to the worker becomes an event; the scheduler decides
            log.warning("%s: %s", call.worker, _explain(error), extra=_about(call.worker, call.shard))
            gone = isinstance(error, WorkerGoneError | DeviceLostError)
            if call.shard is None:
                blameless = self._is_blameless(call.worker, error)
                self._forget(call.worker)
                anywhere = isinstance(error, OvssError)
                return WorkerFailedToStart(
                    call.worker, _explain(error), blameless=blameless, anywhere=anywhere, memory=_is_memory(error)
                )
            if gone:
                blameless = self._is_blameless(call.worker, error)
                return self._death(call.worker, _explain(error), blameless=blameless, memory=_is_memory(error))
            final = isinstance(error, RunFailedError) or (isinstance(error, OSError) and is_final(error))
            return ShardFailed(call.worker, call.shard, _explain(error), final=final)

    def _death(
        self, worker: str, reason: str, *, blameless: bool = False, hung: bool = False, memory: bool = False
    ) -> WorkerDied:
        group = self._members[worker].group
        self._forget(worker)
        return WorkerDied(worker, reason, blameless=blameless, group=group, hung=hung, memory=memory)

    def _is_blameless(self, worker: str, error: Exception) -> bool:
        return self._members[worker].leaving or (isinstance(error, WorkerGoneError) and error.blameless)

    def _forget(self, worker: str) -> None:
        member = self._members.pop(worker, None)
        if member is not None:
            member.handle.kill()
        self._calls = {future: call for future, call in self._calls.items() if call.worker != worker}

    # -- what nobody reports -----------------------------------------------------------------------------------

    def _survey(self) -> list[PoolEvent]:
        """What has become of the cluster: places that came or went, and nodes that are about to go."""
        self._surveyed_at = time.monotonic()
        events: list[PoolEvent] = []
        leaving = self._engine.leaving_nodes()
        for worker, member in self._members.items():
            if member.place is not None and member.place.node in leaving and not member.leaving:
                log.warning("%s: its node is about to go", worker, extra=_about(worker))
                member.leaving = True
                events.append(WorkerLeaving(worker))
        capacity = self._engine.capacity()
        if capacity != self._capacity:
            log.info("the cluster has room for %d workers now, %d before", capacity, self._capacity)
            self._capacity = capacity
            events.append(CapacityChanged(capacity))
        return events

    def _hanging(self) -> list[PoolEvent]:
        """Workers that hold a shard and are stuck in one micro-batch or image, or do not even answer."""
        if not self._engine.isolates:
            return []
        working = {call.worker for call in self._calls.values() if call.shard is not None}
        events: list[PoolEvent] = []
        for worker in working:
            member = self._members[worker]
            limit = max(self._batch_timeout_s, SLOWEST_BATCH * member.progress.batch_s)
            silent = member.asked is not None and not member.asked.done()
            busy = member.progress.busy_s
            if silent:
                busy = max(busy, time.monotonic() - member.asked_at)
            if busy > limit:
                reason = f"one micro-batch or image took over {limit:.0f} s (hang)"
                log.warning("%s: %s", worker, reason, extra=_about(worker))
                events.append(self._death(worker, reason, hung=True))
        return events


def _about(worker: str, shard: int | None = None) -> dict[str, str | int]:
    return {"worker": worker} if shard is None else {"worker": worker, "shard": shard}


def _is_memory(error: Exception) -> bool:
    return isinstance(error, WorkerGoneError) and error.memory


def _explain(error: Exception) -> str:
    return str(error) if isinstance(error, OvssError | WorkerGoneError) else f"{type(error).__name__}: {error}"
