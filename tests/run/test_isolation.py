"""In which order a careful worker tries the images, and what its deaths tell."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ovss_ray.run.events import CrashedImage, ShardTask, WorkerDied
from ovss_ray.run.isolation import ShardCase, groups_of


def test_suspects_come_first_and_one_by_one() -> None:
    task = ShardTask(0, 3, careful=True, suspects=(4, 5))
    assert groups_of(task, range(8), 4) == [(4,), (5,), (0, 1, 2, 3), (6, 7)]


def test_the_one_to_confirm_comes_before_the_others() -> None:
    task = ShardTask(0, 4, careful=True, suspects=(4, 5, 6), confirm=5)
    assert groups_of(task, range(8), 4)[:3] == [(5,), (4,), (6,)]


@given(
    size=st.integers(1, 9),
    suspects=st.sets(st.integers(0, 29)),
    crashed=st.sets(st.integers(0, 29)),
)
def test_every_image_comes_once_but_those_that_crash(size: int, suspects: set[int], crashed: set[int]) -> None:
    known = tuple(CrashedImage(0, image_id, "crashed", "killed") for image_id in sorted(crashed))
    groups = groups_of(ShardTask(0, 2, known, careful=True, suspects=tuple(sorted(suspects))), range(30), size)
    assert sorted(image_id for group in groups for image_id in group) == sorted(set(range(30)) - crashed)


def test_each_death_narrows_the_search() -> None:
    case = ShardCase(7, attempts=1)
    assert case.died(WorkerDied("a", "killed")) is None
    assert case.task() == ShardTask(7, 2, careful=True)
    assert case.died(WorkerDied("b", "killed", group=(0, 1, 2, 3))) is None
    assert case.task() == ShardTask(7, 3, careful=True, suspects=(0, 1, 2, 3))
    assert case.died(WorkerDied("c", "killed", group=(2,))) is None
    assert case.task() == ShardTask(7, 4, careful=True, suspects=(0, 1, 2, 3), confirm=2)
    found = case.died(WorkerDied("d", "hung", group=(2,), hung=True))
    assert found == CrashedImage(7, 2, "timeout", "hung")
    assert case.task() == ShardTask(7, 5, (found,), careful=True, suspects=(0, 1, 3))
    assert case.failures == 0


def test_an_image_on_which_a_worker_used_up_the_memory_is_out_of_memory() -> None:
    case = ShardCase(7, attempts=1)
    for group in ((), (2,)):
        assert case.died(WorkerDied("a", "no memory left", group=group, memory=True)) is None
    found = case.died(WorkerDied("a", "no memory left", group=(2,), memory=True))
    assert found == CrashedImage(7, 2, "out_of_memory", "no memory left")


def test_an_image_that_passes_the_second_time_is_not_marked() -> None:
    case = ShardCase(7, attempts=1)
    case.died(WorkerDied("a", "killed"))
    case.died(WorkerDied("b", "killed", group=(2,)))
    assert case.died(WorkerDied("c", "killed", group=(4, 5))) is None  # 2 went through
    assert case.crashed == {}
    assert case.failures == 2
    assert case.task().suspects == (4, 5)
