"""What events and decisions come to, counted."""

from __future__ import annotations

import pytest

from ovss_ray.run.events import (
    Assign,
    CrashedImage,
    Decision,
    Event,
    LimitWorkers,
    MarkCrashed,
    SetGpuAside,
    ShardTask,
    StartWorker,
    StopWorker,
    WorkerDied,
    WorkerFailedToStart,
    WorkerJoined,
)
from ovss_ray.run.incidents import Incidents
from ovss_ray.run.scheduler import Scheduler


@pytest.mark.parametrize(
    ("event", "kind"),
    [
        (WorkerDied("a", "killed"), "crashed"),
        (WorkerDied("a", "took too long", hung=True), "hung"),
        (WorkerDied("a", "no memory left", memory=True), "out_of_memory"),
        (WorkerDied("a", "its node went", blameless=True), "lost_node"),
        (WorkerFailedToStart("a", "no weights"), "failed_start"),
        (WorkerFailedToStart("a", "no memory left", memory=True), "out_of_memory"),
        (WorkerFailedToStart("a", "its node went", blameless=True), "lost_node"),
    ],
)
def test_a_worker_that_ends_unasked_is_counted_by_kind_and_no_longer_there(event: Event, kind: str) -> None:
    incidents = Incidents()
    incidents.decided(StartWorker("a"))
    incidents.heard(event)
    assert dict(incidents.worker_deaths) == {kind: 1}
    assert incidents.workers == {"starting": 0, "ready": 0}


def test_workers_start_get_ready_and_stop() -> None:
    incidents = Incidents()
    incidents.decided(StartWorker("a"))
    incidents.decided(StartWorker("b"))
    incidents.heard(WorkerJoined("a"))
    assert incidents.workers == {"starting": 1, "ready": 1}
    incidents.decided(StopWorker("a"))
    assert incidents.workers == {"starting": 1, "ready": 0}
    assert not incidents.worker_deaths
    incidents.closed()
    assert incidents.workers == {"starting": 0, "ready": 0}


def test_crashed_images_and_gpus_set_aside_are_counted() -> None:
    incidents = Incidents()
    decisions: list[Decision] = [
        MarkCrashed(CrashedImage(0, 3, "crashed", "killed")),
        SetGpuAside("node/0", "broken"),
        MarkCrashed(CrashedImage(0, 5, "timeout", "hang")),
    ]
    for decision in decisions:
        incidents.decided(decision)
    assert (incidents.crashed_images, incidents.gpus_set_aside) == (2, 1)


def test_the_fewest_workers_that_memory_left_room_for_are_remembered() -> None:
    incidents = Incidents()
    assert incidents.workers_limited_to is None
    for limit in (LimitWorkers(3, "no memory"), LimitWorkers(2, "no memory"), LimitWorkers(4, None)):
        incidents.decided(limit)
    assert incidents.workers_limited_to == 2


def test_attempts_beyond_the_first_are_those_of_shards_given_out_before() -> None:
    given_out: list[ShardTask] = []
    incidents = Incidents()

    def follow(decisions: list[Decision]) -> None:
        for decision in decisions:
            incidents.decided(decision)
            if isinstance(decision, Assign):
                given_out.append(decision.task)

    scheduler = Scheduler(iter([2, 3, 7, 8, 9]), remaining=5, workers=2)
    follow(scheduler.start())
    events: list[Event] = [
        WorkerJoined("worker-1"),
        WorkerJoined("worker-2"),
        WorkerDied("worker-1", "its node went", blameless=True),
        WorkerJoined("worker-3"),
        WorkerDied("worker-2", "killed"),
        WorkerJoined("worker-4"),
    ]
    for event in events:
        incidents.heard(event)
        follow(scheduler.handle(event))
    shards = [task.shard for task in given_out]
    assert len(shards) > len(set(shards))
    assert incidents.shard_retries == len(shards) - len(set(shards))
