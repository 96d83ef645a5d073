"""The scheduler under chosen and under random sequences of events."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovss_ray.run.scheduler import (
    Assign,
    Decision,
    Scheduler,
    ShardDone,
    ShardFailed,
    StartWorker,
    StopRun,
    StopWorker,
    WorkerDied,
    WorkerFailedToStart,
    WorkerJoined,
)


def make(shards: int, workers: int, **options: int) -> Scheduler:
    return Scheduler(iter(range(shards)), remaining=shards, workers=workers, **options)


def test_every_shard_is_given_out_once_and_in_order_to_one_worker() -> None:
    scheduler = make(5, 1)
    (start,) = scheduler.start()
    assert start == StartWorker("worker-1")
    decisions = scheduler.handle(WorkerJoined("worker-1"))
    assert decisions == [Assign("worker-1", 0, 1), Assign("worker-1", 1, 1)]
    given_out = [0, 1]
    for shard in range(5):
        for decision in scheduler.handle(ShardDone("worker-1", shard)):
            if isinstance(decision, Assign):
                given_out.append(decision.shard)
    assert given_out == [0, 1, 2, 3, 4]
    assert scheduler.remaining == 0


def test_no_worker_hoards_what_another_could_begin() -> None:
    scheduler = make(2, 2)
    scheduler.start()
    assert scheduler.handle(WorkerJoined("worker-1")) == [Assign("worker-1", 0, 1)]
    assert scheduler.handle(WorkerJoined("worker-2")) == [Assign("worker-2", 1, 1)]


def test_work_does_not_wait_for_a_worker_that_never_comes() -> None:
    scheduler = make(2, 2)
    scheduler.start()
    scheduler.handle(WorkerJoined("worker-1"))
    assert scheduler.handle(ShardDone("worker-1", 0)) == [Assign("worker-1", 1, 1)]
    scheduler.handle(ShardDone("worker-1", 1))
    assert scheduler.remaining == 0


def test_starts_no_more_workers_than_shards() -> None:
    assert make(2, 8).start() == [StartWorker("worker-1"), StartWorker("worker-2")]
    assert make(0, 8).start() == []


def test_a_dead_worker_is_replaced_and_its_shards_are_retried_one_at_a_time() -> None:
    scheduler = make(4, 1)
    scheduler.start()
    scheduler.handle(WorkerJoined("worker-1"))
    assert scheduler.handle(WorkerDied("worker-1", "killed")) == [StartWorker("worker-2")]
    # Shard 0 is suspected (second attempt) and runs alone; so does shard 1, which was beside it.
    assert scheduler.handle(WorkerJoined("worker-2")) == [Assign("worker-2", 0, 2)]
    assert scheduler.handle(ShardDone("worker-2", 0)) == [Assign("worker-2", 1, 1)]
    assert scheduler.handle(ShardDone("worker-2", 1)) == [Assign("worker-2", 2, 1), Assign("worker-2", 3, 1)]


def test_a_lost_node_is_nobodys_fault() -> None:
    scheduler = make(1, 1, max_shard_attempts=2)
    scheduler.start()
    for number in range(1, 10):
        assert scheduler.handle(WorkerJoined(f"worker-{number}")) == [Assign(f"worker-{number}", 0, 1)]
        died = WorkerDied(f"worker-{number}", "preempted", blameless=True)
        assert scheduler.handle(died) == [StartWorker(f"worker-{number + 1}")]


def test_a_shard_that_keeps_failing_stops_the_run_with_its_reason() -> None:
    scheduler = make(3, 1, max_shard_attempts=2)
    scheduler.start()
    scheduler.handle(WorkerJoined("worker-1"))
    scheduler.handle(ShardFailed("worker-1", 0, "store is down"))
    scheduler.handle(ShardDone("worker-1", 1))
    assert scheduler.handle(ShardFailed("worker-1", 0, "store is still down")) == [
        StopRun("shard 0 failed 2 times; the last time: store is still down")
    ]
    assert scheduler.handle(WorkerDied("worker-1", "late")) == []


def test_a_final_failure_stops_the_run_at_once() -> None:
    scheduler = make(3, 1)
    scheduler.start()
    scheduler.handle(WorkerJoined("worker-1"))
    stop = scheduler.handle(ShardFailed("worker-1", 1, "no space left", final=True))
    assert stop == [StopRun("shard 1: no space left")]


def test_workers_that_cannot_start_stop_the_run_after_three_in_a_row() -> None:
    scheduler = make(3, 1)
    scheduler.start()
    assert scheduler.handle(WorkerFailedToStart("worker-1", "no weights")) == [StartWorker("worker-2")]
    assert scheduler.handle(WorkerFailedToStart("worker-2", "no weights")) == [StartWorker("worker-3")]
    assert scheduler.handle(WorkerFailedToStart("worker-3", "no weights")) == [
        StopRun("3 workers in a row could not start: no weights")
    ]


def test_draining_gives_out_nothing_more() -> None:
    scheduler = make(9, 1)
    scheduler.start()
    scheduler.handle(WorkerJoined("worker-1"))
    scheduler.drain()
    assert scheduler.handle(ShardDone("worker-1", 0)) == []
    assert scheduler.handle(ShardDone("worker-1", 1)) == []
    assert (scheduler.in_flight, scheduler.remaining) == (0, 7)


def test_an_event_that_contradicts_the_decisions_is_refused() -> None:
    scheduler = make(9, 1)
    scheduler.start()
    with pytest.raises(ValueError, match="never started"):
        scheduler.handle(WorkerJoined("worker-7"))
    scheduler.handle(WorkerJoined("worker-1"))
    with pytest.raises(ValueError, match="shard 5 is not in flight"):
        scheduler.handle(ShardDone("worker-1", 5))


@settings(max_examples=400, deadline=None)
@given(data=st.data(), shards=st.integers(0, 12), workers=st.integers(1, 4), depth=st.integers(1, 3))
def test_any_sequence_of_events_ends_with_every_shard_done_once_or_with_a_reason(
    data: st.DataObject, shards: int, workers: int, depth: int
) -> None:
    """Plays a world in which anything may happen, and checks the invariants after every event."""
    scheduler = make(shards, workers, depth=depth)
    starting: set[str] = set()
    holding: dict[str, list[int]] = {}
    done: list[int] = []
    attempts: dict[int, int] = {}
    stopped = False

    def carry_out(decisions: list[Decision]) -> None:
        nonlocal stopped
        for decision in decisions:
            match decision:
                case StartWorker(name):
                    starting.add(name)
                case Assign(name, shard, attempt):
                    assert shard not in done
                    assert all(shard not in held for held in holding.values())
                    assert attempt == attempts.get(shard, 0) + 1 <= 3
                    if attempt > 1:
                        assert holding[name] == []
                    holding[name].append(shard)
                    assert len(holding[name]) <= depth
                case StopWorker(name):
                    assert holding.pop(name) == []
                case StopRun(reason):
                    assert reason
                    stopped = True

    carry_out(scheduler.start())
    for _ in range(2000):
        if stopped or not scheduler.remaining:
            break
        moves = [("join", name) for name in sorted(starting)] + [("done", n) for n, held in holding.items() if held]
        # Faults are rare enough for the run to get on, frequent enough to meet each other.
        if data.draw(st.integers(0, 3)) == 0:
            moves = [("fail_start", name) for name in sorted(starting)] + [("die", name) for name in holding]
            moves += [("lose_node", name) for name in holding] + [("fail", n) for n, held in holding.items() if held]
        if not moves:
            continue
        move, name = data.draw(st.sampled_from(moves))
        if move == "join":
            starting.remove(name)
            holding[name] = []
            carry_out(scheduler.handle(WorkerJoined(name)))
        elif move == "fail_start":
            starting.remove(name)
            carry_out(scheduler.handle(WorkerFailedToStart(name, "broken")))
        elif move in ("die", "lose_node"):
            held = holding.pop(name)
            if held and move == "die":
                attempts[held[0]] = attempts.get(held[0], 0) + 1
            carry_out(scheduler.handle(WorkerDied(name, "dead", blameless=move == "lose_node")))
        else:
            shard = data.draw(st.sampled_from(holding[name]))
            holding[name].remove(shard)
            if move == "done":
                done.append(shard)
                carry_out(scheduler.handle(ShardDone(name, shard)))
            else:
                attempts[shard] = attempts.get(shard, 0) + 1
                carry_out(scheduler.handle(ShardFailed(name, shard, "failed")))
        assert len(set(done)) == len(done)
        if not stopped:
            assert scheduler.remaining == shards - len(done)
            assert scheduler.in_flight == sum(map(len, holding.values()))
    assert stopped or sorted(done) == list(range(shards))
    if not stopped:
        assert max(attempts.values(), default=0) <= 2
