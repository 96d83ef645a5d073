"""Each error of the installed Ray, and one that no version has: a failure of the worker, its end, or a question."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from ray import exceptions
from ray.core.generated.common_pb2 import RayException

from ovss_ray.run.pool import WorkerGoneError
from ovss_ray.run.ray_errors import of_answer, of_no_answer, translate


class FromAFutureRayError(exceptions.RayError):
    """Bare, as Ray's own are."""


def every_error() -> Iterator[exceptions.RayError]:
    """One of each class that Ray can raise, but the one that carries what a worker raised."""
    arguments = ((), ("said",), ("said", None), ("said", b"", ""), (RayException(),))
    found = {kind for kind in vars(exceptions).values() if isinstance(kind, type)} | {FromAFutureRayError}
    kinds = {kind for kind in found if issubclass(kind, exceptions.RayError)} - {exceptions.RayTaskError}
    for kind in sorted(kinds, key=lambda kind: kind.__name__):
        for given in arguments:
            try:
                error = kind(*given)
            except (TypeError, AttributeError):
                continue
            yield error
            break
        else:
            raise AssertionError(f"no {kind.__name__} could be made")


MEMORY = {"OutOfMemoryError"}
LOST = {"NodeDiedError", "LocalRayletDiedError"}
DEAD = {
    "ActorDiedError",
    "RayActorError",
    "WorkerCrashedError",
    "ActorUnschedulableError",
    "ActorPlacementGroupRemoved",
    "TaskUnschedulableError",
    "TaskPlacementGroupRemoved",
    "RuntimeEnvSetupError",
}


@pytest.mark.parametrize("error", list(every_error()), ids=lambda error: type(error).__name__)
def test_no_error_of_ray_is_taken_for_a_failure_of_the_shard(error: exceptions.RayError) -> None:
    name = type(error).__name__
    found = translate(error)
    if name in MEMORY | LOST | DEAD:
        assert isinstance(found, WorkerGoneError)
        assert (found.memory, found.blameless) == (name in MEMORY, name in LOST)
        assert str(found).startswith("the worker's ")
    else:
        assert found is None  # the worker is asked
        assert isinstance(of_no_answer(error), WorkerGoneError)
        assert name in str(of_no_answer(error))
        is_gone = name == "ActorUnavailableError"  # it lives, but has dropped what it did
        assert isinstance(of_answer(error), WorkerGoneError) == is_gone


def test_what_a_worker_raised_is_what_its_call_raises() -> None:
    cause = OSError("disk full")
    assert translate(exceptions.RayTaskError("call", "traceback", cause, "p", 1, "127.0.0.1")) is cause


SAID = """1 worker(s) were killed due to the node running low on memory. Memory on the node (IP: 192.0.2.2) was \
2.00GB used / 23.54GB limit (0.085003)
OOM kill reason: Memory usage 2140422144B exceeded threshold of 2127230464B (8.4% of 25276510208B limit)
Selected to kill: (Actor(05093b70): job ID=01000000, task name=A.__init__, required resources={}, pid=8177, actual \
memory used=0.93GB, worker ID=9591d274)
Top 10 memory users: PID MEM(GB) COMMAND
8177 0.93 ray::A"""


def test_of_a_page_about_memory_the_two_numbers_are_told_that_matter() -> None:
    assert str(translate(exceptions.OutOfMemoryError(SAID))) == (
        "the worker's process (8177) was killed because the memory of its node ran out "
        "(2.00GB of 23.54GB in use; it used 0.93GB itself)"
    )
    bare = "the worker's process was killed because the memory of its node ran out"
    assert str(translate(exceptions.OutOfMemoryError("in other words"))) == bare
