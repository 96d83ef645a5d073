"""Which worker labels which shard: a pure state machine, without Ray, clock or I/O.

Events go in (`handle`), decisions come out; the driver carries them out. Invariants, for any sequence of events:

* a shard is waiting, in flight, or done; it is in flight on one worker, or on two if it was overdue;
* a shard that was part of a failure is retried alone on its worker, so that a second failure can be blamed on it;
* no shard fails more than `max_shard_attempts` times without telling something new: then the run stops with its reason;
* workers that cannot start, or die one after the other, never lead to an endless loop: the run stops, or the GPU that
  they share gets no more work;
* a lost node counts against no shard, unless the same shard was at work on so many of them in a row that it is the
  likelier cause;
* a worker that is killed for want of memory while it has neighbours on its node counts against no shard; if that
  happens again, it is not replaced, and what it held is tried again on one node only.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from ovss_ray.run.events import (
    Assign,
    CapacityChanged,
    CrashedImage,
    Decision,
    Event,
    GroupDone,
    LimitWorkers,
    LoadWorker,
    MarkCrashed,
    SetGpuAside,
    ShardDone,
    ShardFailed,
    ShardOverdue,
    ShardTask,
    StartWorker,
    StopRun,
    StopWorker,
    WorkerDied,
    WorkerFailedToStart,
    WorkerJoined,
    WorkerLeaving,
    WorkerPlaced,
)
from ovss_ray.run.isolation import ShardCase
from ovss_ray.run.sparing import MemoryLimit

MAX_FAILED_STARTS = 3
MAX_LOST_NODES = 5  # with one shard at work on each of them; a further one counts as a death like any other
MAX_GPU_FAULTS = 3  # shards, or starts, that fail on one GPU with nothing done between them


@dataclass
class _Worker:
    name: str
    placed: bool = False
    joined: bool = False
    leaving: bool = False
    set_aside: bool = False
    gpu: str | None = None
    node: str = ""
    shards: list[int] = field(default_factory=list)


class Scheduler:
    """Gives out every shard until it is done.

    Args:
        shards: ids still to be labelled, in the order to give them out; read lazily.
        remaining: how many ids `shards` yields.
        workers: how many workers to keep.
        crashed: images that are known to crash their worker, from earlier starts.
        depth: shards in flight per worker; with 2, one is fetched while the other is on the GPU.
        max_shard_attempts: failures of one shard that stop the run.
    """

    def __init__(
        self,
        shards: Iterable[int],
        *,
        remaining: int,
        workers: int,
        crashed: Iterable[CrashedImage] = (),
        depth: int = 2,
        max_shard_attempts: int = 3,
    ) -> None:
        self._fresh: Iterator[int] = iter(shards)
        self._fresh_left = remaining
        self._retries: deque[int] = deque()
        self._slow: deque[int] = deque()
        self._holders: dict[int, list[str]] = {}  # of every shard in flight
        self._cases: dict[int, ShardCase] = {}
        self._workers: dict[str, _Worker] = {}
        self._retired: set[str] = set()
        self._places = workers
        self._memory = MemoryLimit()
        self._depth = depth
        self._max_shard_attempts = max_shard_attempts
        self._gpu_faults: defaultdict[str, set[int | str]] = defaultdict(set)  # shards and workers, in a row
        self._gpu_reasons: dict[str, str] = {}  # of those that were set aside
        self._lost_nodes: Counter[int] = Counter()  # by the shard that was at work
        self._failed_starts = 0  # in a row
        self._started = 0
        self._draining = False
        self._stopped = False
        for image in crashed:
            self._cases.setdefault(image.shard, ShardCase(image.shard)).crashed[image.image_id] = image

    @property
    def remaining(self) -> int:
        """Shards that are not done."""
        return self._waiting + self.in_flight

    @property
    def in_flight(self) -> int:
        """Shards that a worker holds."""
        return len(self._holders)

    def is_open(self, shard: int) -> bool:
        """Whether a shard is in flight; not once its file exists."""
        return shard in self._holders

    def start(self) -> list[Decision]:
        """The first decisions: the workers to start."""
        return self._decide()

    def drain(self) -> None:
        """Give out nothing more; shards in flight may still finish."""
        self._draining = True

    def handle(self, event: Event) -> list[Decision]:
        """Take one event in and say what to do now.

        What was on its way when its worker was told to stop changes nothing.

        Raises:
            ValueError: the event contradicts what was decided (unknown worker, shard that it does not hold).
        """
        if self._stopped:
            return []
        decisions = self._apply(event) + self._decide()
        stop = next((decision for decision in decisions if isinstance(decision, StopRun)), None)
        if stop is None:
            return decisions
        self._stopped = True
        return [
            *(decision for decision in decisions if isinstance(decision, MarkCrashed | SetGpuAside | LimitWorkers)),
            stop,
        ]

    # -- events ------------------------------------------------------------------------------------------------

    def _apply(self, event: Event) -> list[Decision]:
        match event:
            case CapacityChanged():
                if event.workers < self._places:  # a node went that had no worker any more to tell of it
                    for node in set(self._memory.nodes) - {worker.node for worker in self._workers.values()}:
                        self._memory.gone(node)
                self._places = event.workers
                return []
            case ShardOverdue():
                if event.shard in self._holders and event.shard not in self._slow:
                    self._slow.append(event.shard)
                return []
        if event.worker in self._retired:
            return []
        if event.worker not in self._workers:
            raise ValueError(f"{event} comes from a worker that was never started, or is gone")
        worker = self._workers[event.worker]
        match event:
            case WorkerPlaced():
                return self._on_placed(worker, event)
            case WorkerJoined():
                worker.joined = True
                self._failed_starts = 0
            case WorkerLeaving():
                worker.leaving = True
                self._memory.gone(worker.node)
            case GroupDone():
                self._is_sound(worker)
            case WorkerFailedToStart():
                return self._on_failed_start(worker, event)
            case WorkerDied():
                return self._on_death(worker, event)
            case ShardDone():
                self._on_done(worker, event.shard)
            case ShardFailed():
                return self._on_failed(worker, event)
        return []

    def _on_placed(self, worker: _Worker, event: WorkerPlaced) -> list[Decision]:
        worker.placed, worker.gpu, worker.node = True, event.gpu, event.node
        worker.set_aside = event.gpu is not None and len(self._gpu_faults[event.gpu]) >= MAX_GPU_FAULTS
        return [] if worker.set_aside else [LoadWorker(worker.name)]

    def _on_failed_start(self, worker: _Worker, event: WorkerFailedToStart) -> list[Decision]:
        del self._workers[worker.name]
        if event.blameless or worker.leaving:
            self._memory.gone(worker.node)
            return []
        if event.memory and self._has_neighbours(worker):
            return self._spare_memory(worker, event.reason)
        if worker.gpu is not None and not event.anywhere and not event.memory:
            return self._blame_gpu(worker.gpu, worker.name, event.reason)
        self._failed_starts += 1
        if self._failed_starts < MAX_FAILED_STARTS:
            return []
        return [StopRun(f"{self._failed_starts} workers in a row could not start: {event.reason}")]

    def _on_death(self, worker: _Worker, event: WorkerDied) -> list[Decision]:
        del self._workers[worker.name]
        held = [shard for shard in worker.shards if self._release(worker, shard)]
        if event.blameless or worker.leaving:
            self._memory.gone(worker.node)
        if worker.leaving:
            return []
        if event.blameless:
            if not held or self._is_likely_lost_by_chance(held[0]):
                return []
            lost = f"{self._lost_nodes[held[0]]} nodes in a row were lost with shard {held[0]} at work; the last"
            event = replace(event, reason=f"{lost}: {event.reason}")
        if event.memory and self._has_neighbours(worker):
            for shard in held:
                self._case(shard).was_beside(memory=True)
            return self._spare_memory(worker, event.reason)
        if not held:
            return []
        head, *behind = held
        for shard in behind:
            self._case(shard).was_beside(memory=event.memory)
        case = self._case(head)
        found = case.died(event)
        marked = self._marked(found)
        if event.memory:
            return marked + self._give_up_on(case, event.reason)
        if worker.gpu is not None and (aside := self._blame_gpu(worker.gpu, head, event.reason)):
            for shard in held:
                self._case(shard).acquit()
            return marked + aside
        return marked + self._give_up_on(case, event.reason)

    def _is_likely_lost_by_chance(self, shard: int) -> bool:
        """A node is gone that had this shard at work; an image may have ended more than its worker."""
        self._lost_nodes[shard] += 1
        return self._lost_nodes[shard] <= MAX_LOST_NODES

    def _on_done(self, worker: _Worker, shard: int) -> None:
        self._must_hold(worker, shard)
        self._is_sound(worker)
        worker.shards.remove(shard)
        # A second copy goes on until its worker finds the file; nothing is given out for it again.
        self._holders.pop(shard, None)
        self._cases.pop(shard, None)
        self._lost_nodes.pop(shard, None)

    def _on_failed(self, worker: _Worker, event: ShardFailed) -> list[Decision]:
        self._must_hold(worker, event.shard)
        worker.shards.remove(event.shard)
        was_open = self._release(worker, event.shard)
        if event.final:
            return [StopRun(f"shard {event.shard}: {event.reason}")]
        if not was_open:
            return []
        case = self._case(event.shard)
        case.failed()
        return self._give_up_on(case, event.reason)

    def _give_up_on(self, case: ShardCase, reason: str) -> list[Decision]:
        if case.failures >= self._max_shard_attempts:
            return [StopRun(f"shard {case.shard} failed {case.failures} times; the last time: {reason}")]
        if case.hopeless:
            return [StopRun(f"{len(case.crashed)} images of shard {case.shard} ended their worker; the last: {reason}")]
        return []

    def _marked(self, found: CrashedImage | None) -> list[Decision]:
        if found is None:
            return []
        lifted = found.status == "out_of_memory" and self._memory.found()
        return [MarkCrashed(found), *([LimitWorkers(self._target, None)] if lifted else [])]

    def _spare_memory(self, killed: _Worker, reason: str) -> list[Decision]:
        is_limited = self._memory.killed(killed.node, self._places)
        return [LimitWorkers(self._target, reason)] if is_limited else []

    def _has_neighbours(self, gone: _Worker) -> bool:
        return any(worker.placed and worker.node == gone.node for worker in self._workers.values())

    def _blame_gpu(self, gpu: str, fault: int | str, reason: str) -> list[Decision]:
        """A shard that keeps dying is one fault, whatever the number of its deaths: it is the likelier cause."""
        self._gpu_faults[gpu].add(fault)
        if len(self._gpu_faults[gpu]) != MAX_GPU_FAULTS:
            return []
        self._gpu_reasons[gpu] = reason
        return [SetGpuAside(gpu, reason)]

    def _is_sound(self, worker: _Worker) -> None:
        if worker.gpu is not None:
            self._gpu_faults[worker.gpu].clear()

    def _release(self, worker: _Worker, shard: int) -> bool:
        """Take a shard from a worker that will not finish it; False if it was done elsewhere meanwhile."""
        if shard not in self._holders:
            return False
        self._holders[shard].remove(worker.name)
        if not self._holders[shard]:
            del self._holders[shard]
            self._retries.append(shard)
        return True

    @staticmethod
    def _must_hold(worker: _Worker, shard: int) -> None:
        if shard not in worker.shards:
            raise ValueError(f"shard {shard} is not in flight on {worker.name}")

    def _case(self, shard: int) -> ShardCase:
        return self._cases.setdefault(shard, ShardCase(shard, attempts=1))

    # -- decisions ---------------------------------------------------------------------------------------------

    def _decide(self) -> list[Decision]:
        if self._draining:
            return self._retire(self._of_leaving_nodes())
        if stuck := self._stuck():
            return [stuck]
        return [
            *self._start_workers(),
            *self._give_out(),
            *self._copy_slow(),
            *self._retire([*self._of_leaving_nodes(), *self._idle()]),
        ]

    def _stuck(self) -> StopRun | None:
        aside = [worker for worker in self._workers.values() if worker.set_aside]
        if not self.remaining or not aside or len(aside) < max(len(self._workers), self._target):
            return None
        gpus = "; ".join(f"{gpu}: {reason}" for gpu, reason in sorted(self._gpu_reasons.items()))
        return StopRun(f"workers fail on every GPU, one after the other ({gpus})")

    def _start_workers(self) -> list[Decision]:
        staying = [worker for worker in self._workers.values() if not worker.leaving]
        waiting = [worker for worker in reversed(staying) if not worker.placed]
        decisions = self._retire(waiting[: max(len(staying) - self._target, 0)])  # their places are gone
        for _ in range(min(self._target - len(staying), self._waiting - self._starting)):
            self._started += 1
            name = f"worker-{self._started}"
            self._workers[name] = _Worker(name)
            decisions.append(StartWorker(name))
        return decisions

    def _give_out(self) -> list[Decision]:
        decisions: list[Decision] = []
        for depth in range(1, self._depth + 1):  # breadth first: no worker hoards what another could begin
            reserved = 0 if depth == 1 else self._starting
            for worker in self._workers.values():
                if self._waiting <= reserved:
                    break
                if worker.joined and not worker.leaving and len(worker.shards) < depth:
                    decisions += self._next_for(worker)
        return decisions

    def _next_for(self, worker: _Worker) -> list[Decision]:
        if any(self._is_alone(shard) for shard in worker.shards):
            return []
        emptied = self._emptied_node()
        mine = [shard for shard in self._retries if self._may_have(worker, shard, emptied)]
        if worker.shards and any(self._is_alone(shard) for shard in mine):
            return []  # let a worker run empty: the suspect goes first, and alone
        if mine:
            shard = mine[0]
            self._retries.remove(shard)
        elif self._fresh_left:
            shard = next(self._fresh)
            self._fresh_left -= 1
        else:
            return []
        return [self._assign(worker, shard)]

    def _may_have(self, worker: _Worker, shard: int, emptied: str | None) -> bool:
        starved = shard in self._cases and self._cases[shard].starved
        return not starved or emptied is None or worker.node == emptied

    def _emptied_node(self) -> str | None:
        """Where shards are tried again whose worker was killed for want of memory; None if they may go anywhere."""
        nodes = self._memory.nodes
        if not nodes:
            return None
        staying = {w.node for w in self._workers.values() if w.placed and not (w.leaving or w.set_aside)}
        return next((node for node in nodes if node in staying), None)

    def _assign(self, worker: _Worker, shard: int) -> Assign:
        worker.shards.append(shard)
        self._holders.setdefault(shard, []).append(worker.name)
        task = self._cases[shard].task() if shard in self._cases else ShardTask(shard, attempt=1)
        return Assign(worker.name, task)

    def _copy_slow(self) -> list[Decision]:
        """Second copies of overdue shards, once nothing else is left; safe, because a file is created at most once."""
        decisions: list[Decision] = []
        while self._slow and not self._waiting:
            idle = next((w for w in self._workers.values() if w.joined and not w.leaving and not w.shards), None)
            if idle is None:
                break
            shard = self._slow.popleft()
            if len(self._holders.get(shard, ())) == 1 and not self._is_alone(shard):
                decisions.append(self._assign(idle, shard))
        return decisions

    def _is_alone(self, shard: int) -> bool:
        return shard in self._cases and self._cases[shard].alone

    def _of_leaving_nodes(self) -> list[_Worker]:
        return [worker for worker in self._workers.values() if worker.leaving and not worker.shards]

    def _idle(self) -> list[_Worker]:
        """Workers that are not needed any more; one stays for each shard in flight, which may yet be given back."""
        if self._waiting:
            return []
        idle = [
            worker for worker in self._workers.values() if worker.joined and not worker.leaving and not worker.shards
        ]
        return idle[self.in_flight :]

    def _retire(self, workers: list[_Worker]) -> list[Decision]:
        for worker in workers:
            del self._workers[worker.name]
            self._retired.add(worker.name)
        return [StopWorker(worker.name) for worker in workers]

    @property
    def _target(self) -> int:
        """How many workers to keep."""
        return self._memory.of(self._places)

    @property
    def _waiting(self) -> int:
        return self._fresh_left + len(self._retries)

    @property
    def _starting(self) -> int:
        return sum(not (worker.joined or worker.set_aside or worker.leaving) for worker in self._workers.values())
