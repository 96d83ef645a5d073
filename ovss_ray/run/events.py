"""What the scheduler hears (events) and what it says (decisions); plain values that pool, driver and worker share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# -- work ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CrashedImage:
    """An image that ends the process that decodes or segments it, or keeps it busy for ever.

    Attributes:
        status: of its row: "crashed", "timeout" if it did not end, or "out_of_memory" if its worker was killed because
            it used up the memory of its node.
        reason: what became of the worker.
    """

    shard: int
    image_id: int
    status: Literal["crashed", "timeout", "out_of_memory"]
    reason: str


@dataclass(frozen=True)
class ShardTask:
    """A shard as it is given to a worker.

    Attributes:
        shard: its id.
        attempt: how often it was given out, this time included.
        crashed: images that get their row without being touched.
        careful: say which images come next before touching them, so that a death names its cause.
        suspects: ids to try first and one by one; only with `careful`.
        confirm: the suspect that seems to be the cause, which is tried before the others.
    """

    shard: int
    attempt: int
    crashed: tuple[CrashedImage, ...] = ()
    careful: bool = False
    suspects: tuple[int, ...] = ()
    confirm: int | None = None


# -- events ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WorkerPlaced:
    """A worker's process runs.

    Attributes:
        gpu: names its GPU, "node/index"; None if it has none.
        node: where it runs; workers on one node share its memory.
    """

    worker: str
    gpu: str | None = None
    node: str = ""


@dataclass(frozen=True)
class WorkerJoined:
    """A worker has loaded its segmenter and waits for shards."""

    worker: str


@dataclass(frozen=True)
class WorkerFailedToStart:
    """A worker could not load its segmenter, or died while it did.

    Attributes:
        blameless: its node went away.
        anywhere: it would fail on any device (weights missing, wrong setting).
        memory: it was killed because the memory of its node ran out.
    """

    worker: str
    reason: str
    blameless: bool = False
    anywhere: bool = False
    memory: bool = False


@dataclass(frozen=True)
class WorkerLeaving:
    """The node of a worker is about to go: what it holds may finish, more is not given to it."""

    worker: str


@dataclass(frozen=True)
class WorkerDied:
    """A worker's process is gone.

    Attributes:
        blameless: its node went away or was preempted, so no shard is to blame, if that does not go on and on.
        group: the images that it had announced before, if its shard was done carefully.
        hung: it was killed because it did not end.
        memory: it was killed because the memory of its node ran out, by its own fault or by that of its neighbours.
    """

    worker: str
    reason: str
    blameless: bool = False
    group: tuple[int, ...] = ()
    hung: bool = False
    memory: bool = False


@dataclass(frozen=True)
class GroupDone:
    """A worker has got through the images that it had announced."""

    worker: str


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


@dataclass(frozen=True)
class ShardOverdue:
    """The shard takes much longer than others do."""

    shard: int


@dataclass(frozen=True)
class CapacityChanged:
    """The cluster has room for so many workers now."""

    workers: int


Event = (
    WorkerPlaced
    | WorkerJoined
    | WorkerFailedToStart
    | WorkerLeaving
    | WorkerDied
    | GroupDone
    | ShardDone
    | ShardFailed
    | ShardOverdue
    | CapacityChanged
)

# -- decisions -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StartWorker:
    """Start one more worker; its name is in the events that come from it."""

    worker: str


@dataclass(frozen=True)
class LoadWorker:
    """Let a placed worker load its segmenter. A worker on a GPU that was set aside never gets this."""

    worker: str


@dataclass(frozen=True)
class Assign:
    """Give the shard to the worker."""

    worker: str
    task: ShardTask


@dataclass(frozen=True)
class StopWorker:
    """The worker has nothing left to do, or its node is about to go; it may be loading still."""

    worker: str


@dataclass(frozen=True)
class MarkCrashed:
    """Remember the image, so that no later start touches it again."""

    image: CrashedImage


@dataclass(frozen=True)
class SetGpuAside:
    """Workers fail on this GPU one after the other: it gets no more work in this session."""

    gpu: str
    reason: str


@dataclass(frozen=True)
class LimitWorkers:
    """Workers were killed for want of memory: no more than so many are kept now. `reason` is None if all are again."""

    workers: int
    reason: str | None


@dataclass(frozen=True)
class StopRun:
    """Give up: the reason is for the user, and nothing that was finished is lost."""

    reason: str


Decision = StartWorker | LoadWorker | Assign | StopWorker | MarkCrashed | SetGpuAside | LimitWorkers | StopRun
