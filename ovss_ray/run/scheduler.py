"""Which worker labels which shard: a pure state machine, without Ray, clock or I/O.

Events go in (`handle`), decisions come out; the driver carries them out. Invariants, for any sequence of events:

* a shard is in exactly one place: waiting, in flight on one worker, or done;
* a shard that failed before is retried alone on its worker, so that a second failure can be blamed on it;
* no shard fails more than `max_shard_attempts` times: then the run stops with its reason;
* `max_failed_starts` workers in a row that cannot start stop the run: never an endless loop of restarts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True)
class WorkerJoined:
    """A worker has loaded its segmenter and waits for shards."""

    worker: str


@dataclass(frozen=True)
class WorkerFailedToStart:
    """A worker could not load its segmenter, or died while it did."""

    worker: str
    reason: str


@dataclass(frozen=True)
class WorkerDied:
    """A worker's process is gone. `blameless`: its node went away or was preempted, so no shard is to blame."""

    worker: str
    reason: str
    blameless: bool = False


@dataclass(frozen=True)
class ShardDone:
    """The file of the shard exists, written by this worker or by another before it."""

    worker: str
    shard: int


@dataclass(frozen=True)
class ShardFailed:
    """The worker lives but could not finish the shard. `final`: another try is pointless (disk full, no permission)."""

    worker: str
    shard: int
    reason: str
    final: bool = False


Event = WorkerJoined | WorkerFailedToStart | WorkerDied | ShardDone | ShardFailed


@dataclass(frozen=True)
class StartWorker:
    """Start one more worker; its name is in the events that come from it."""

    worker: str


@dataclass(frozen=True)
class Assign:
    """Give the shard to the worker."""

    worker: str
    shard: int
    attempt: int


@dataclass(frozen=True)
class StopWorker:
    """The worker has nothing left to do."""

    worker: str


@dataclass(frozen=True)
class StopRun:
    """Give up: the reason is for the user, and nothing that was finished is lost."""

    reason: str


Decision = StartWorker | Assign | StopWorker | StopRun


@dataclass
class _Worker:
    joined: bool = False
    in_flight: list[int] = field(default_factory=list)


