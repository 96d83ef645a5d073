"""The scheduler under chosen and under random sequences of events."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovss_ray.run.events import (
    Assign,
    CapacityChanged,
    CrashedImage,
    Decision,
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
from ovss_ray.run.isolation import MAX_CRASHED_PER_SHARD, groups_of
from ovss_ray.run.scheduler import MAX_LOST_NODES, Scheduler


def make(shards: int, workers: int, **options: int) -> Scheduler:
    return Scheduler(iter(range(shards)), remaining=shards, workers=workers, **options)


def join(scheduler: Scheduler, number: int, gpu: str | None = None, node: str = "") -> list[Decision]:
    """A worker that was started is placed, loads and joins; what it is given then."""
    name = f"worker-{number}"
    assert LoadWorker(name) in scheduler.handle(WorkerPlaced(name, gpu, node))
    return scheduler.handle(WorkerJoined(name))


def gave(number: int, shard: int, attempt: int = 1, *, careful: bool = False) -> Assign:
    return Assign(f"worker-{number}", ShardTask(shard, attempt, careful=careful))


def test_every_shard_is_given_out_once_and_in_order_to_one_worker() -> None:
    scheduler = make(5, 1)
    assert scheduler.start() == [StartWorker("worker-1")]
    assert join(scheduler, 1) == [gave(1, 0), gave(1, 1)]
    given_out = [0, 1]
    for shard in range(5):
        for decision in scheduler.handle(ShardDone("worker-1", shard)):
            if isinstance(decision, Assign):
                given_out.append(decision.task.shard)
    assert given_out == [0, 1, 2, 3, 4]
    assert scheduler.remaining == 0


def test_no_worker_hoards_what_another_could_begin() -> None:
    scheduler = make(2, 2)
    scheduler.start()
    assert join(scheduler, 1) == [gave(1, 0)]
    assert join(scheduler, 2) == [gave(2, 1)]


def test_work_does_not_wait_for_a_worker_that_never_comes() -> None:
    scheduler = make(2, 2)
    scheduler.start()
    join(scheduler, 1)
    assert scheduler.handle(ShardDone("worker-1", 0)) == [gave(1, 1)]
    scheduler.handle(ShardDone("worker-1", 1))
    assert scheduler.remaining == 0


def test_starts_no_more_workers_than_shards() -> None:
    assert make(2, 8).start() == [StartWorker("worker-1"), StartWorker("worker-2")]
    assert make(0, 8).start() == []


def test_a_dead_worker_is_replaced_and_its_shards_are_retried_carefully_and_one_at_a_time() -> None:
    scheduler = make(4, 1)
    scheduler.start()
    join(scheduler, 1)
    assert scheduler.handle(WorkerDied("worker-1", "killed")) == [StartWorker("worker-2")]
    assert join(scheduler, 2) == [gave(2, 0, attempt=2, careful=True)]
    assert scheduler.handle(ShardDone("worker-2", 0)) == [gave(2, 1, attempt=2, careful=True)]
    assert scheduler.handle(ShardDone("worker-2", 1)) == [gave(2, 2), gave(2, 3)]


def test_a_lost_node_is_nobodys_fault() -> None:
    scheduler = make(1, 1, max_shard_attempts=1)
    scheduler.start()
    for number in range(1, MAX_LOST_NODES + 1):
        assert join(scheduler, number) == [gave(number, 0)]
        died = WorkerDied(f"worker-{number}", "preempted", blameless=True)
        assert scheduler.handle(died) == [StartWorker(f"worker-{number + 1}")]


def test_an_image_that_takes_its_node_with_it_is_found_at_last() -> None:
    scheduler = make(1, 1)
    scheduler.start()
    groups: list[tuple[int, ...]] = [(), (4, 5, 6, 7), (6,), (6,)]  # of the deaths that count
    for number in range(1, MAX_LOST_NODES + 5):
        join(scheduler, number)
        group = groups[max(number - MAX_LOST_NODES - 1, 0)]
        decisions = scheduler.handle(WorkerDied(f"worker-{number}", "gone", blameless=True, group=group))
    reason = "9 nodes in a row were lost with shard 0 at work; the last: gone"
    assert decisions == [MarkCrashed(CrashedImage(0, 6, "crashed", reason)), StartWorker("worker-10")]


def test_a_shard_on_which_every_node_is_lost_stops_the_run() -> None:
    scheduler = make(1, 1, max_shard_attempts=2)
    scheduler.start()
    for number in range(1, MAX_LOST_NODES + 3):
        join(scheduler, number)
        (decision,) = scheduler.handle(WorkerDied(f"worker-{number}", "gone", blameless=True))
    assert decision == StopRun(
        "shard 0 failed 2 times; the last time: 7 nodes in a row were lost with shard 0 at work; the last: gone"
    )


def test_a_shard_that_keeps_failing_stops_the_run_with_its_reason() -> None:
    scheduler = make(3, 1, max_shard_attempts=2)
    scheduler.start()
    join(scheduler, 1)
    scheduler.handle(ShardFailed("worker-1", 0, "store is down"))
    scheduler.handle(ShardDone("worker-1", 1))
    assert scheduler.handle(ShardFailed("worker-1", 0, "store is still down")) == [
        StopRun("shard 0 failed 2 times; the last time: store is still down")
    ]
    assert scheduler.handle(WorkerDied("worker-1", "late")) == []


def test_a_final_failure_stops_the_run_at_once() -> None:
    scheduler = make(3, 1)
    scheduler.start()
    join(scheduler, 1)
    stop = scheduler.handle(ShardFailed("worker-1", 1, "no space left", final=True))
    assert stop == [StopRun("shard 1: no space left")]


def test_workers_that_cannot_start_stop_the_run_after_three_in_a_row() -> None:
    scheduler = make(3, 1)
    scheduler.start()
    assert scheduler.handle(WorkerFailedToStart("worker-1", "no weights")) == [StartWorker("worker-2")]
    assert scheduler.handle(WorkerFailedToStart("worker-2", "lost", blameless=True)) == [StartWorker("worker-3")]
    assert scheduler.handle(WorkerFailedToStart("worker-3", "no weights")) == [StartWorker("worker-4")]
    assert scheduler.handle(WorkerFailedToStart("worker-4", "no weights")) == [
        StopRun("3 workers in a row could not start: no weights")
    ]


def test_draining_gives_out_nothing_more() -> None:
    scheduler = make(9, 1)
    scheduler.start()
    join(scheduler, 1)
    scheduler.drain()
    assert scheduler.handle(ShardDone("worker-1", 0)) == []
    assert scheduler.handle(ShardDone("worker-1", 1)) == []
    assert (scheduler.in_flight, scheduler.remaining) == (0, 7)


def test_an_event_that_contradicts_the_decisions_is_refused() -> None:
    scheduler = make(9, 1)
    scheduler.start()
    with pytest.raises(ValueError, match="never started"):
        scheduler.handle(WorkerJoined("worker-7"))
    join(scheduler, 1)
    with pytest.raises(ValueError, match="shard 5 is not in flight"):
        scheduler.handle(ShardDone("worker-1", 5))


class TestGpus:
    def test_a_gpu_on_which_different_shards_die_is_set_aside_and_the_data_is_not_blamed(self) -> None:
        scheduler = make(50, 2, depth=1)
        scheduler.start()
        join(scheduler, 1, "node/0")
        join(scheduler, 2, "node/1")
        for number in (2, 3, 4):
            decisions = scheduler.handle(WorkerDied(f"worker-{number}", "fell off the bus"))
            if number < 4:
                # The other GPU takes the shard that was given back, and gets it done.
                scheduler.handle(ShardDone("worker-1", 0 if number == 2 else number - 2))
                join(scheduler, number + 1, "node/1")
        assert decisions == [SetGpuAside("node/1", "fell off the bus"), StartWorker("worker-5")]
        assert scheduler.handle(WorkerPlaced("worker-5", "node/1")) == []  # it holds the GPU, and gets nothing
        assert scheduler.handle(ShardDone("worker-1", 2)) == [gave(1, 3, attempt=2, careful=True)]

    def test_a_shard_that_keeps_dying_is_not_held_against_the_gpu(self) -> None:
        scheduler = make(50, 1, depth=1)
        scheduler.start()
        groups = [(), (0, 1), (0,), (0,)]
        for number, group in enumerate(groups, 1):
            join(scheduler, number, "node/0")
            decisions = scheduler.handle(WorkerDied(f"worker-{number}", "killed", group=group))
        assert decisions == [MarkCrashed(CrashedImage(0, 0, "crashed", "killed")), StartWorker("worker-5")]

    def test_a_gpu_that_breaks_workers_while_they_load_is_set_aside_while_others_work(self) -> None:
        scheduler = make(50, 2)
        scheduler.start()
        join(scheduler, 1, "node/0")
        for number in range(2, 5):
            assert scheduler.handle(WorkerPlaced(f"worker-{number}", "node/1")) == [LoadWorker(f"worker-{number}")]
            decisions = scheduler.handle(WorkerFailedToStart(f"worker-{number}", "CUDA error"))
        assert decisions == [SetGpuAside("node/1", "CUDA error"), StartWorker("worker-5")]

    def test_when_every_gpu_is_set_aside_the_run_stops(self) -> None:
        scheduler = make(50, 1)
        scheduler.start()
        for number in range(1, 4):
            scheduler.handle(WorkerPlaced(f"worker-{number}", "node/0"))
            scheduler.handle(WorkerFailedToStart(f"worker-{number}", "CUDA error"))
        (stop,) = scheduler.handle(WorkerPlaced("worker-4", "node/0"))
        assert isinstance(stop, StopRun)
        assert "node/0" in stop.reason


class TestMemory:
    def test_the_first_worker_killed_beside_others_is_replaced_and_the_next_one_is_not(self) -> None:
        scheduler = make(50, 3, depth=1, max_shard_attempts=1)
        scheduler.start()
        for number in (1, 2, 3):
            join(scheduler, number)
        assert scheduler.handle(WorkerDied("worker-1", "no memory", memory=True)) == [StartWorker("worker-4")]
        assert join(scheduler, 4) == [gave(4, 0, attempt=2, careful=True)]
        assert scheduler.handle(WorkerDied("worker-2", "no memory", memory=True)) == [LimitWorkers(2, "no memory")]
        assert scheduler.handle(WorkerDied("worker-3", "no memory", memory=True)) == [LimitWorkers(1, "no memory")]
        assert scheduler.handle(CapacityChanged(4)) == [StartWorker("worker-5")]  # 4 places, of which 2 stay empty

    def test_once_the_image_is_found_all_places_are_used_again(self) -> None:
        scheduler = make(50, 2, depth=1)
        scheduler.start()
        join(scheduler, 1)
        join(scheduler, 2)
        scheduler.handle(WorkerDied("worker-1", "no memory", memory=True))
        join(scheduler, 3)
        scheduler.handle(ShardDone("worker-2", 1))
        assert scheduler.handle(WorkerDied("worker-2", "no memory", memory=True)) == [LimitWorkers(1, "no memory")]
        scheduler.handle(WorkerDied("worker-3", "no memory", group=(0, 1), memory=True))
        join(scheduler, 4)
        scheduler.handle(ShardDone("worker-4", 2))
        scheduler.handle(WorkerDied("worker-4", "no memory", group=(0,), memory=True))
        join(scheduler, 5)
        decisions = scheduler.handle(WorkerDied("worker-5", "no memory", group=(0,), memory=True))
        assert decisions == [
            MarkCrashed(CrashedImage(0, 0, "out_of_memory", "no memory")),
            LimitWorkers(2, None),
            StartWorker("worker-6"),
            StartWorker("worker-7"),
        ]

    def test_neighbours_are_those_on_the_same_node(self) -> None:
        scheduler = make(50, 2, depth=1, max_shard_attempts=1)
        scheduler.start()
        join(scheduler, 1, node="one")
        join(scheduler, 2, node="other")
        (stop,) = scheduler.handle(WorkerDied("worker-1", "no memory", memory=True))
        assert stop == StopRun("shard 0 failed 1 times; the last time: no memory")

    def test_what_was_killed_is_tried_again_on_the_node_that_was_short_of_memory_first(self) -> None:
        scheduler = make(50, 4, depth=1)
        scheduler.start()
        for number, node in enumerate(["one", "one", "two", "two"], 1):
            join(scheduler, number, node=node)
        scheduler.handle(WorkerDied("worker-1", "no memory", memory=True))
        assert scheduler.handle(ShardDone("worker-3", 2)) == [gave(3, 4)]
        assert scheduler.handle(ShardDone("worker-2", 1)) == [gave(2, 0, attempt=2, careful=True)]

    @pytest.mark.parametrize("goes", ["dies", "leaves", "shrinks"])
    def test_places_that_were_left_empty_on_a_node_are_not_missed_once_it_is_gone(self, goes: str) -> None:
        scheduler = make(50, 4, depth=1)
        scheduler.start()
        for number, node in enumerate(["one", "one", "two", "two"], 1):
            join(scheduler, number, node=node)
        scheduler.handle(WorkerDied("worker-1", "no memory", memory=True))
        join(scheduler, 5, node="one")
        assert LimitWorkers(3, "no memory") in scheduler.handle(WorkerDied("worker-2", "no memory", memory=True))
        if goes == "leaves":
            decisions = scheduler.handle(WorkerLeaving("worker-5"))
        elif goes == "dies":
            decisions = scheduler.handle(WorkerDied("worker-5", "lost", blameless=True))
        else:
            scheduler.handle(WorkerDied("worker-5", "killed"))
            decisions = scheduler.handle(CapacityChanged(3)) + scheduler.handle(CapacityChanged(4))
        assert sum(isinstance(decision, StartWorker) for decision in decisions) == (1 if goes == "shrinks" else 2)

    def test_workers_for_which_there_is_no_memory_while_they_load_stop_the_run_once_one_is_left(self) -> None:
        scheduler = make(50, 2)
        scheduler.start()
        for number in (1, 2):
            scheduler.handle(WorkerPlaced(f"worker-{number}"))
        told: list[Decision] = []
        for number in range(1, 9):
            told = scheduler.handle(WorkerFailedToStart(f"worker-{number}", "no memory", memory=True))
            for decision in told:
                if isinstance(decision, StartWorker):
                    scheduler.handle(WorkerPlaced(decision.worker))
            if any(isinstance(decision, StopRun) for decision in told):
                break
        assert told == [StopRun("3 workers in a row could not start: no memory")]
        assert number == 5

    def test_a_gpu_is_not_blamed_for_want_of_memory(self) -> None:
        scheduler = make(50, 1, depth=1)
        scheduler.start()
        for number, group in enumerate([(), (0, 1), (0,), (0,)], 1):
            join(scheduler, number, "node/0")
            decisions = scheduler.handle(WorkerDied(f"worker-{number}", "no memory", group=group, memory=True))
            assert not any(isinstance(decision, SetGpuAside) for decision in decisions)


class TestElastic:
    def test_workers_are_added_when_places_appear(self) -> None:
        scheduler = make(50, 1)
        scheduler.start()
        assert scheduler.handle(CapacityChanged(3)) == [StartWorker("worker-2"), StartWorker("worker-3")]

    def test_workers_that_wait_for_a_place_that_is_gone_are_given_up(self) -> None:
        scheduler = make(50, 3)
        scheduler.start()
        join(scheduler, 1)
        assert scheduler.handle(CapacityChanged(1)) == [StopWorker("worker-3"), StopWorker("worker-2")]

    def test_a_worker_on_a_leaving_node_finishes_what_it_holds(self) -> None:
        scheduler = make(50, 1)
        scheduler.start()
        join(scheduler, 1)
        assert scheduler.handle(WorkerLeaving("worker-1")) == [StartWorker("worker-2")]
        assert scheduler.handle(ShardDone("worker-1", 0)) == []
        assert scheduler.handle(ShardDone("worker-1", 1)) == [StopWorker("worker-1")]

    def test_one_that_holds_nothing_is_stopped_at_once_and_heard_no_more(self) -> None:
        scheduler = make(1, 1)
        scheduler.start()
        join(scheduler, 1)
        assert scheduler.handle(ShardDone("worker-1", 0)) == [StopWorker("worker-1")]
        for late in (WorkerLeaving("worker-1"), WorkerFailedToStart("worker-1", "lost")):
            assert scheduler.handle(late) == []
        assert scheduler.remaining == 0

    def test_it_is_not_blamed_if_it_does_not_get_that_far(self) -> None:
        scheduler = make(50, 1)
        scheduler.start()
        join(scheduler, 1)
        scheduler.handle(WorkerLeaving("worker-1"))
        scheduler.handle(WorkerDied("worker-1", "preempted"))
        assert join(scheduler, 2) == [gave(2, 0), gave(2, 1)]

    def test_idle_workers_go_but_for_one_per_shard_in_flight(self) -> None:
        scheduler = make(3, 3, depth=1)
        scheduler.start()
        for number in (1, 2, 3):
            join(scheduler, number)
        assert scheduler.handle(ShardDone("worker-1", 0)) == []
        assert scheduler.handle(ShardDone("worker-2", 1)) == [StopWorker("worker-2")]


class TestStragglers:
    @pytest.fixture
    def tail(self) -> Scheduler:
        scheduler = make(2, 2, depth=1)
        scheduler.start()
        join(scheduler, 1)
        join(scheduler, 2)
        scheduler.handle(ShardDone("worker-2", 1))
        return scheduler

    def test_an_idle_worker_gets_a_copy_and_the_first_to_finish_counts(self, tail: Scheduler) -> None:
        assert tail.handle(ShardOverdue(0)) == [gave(2, 0)]
        assert tail.handle(ShardOverdue(0)) == []
        tail.handle(ShardDone("worker-2", 0))
        assert tail.remaining == 0
        assert not tail.is_open(0)
        tail.handle(ShardDone("worker-1", 0))  # it found the file
        assert tail.remaining == 0

    def test_the_copy_goes_on_when_the_first_dies(self, tail: Scheduler) -> None:
        tail.handle(ShardOverdue(0))
        assert tail.handle(WorkerDied("worker-1", "killed")) == []
        assert tail.in_flight == 1
        tail.handle(ShardDone("worker-2", 0))
        assert tail.remaining == 0

    def test_a_shard_is_given_back_only_when_both_are_gone(self, tail: Scheduler) -> None:
        tail.handle(ShardOverdue(0))
        tail.handle(WorkerDied("worker-1", "killed", blameless=True))
        assert tail.handle(WorkerDied("worker-2", "killed", blameless=True)) == [StartWorker("worker-3")]
        assert tail.remaining == 1

    def test_no_copy_while_other_work_waits(self) -> None:
        scheduler = make(3, 2, depth=1)
        scheduler.start()
        join(scheduler, 1)
        join(scheduler, 2)
        scheduler.handle(ShardOverdue(0))
        assert scheduler.handle(ShardDone("worker-2", 1)) == [gave(2, 2)]
        assert scheduler.handle(ShardDone("worker-2", 2)) == [gave(2, 0)]


# -- worlds in which anything may happen -----------------------------------------------------------------------

SIZE = 12


@dataclass
class World:
    """Workers that do what they are told, some of them on images that kill them."""

    scheduler: Scheduler
    poison: set[tuple[int, int]] = field(default_factory=set)
    batch: int = 4
    hogs: set[tuple[int, int]] = field(default_factory=set)  # images for which a worker of their node is killed
    node_of: dict[str, str] = field(default_factory=dict)
    starting: set[str] = field(default_factory=set)
    placed: set[str] = field(default_factory=set)
    held: dict[str, list[ShardTask]] = field(default_factory=dict)
    retired: set[str] = field(default_factory=set)
    announced: dict[str, int] = field(default_factory=dict)  # number of the group that comes next, if careful
    done: list[int] = field(default_factory=list)
    marked: list[CrashedImage] = field(default_factory=list)
    deaths: int = 0
    stopped: str | None = None

    def carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            assert self.stopped is None
            match decision:
                case StartWorker(name):
                    self.starting.add(name)
                case LoadWorker(name):
                    self.placed.remove(name)
                    self.held[name] = []
                    self.carry_out(self.scheduler.handle(WorkerJoined(name)))
                case Assign(name, task):
                    assert task.shard not in self.done
                    holders = [other for other, tasks in self.held.items() if task.shard in [t.shard for t in tasks]]
                    assert len(holders) <= 1
                    assert name not in holders
                    if task.careful:
                        assert self.held[name] == []
                    self.held[name].append(task)
                    self.announced[name] = 0
                case StopWorker(name):
                    assert not self.held.pop(name, [])
                    self.starting.discard(name)
                    self.placed.discard(name)
                    self.retired.add(name)
                case MarkCrashed(image):
                    self.marked.append(image)
                case StopRun(reason):
                    assert reason
                    self.stopped = reason

    def place(self, name: str, gpu: str | None, node: str = "") -> None:
        self.starting.remove(name)
        self.placed.add(name)
        self.node_of[name] = node
        self.carry_out(self.scheduler.handle(WorkerPlaced(name, gpu, node)))

    def neighbours(self, name: str) -> list[str]:
        """The workers that share its memory, itself included."""
        return sorted(other for other in self.held if self.node_of[other] == self.node_of[name])

    def work(self, name: str, victim: str | None = None) -> None:
        """One step of the shard that the worker is on: all of it, or one group. Want of memory kills the victim."""
        task = self.held[name][0]
        groups = self.groups(task)
        group = self.announced_group(name)
        touched = group if task.careful else [image_id for group in groups for image_id in group]
        if any((task.shard, image_id) in self.poison for image_id in touched):
            self.die(name, group=group)
        elif any((task.shard, image_id) in self.hogs for image_id in touched):
            killed = victim or name
            self.die(killed, group=self.announced_group(killed) if self.held[killed] else (), memory=True)
        elif task.careful and self.announced[name] + 1 < len(groups):
            self.announced[name] += 1
            self.carry_out(self.scheduler.handle(GroupDone(name)))
        else:
            self.finish(name, task)

    def groups(self, task: ShardTask) -> list[tuple[int, ...]]:
        ids = range(task.shard * SIZE, (task.shard + 1) * SIZE)
        groups = groups_of(task, ids, self.batch)
        assert sorted(i for group in groups for i in group) == sorted(set(ids) - {c.image_id for c in task.crashed})
        return groups

    def announced_group(self, name: str) -> tuple[int, ...]:
        task = self.held[name][0]
        groups = self.groups(task)
        return groups[self.announced[name]] if task.careful and groups else ()

    def finish(self, name: str, task: ShardTask) -> None:
        self.held[name].remove(task)
        self.announced[name] = 0
        if self.scheduler.is_open(task.shard):
            self.done.append(task.shard)
        self.carry_out(self.scheduler.handle(ShardDone(name, task.shard)))

    def die(self, name: str, *, blameless: bool = False, group: tuple[int, ...] = (), memory: bool = False) -> None:
        del self.held[name]
        self.deaths += not blameless
        event = WorkerDied(name, "dead", blameless=blameless, group=group, memory=memory)
        self.carry_out(self.scheduler.handle(event))

    def check(self, shards: int) -> None:
        assert len(set(self.done)) == len(self.done)
        if self.stopped is None:
            assert self.scheduler.remaining == shards - len(self.done)
            in_flight = {task.shard for tasks in self.held.values() for task in tasks} - set(self.done)
            assert self.scheduler.in_flight == len(in_flight)


@settings(max_examples=500, deadline=None)
@given(
    data=st.data(),
    shards=st.integers(1, 8),
    workers=st.integers(1, 4),
    depth=st.integers(1, 3),
    batch=st.integers(1, 12),
)
def test_exactly_the_poison_images_are_found_with_at_most_four_deaths_each(
    data: st.DataObject, shards: int, workers: int, depth: int, batch: int
) -> None:
    ids = st.integers(0, shards * SIZE - 1)
    poison = {(image_id // SIZE, image_id) for image_id in data.draw(st.sets(ids, max_size=3))}
    world = World(make(shards, workers, depth=depth), poison, batch)
    world.carry_out(world.scheduler.start())
    for _ in range(10_000):
        if world.stopped or not world.scheduler.remaining:
            break
        if world.starting:
            world.place(min(world.starting), None)
        else:
            world.work(data.draw(st.sampled_from(sorted(name for name, tasks in world.held.items() if tasks))))
        world.check(shards)
    assert world.stopped is None
    assert sorted(world.done) == list(range(shards))
    assert {(image.shard, image.image_id) for image in world.marked} == poison
    assert len(world.marked) == len(poison)
    assert world.deaths <= 4 * len(poison)


@settings(max_examples=500, deadline=None)
@given(
    data=st.data(),
    shards=st.integers(1, 8),
    workers=st.integers(1, 5),
    nodes=st.integers(1, 2),
    depth=st.integers(1, 3),
    batch=st.integers(1, 12),
)
def test_exactly_the_images_that_take_the_memory_are_found_whichever_worker_is_killed_for_them(
    data: st.DataObject, shards: int, workers: int, nodes: int, depth: int, batch: int
) -> None:
    ids = st.integers(0, shards * SIZE - 1)
    hogs = {(image_id // SIZE, image_id) for image_id in data.draw(st.sets(ids, max_size=3))}
    world = World(make(shards, workers, depth=depth), batch=batch, hogs=hogs)
    world.carry_out(world.scheduler.start())
    for _ in range(10_000):
        if world.stopped or not world.scheduler.remaining:
            break
        if world.starting:
            world.place(min(world.starting), None, f"node-{data.draw(st.integers(1, nodes))}")
        else:
            name = data.draw(st.sampled_from(sorted(name for name, tasks in world.held.items() if tasks)))
            world.work(name, victim=data.draw(st.sampled_from(world.neighbours(name))))
        world.check(shards)
    assert world.stopped is None
    assert sorted(world.done) == list(range(shards))
    assert {(image.shard, image.image_id) for image in world.marked} == hogs
    assert all(image.status == "out_of_memory" for image in world.marked)
    assert world.deaths <= (workers + 4) * len(hogs)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    nodes=st.integers(1, 12),
    places=st.integers(1, 6),
    depth=st.integers(1, 2),
    batch=st.integers(1, 12),
    any_victim=st.booleans(),
)
def test_what_an_image_that_takes_the_memory_kills_does_not_grow_with_the_cluster(
    data: st.DataObject, nodes: int, places: int, depth: int, batch: int, any_victim: bool
) -> None:
    shards = 3 * nodes * places
    hog = data.draw(st.integers(0, shards * SIZE - 1))
    world = World(make(shards, nodes * places, depth=depth), batch=batch, hogs={(hog // SIZE, hog)})
    chance = data.draw(st.randoms(use_true_random=False))
    world.carry_out(world.scheduler.start())
    for _ in range(10_000):
        if world.stopped or not world.scheduler.remaining:
            break
        if world.starting:
            taken = Counter(world.node_of[name] for name in world.held)
            free = [node for node in map(str, range(nodes)) if taken[node] < places]
            world.place(min(world.starting), None, chance.choice(free))
        else:
            name = chance.choice(sorted(name for name, tasks in world.held.items() if tasks))
            world.work(name, victim=chance.choice(world.neighbours(name)) if any_victim else None)
        world.check(shards)
    assert sorted(world.done) == list(range(shards))
    assert [image.image_id for image in world.marked] == [hog]
    assert world.deaths <= 4 * (places + 1)


@settings(max_examples=1000, deadline=None)
@given(
    data=st.data(),
    shards=st.integers(0, 12),
    workers=st.integers(1, 4),
    depth=st.integers(1, 3),
    poisoned=st.booleans(),
)
def test_any_sequence_of_events_ends_with_every_shard_done_once_or_with_a_reason(
    data: st.DataObject, shards: int, workers: int, depth: int, poisoned: bool
) -> None:
    """Plays a world in which anything may happen, and checks the invariants after every event."""
    poison = {(0, 5), (1, SIZE)} if poisoned else set()
    world = World(make(shards, workers, depth=depth), poison)
    world.carry_out(world.scheduler.start())
    for _ in range(3000):
        if world.stopped or not world.scheduler.remaining:
            break
        busy = sorted(name for name, tasks in world.held.items() if tasks)
        moves = [("place", name) for name in sorted(world.starting)] + [("work", name) for name in busy]
        # Faults are rare enough for the run to get on, frequent enough to meet each other.
        if data.draw(st.integers(0, 3)) == 0:
            moves = [("fail_start", name) for name in sorted(world.starting | world.placed)]
            faults = ("die", "lose_node", "leave", "run_out_of_memory")
            moves += [(fault, name) for name in sorted(world.held) for fault in faults]
            moves += [(fault, name) for name in busy for fault in ("fail", "overdue", "any_done")]
            moves += [("leave", name) for name in sorted(world.placed)]
            moves += [("late", name) for name in sorted(world.retired)]
            moves += [("resize", str(count)) for count in range(5)]
        if not moves:
            world.carry_out(world.scheduler.handle(CapacityChanged(workers)))
            continue
        play(world, data, *data.draw(st.sampled_from(moves)))
        world.check(shards)
    assert world.stopped or sorted(world.done) == list(range(shards))


def play(world: World, data: st.DataObject, move: str, name: str) -> None:
    scheduler = world.scheduler
    match move:
        case "place":
            world.place(name, data.draw(st.sampled_from([None, "node/0", "node/1"])), data.draw(st.sampled_from("ab")))
        case "work":
            world.work(name)
        case "fail_start":
            world.starting.discard(name)
            world.placed.discard(name)
            world.carry_out(scheduler.handle(WorkerFailedToStart(name, "broken")))
        case "die" | "lose_node" | "run_out_of_memory":
            announced = world.announced_group(name) if world.held[name] and data.draw(st.booleans()) else ()
            world.die(name, blameless=move == "lose_node", group=announced, memory=move == "run_out_of_memory")
        case "late":
            late = [WorkerPlaced(name), WorkerLeaving(name), WorkerFailedToStart(name, "late")]
            world.carry_out(scheduler.handle(data.draw(st.sampled_from(late))))
        case "leave":
            world.carry_out(scheduler.handle(WorkerLeaving(name)))
        case "overdue":
            world.carry_out(scheduler.handle(ShardOverdue(world.held[name][0].shard)))
        case "any_done":
            world.finish(name, data.draw(st.sampled_from(world.held[name])))
        case "fail":
            task = world.held[name].pop(0)
            world.announced[name] = 0
            world.carry_out(scheduler.handle(ShardFailed(name, task.shard, "failed")))
        case "resize":
            world.carry_out(scheduler.handle(CapacityChanged(int(name))))


def test_a_shard_whose_every_image_crashes_stops_the_run() -> None:
    size = MAX_CRASHED_PER_SHARD + 10
    scheduler = make(1, 1)
    scheduler.start()
    found = 0
    for number in range(1, 500):
        (assigned,) = join(scheduler, number)
        groups = groups_of(assigned.task, range(size), 8)
        group = groups[0] if assigned.task.careful else ()
        decisions = scheduler.handle(WorkerDied(f"worker-{number}", "killed", group=group))
        found += sum(isinstance(decision, MarkCrashed) for decision in decisions)
        if isinstance(decisions[-1], StopRun):
            assert decisions[-1].reason == f"{found} images of shard 0 ended their worker; the last: killed"
            break
    assert found == MAX_CRASHED_PER_SHARD + 1


def test_images_that_crashed_in_an_earlier_start_are_not_tried_again() -> None:
    known = CrashedImage(1, 13, "crashed", "killed")
    scheduler = Scheduler(iter([0, 1]), remaining=2, workers=1, crashed=[known])
    scheduler.start()
    assert join(scheduler, 1) == [gave(1, 0), Assign("worker-1", ShardTask(1, 1, crashed=(known,)))]
