"""Which shards count as overdue."""

from __future__ import annotations

from ovss_ray.run.stragglers import FEWEST, ShardClock


def clock_after(seconds: list[float]) -> tuple[ShardClock, float]:
    """A clock that has seen one worker take so long for each of its shards, and the time."""
    clock, now = ShardClock(), 100.0
    for shard, duration in enumerate(seconds):
        clock.assigned("a", shard, now)
        now += duration
        clock.finished("a", shard, now)
    return clock, now


def test_twice_the_usual_time_is_overdue_with_all_that_waits_behind() -> None:
    clock, now = clock_after([10.0] * FEWEST)
    clock.assigned("b", 50, now)
    clock.assigned("b", 51, now + 5)
    clock.assigned("c", 60, now + 15)
    assert clock.overdue(now + 20) == []
    assert clock.overdue(now + 20.1) == [50, 51]


def test_time_spent_behind_another_shard_does_not_count() -> None:
    clock, now = clock_after([10.0] * FEWEST)
    clock.assigned("b", 50, now)
    clock.assigned("b", 51, now)
    clock.finished("b", 50, now + 10)
    assert clock.overdue(now + 29) == []
    assert clock.overdue(now + 31) == [51]


def test_nothing_is_overdue_before_there_is_something_to_compare_with() -> None:
    clock, now = clock_after([1.0] * (FEWEST - 1))
    clock.assigned("b", 50, now)
    assert clock.overdue(now + 1000) == []


def test_very_short_shards_are_given_five_seconds() -> None:
    clock, now = clock_after([0.1] * FEWEST)
    clock.assigned("b", 50, now)
    assert clock.overdue(now + 4.9) == []
    assert clock.overdue(now + 5.1) == [50]


def test_what_a_dead_worker_held_is_forgotten() -> None:
    clock, now = clock_after([1.0] * FEWEST)
    clock.assigned("b", 50, now)
    clock.gone("b")
    assert clock.overdue(now + 100) == []