class Scheduler:
    """Gives out every shard until it is done.

    Args:
        shards: ids still to be labelled, in the order to give them out; read lazily.
        remaining: how many ids `shards` yields.
        workers: how many workers to keep.
        depth: shards in flight per worker; with 2, one is fetched while the other is on the GPU.
        max_shard_attempts: failures of one shard that stop the run.
        max_failed_starts: workers in a row that fail to start before the run stops.
    """

    def __init__(
        self,
        shards: Iterable[int],
        *,
        remaining: int,
        workers: int,
        depth: int = 2,
        max_shard_attempts: int = 3,
        max_failed_starts: int = 3,
    ) -> None:
        self._fresh: Iterator[int] = iter(shards)
        self._fresh_left = remaining
        self._retries: deque[int] = deque()
        self._failures: dict[int, int] = {}
        self._workers: dict[str, _Worker] = {}
        self._target = workers
        self._depth = depth
        self._max_shard_attempts = max_shard_attempts
        self._max_failed_starts = max_failed_starts
        self._failed_starts = 0
        self._started = 0
        self._draining = False
        self._stopped = False

    @property
    def remaining(self) -> int:
        """Shards that are not done."""
        return self._waiting + self.in_flight

    @property
    def in_flight(self) -> int:
        """Shards that a worker holds."""
        return sum(len(worker.in_flight) for worker in self._workers.values())

    def start(self) -> list[Decision]:
        """The first decisions: the workers to start."""
        return self._decide()

    def drain(self) -> None:
        """Give out nothing more; shards in flight may still finish."""
        self._draining = True

    def handle(self, event: Event) -> list[Decision]:
        """Take one event in and say what to do now.

        Raises:
            ValueError: the event contradicts what was decided (unknown worker, shard that it does not hold).
        """
        if self._stopped:
            return []
        stop = self._apply(event)
        if stop is not None:
            self._stopped = True
            return [stop]
        return self._decide()

    def _apply(self, event: Event) -> StopRun | None:
        if event.worker not in self._workers:
            raise ValueError(f"{event} comes from a worker that was never started, or is gone")
        worker = self._workers[event.worker]
        match event:
            case WorkerJoined():
                worker.joined = True
                self._failed_starts = 0
            case WorkerFailedToStart():
                del self._workers[event.worker]
                self._failed_starts += 1
                if self._failed_starts >= self._max_failed_starts:
                    return StopRun(f"{self._failed_starts} workers in a row could not start: {event.reason}")
            case WorkerDied():
                del self._workers[event.worker]
                return self._give_back(worker.in_flight, event.reason, blameless=event.blameless)
            case ShardDone():
                self._take(worker, event.shard)
                self._failures.pop(event.shard, None)
            case ShardFailed():
                self._take(worker, event.shard)
                if event.final:
                    return StopRun(f"shard {event.shard}: {event.reason}")
                return self._give_back([event.shard], event.reason, blameless=False)
        return None

    @staticmethod
    def _take(worker: _Worker, shard: int) -> None:
        if shard not in worker.in_flight:
            raise ValueError(f"shard {shard} is not in flight on this worker")
        worker.in_flight.remove(shard)

    def _give_back(self, shards: list[int], reason: str, *, blameless: bool) -> StopRun | None:
        """Queue the shards again. Only the oldest is suspected: the others were waiting behind it."""
        self._retries.extend(shards)
        if blameless or not shards:
            return None
        suspect = shards[0]
        self._failures[suspect] = self._failures.get(suspect, 0) + 1
        if self._failures[suspect] >= self._max_shard_attempts:
            return StopRun(f"shard {suspect} failed {self._failures[suspect]} times; the last time: {reason}")
        # The others may hold the culprit as well: they too are retried alone, so the next blame is exact.
        for shard in shards[1:]:
            self._failures.setdefault(shard, 0)
        return None

    def _decide(self) -> list[Decision]:
        if self._draining:
            return []
        decisions: list[Decision] = []
        while len(self._workers) < self._target and self._starting < self._waiting:
            self._started += 1
            name = f"worker-{self._started}"
            self._workers[name] = _Worker()
            decisions.append(StartWorker(name))
        for depth in range(1, self._depth + 1):  # breadth first: no worker hoards what another could begin
            for name, worker in self._workers.items():
                spare = depth == 1 or self._waiting > self._starting
                if worker.joined and len(worker.in_flight) < depth and spare and self._accepts_more(worker):
                    decisions.extend(self._assign(name, worker))
        return decisions + self._retire()

    @property
    def _waiting(self) -> int:
        return self._fresh_left + len(self._retries)

    @property
    def _starting(self) -> int:
        return sum(not worker.joined for worker in self._workers.values())

    def _accepts_more(self, worker: _Worker) -> bool:
        return not any(shard in self._failures for shard in worker.in_flight)

    def _assign(self, name: str, worker: _Worker) -> list[Decision]:
        suspect_waits = any(shard in self._failures for shard in self._retries)
        if worker.in_flight and suspect_waits:
            return []  # let a worker run empty: the suspect goes first, and alone
        if self._retries:
            shard = self._retries.popleft()
        elif self._fresh_left:
            shard = next(self._fresh)
            self._fresh_left -= 1
        else:
            return []
        worker.in_flight.append(shard)
        return [Assign(name, shard, attempt=self._failures.get(shard, 0) + 1)]

    def _retire(self) -> list[Decision]:
        if self._waiting:
            return []
        idle = [name for name, worker in self._workers.items() if worker.joined and not worker.in_flight]
        if self.in_flight:  # keep one idle worker warm per shard in flight: it may yet be given back
            idle = idle[self.in_flight :]
        for name in idle:
            del self._workers[name]
        return [StopWorker(name) for name in idle]
