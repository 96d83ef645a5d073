"""What the scheduler's events and decisions of a session come to: workers, deaths, attempts, crashed images. Pure."""

from __future__ import annotations

from collections import Counter
from typing import Literal

from ovss_ray.run.events import (
    Assign,
    Decision,
    Event,
    LimitWorkers,
    MarkCrashed,
    SetGpuAside,
    StartWorker,
    StopWorker,
    WorkerDied,
    WorkerFailedToStart,
    WorkerJoined,
)

Death = Literal["crashed", "hung", "out_of_memory", "lost_node", "failed_start"]


class Incidents:
    """Counts what happened to the workers of one session.

    Attributes:
        worker_deaths: workers that ended against the driver's will, by kind.
        shard_retries: times that a shard was given out again, copies of overdue ones included.
        crashed_images: images found to end their worker.
        gpus_set_aside: GPUs that get no more work.
        workers_limited_to: the fewest workers that were kept because others were killed for want of memory; None if
            there was no need.
    """

    def __init__(self) -> None:
        self.worker_deaths: Counter[Death] = Counter()
        self.shard_retries = 0
        self.crashed_images = 0
        self.gpus_set_aside = 0
        self.workers_limited_to: int | None = None
        self._starting: set[str] = set()
        self._ready: set[str] = set()
        self._newest_shard = -1

    @property
    def workers(self) -> dict[str, int]:
        """Workers now: those that are `starting` (waiting for a place, loading), and those `ready` for shards."""
        return {"starting": len(self._starting), "ready": len(self._ready)}

    def heard(self, event: Event) -> None:
        """Take in an event before the scheduler handles it."""
        match event:
            case WorkerJoined():
                self._starting.discard(event.worker)
                self._ready.add(event.worker)
            case WorkerFailedToStart():
                self._gone(event.worker)
                self.worker_deaths[_kind(event, "failed_start")] += 1
            case WorkerDied():
                self._gone(event.worker)
                self.worker_deaths[_kind(event, "hung" if event.hung else "crashed")] += 1

    def decided(self, decision: Decision) -> None:
        """Take in a decision of the scheduler."""
        match decision:
            case StartWorker():
                self._starting.add(decision.worker)
            case StopWorker():
                self._gone(decision.worker)
            case Assign():
                # Shards are begun in ascending order: nothing need be remembered that grows with the run.
                self.shard_retries += decision.task.shard <= self._newest_shard
                self._newest_shard = max(self._newest_shard, decision.task.shard)
            case MarkCrashed():
                self.crashed_images += 1
            case SetGpuAside():
                self.gpus_set_aside += 1
            case LimitWorkers(workers, str()):
                self.workers_limited_to = min(workers, self.workers_limited_to or workers)

    def closed(self) -> None:
        """The session is over, and its workers with it."""
        self._starting.clear()
        self._ready.clear()

    def _gone(self, worker: str) -> None:
        self._starting.discard(worker)
        self._ready.discard(worker)


def _kind(event: WorkerDied | WorkerFailedToStart, otherwise: Death) -> Death:
    return "lost_node" if event.blameless else "out_of_memory" if event.memory else otherwise
