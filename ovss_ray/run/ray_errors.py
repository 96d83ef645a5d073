"""What Ray's errors mean: what a worker raised, or that it is gone and why; some leave open whether it lives.

Ray tells the end of an actor by many errors, some of them without a class of their own between them and `RayError`.
So only what the worker itself has raised is taken for that. A death that Ray names is one. Whatever else it says,
now or in a later version, leaves open whether the worker lives.
"""

from __future__ import annotations

import re

from ovss_ray.run.pool import WorkerGoneError

BROKEN_CONNECTION = "exits with a connection error"
NODE_DIED = "its node has died"  # Ray says so in words only
LONGEST_REASON = 300


def translate(error: BaseException) -> Exception | None:
    """An error of a call in the engine's terms; None if only the worker itself can tell whether it lives.

    Returns:
        `WorkerGoneError`, or what the worker raised.
    """
    from ray import exceptions as ray

    if isinstance(error, ray.RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else RuntimeError(str(error.cause))
    if not isinstance(error, ray.RayError):
        return error if isinstance(error, Exception) else RuntimeError(str(error))
    said = _words_of(error)
    if isinstance(error, ray.OutOfMemoryError):
        return WorkerGoneError(_memory_kill(said), memory=True)
    if isinstance(error, (ray.NodeDiedError, ray.LocalRayletDiedError)):
        return WorkerGoneError(f"the worker's node is gone: {said}"[:LONGEST_REASON], blameless=True)
    if isinstance(error, ray.RayActorError) and not isinstance(error, ray.ActorUnavailableError):
        return WorkerGoneError(_cause_of_death(said), blameless=error.preempted or NODE_DIED in said)
    if isinstance(error, _deaths()):
        return WorkerGoneError(_in_words(error, said))
    return None


def of_no_answer(error: BaseException) -> WorkerGoneError:
    """A worker does not answer, and Ray's error does not say why."""
    from ray.exceptions import ActorUnavailableError

    return WorkerGoneError(_in_words(error, _words_of(error)), blameless=isinstance(error, ActorUnavailableError))


def of_answer(error: BaseException) -> Exception:
    """A call failed with this, but the worker answers: what it was doing is lost, or its outcome is."""
    from ray.exceptions import ActorUnavailableError

    if isinstance(error, ActorUnavailableError):
        return WorkerGoneError("the connection to the worker broke", blameless=True)
    return RuntimeError(_in_words(error, _words_of(error), subject="the worker's answer"))


def _deaths() -> tuple[type[BaseException], ...]:
    """Errors, beside the more frequent ones, that no worker survives or that it never began to live under."""
    from ray import exceptions

    names = (
        "WorkerCrashedError",
        "ActorUnschedulableError",
        "ActorPlacementGroupRemoved",
        "TaskUnschedulableError",
        "TaskPlacementGroupRemoved",
        "RuntimeEnvSetupError",
    )
    return tuple(getattr(exceptions, name) for name in names)


def _words_of(error: BaseException) -> str:
    return " ".join(str(error).split())


def _in_words(error: BaseException, said: str, subject: str = "the worker's process") -> str:
    return f"{subject} is lost: {type(error).__name__}: {said}"[:LONGEST_REASON]


def _memory_kill(said: str) -> str:
    """The two numbers that matter, of a page of them."""
    process = re.search(r"pid=(\d+), actual memory used=([\d.]+ ?[KMGT]?i?B)", said)
    node = re.search(r"\bwas ([\d.]+ ?[KMGT]?i?B) used / ([\d.]+ ?[KMGT]?i?B) limit", said)
    used = f"; it used {process[2]} itself" if process else ""
    of_node = f" ({node[1]} of {node[2]} in use{used})" if node else ""
    who = f"the worker's process ({process[1]})" if process else "the worker's process"
    return f"{who} was killed because the memory of its node ran out{of_node}"


def _cause_of_death(said: str) -> str:
    """What Ray says of a dead actor without the names of its parts and the advice."""
    pid = re.search(r"\bpid: (\d+)", said)
    process = f"the worker's process ({pid[1]})" if pid else "the worker's process"
    if NODE_DIED in said:
        return f"{process} is gone: {said[said.index(NODE_DIED) :]}"[:LONGEST_REASON]
    detail = re.search(r"exit detail: (.*?)(?: Some common causes|$)", said)
    if detail and BROKEN_CONNECTION in detail[1]:  # all that Ray knows of a process that is suddenly gone
        return f"{process} died without a word (crash, kill, or exit)"
    return f"{process} died: {detail[1] if detail else said}"[:LONGEST_REASON]
