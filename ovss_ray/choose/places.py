"""Where candidates are assessed: in this process one after the other, or as Ray tasks, one for each device."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from ovss_ray.errors import OvssError, RunFailedError, SettingError
from ovss_ray.run.cluster import Connection
from ovss_ray.spec import JobSpec

R = TypeVar("R")

_CPUS_PER_TASK = 4  # where there is no GPU


class Place(Protocol):
    """Calls functions with all CPUs or the GPU of a device to themselves.

    Attributes:
        device: "cuda" or "cpu".
        threads: CPU threads that a call may use.
    """

    @property
    def device(self) -> str: ...

    @property
    def threads(self) -> int: ...

    def calls(self, function: Callable[..., R], tasks: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, R]]:
        """Call a function of a module with each of several tuples of arguments, all picklable.

        Args:
            function: to call.
            tasks: the arguments, by a name for messages.

        Returns:
            the name and what came of it, as calls end.
        """


@contextmanager
def open_place(spec: JobSpec) -> Iterator[Place]:
    """The place that a job names with `engine`, `ray_address` and `device`; a Ray that was started here ends with it.

    Raises:
        SettingError: there is no GPU, and the job asks for one.
        RunFailedError: Ray cannot be started or reached.
    """
    if spec.engine == "local":
        yield _here(spec)
        return
    connection = Connection(spec.ray_address)
    try:
        yield _on_ray(spec)
    finally:
        connection.close()


@dataclass(frozen=True)
class _Here:
    device: str
    threads: int

    def calls(self, function: Callable[..., R], tasks: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, R]]:
        for name, arguments in tasks.items():
            yield name, function(*arguments)


def _here(spec: JobSpec) -> Place:
    import torch

    has_gpu = torch.cuda.is_available()
    if spec.device == "cuda" and not has_gpu:
        raise SettingError("device = 'cuda': this machine has no GPU that PyTorch can use")
    return _Here("cuda" if has_gpu and spec.device != "cpu" else "cpu", os.cpu_count() or 1)


@dataclass(frozen=True)
class _OnRay:
    device: str
    threads: int
    cpus: float
    gpus: float

    def calls(self, function: Callable[..., R], tasks: Mapping[str, tuple[Any, ...]]) -> Iterator[tuple[str, R]]:
        import ray

        # A process that has used a GPU keeps some of its memory, so each gets one call.
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_calls": int(self.gpus > 0), "max_retries": 1}
        remote = ray.remote(**options)(_with_threads)
        threads = self.threads if self.device == "cpu" else None
        names = {remote.remote(threads, function, arguments): name for name, arguments in tasks.items()}
        waiting = list(names)
        try:
            while waiting:
                (done,), waiting = ray.wait(waiting, num_returns=1)
                yield names[done], _result(done, names[done])
        finally:
            for reference in waiting:
                ray.cancel(reference, force=True)


def _on_ray(spec: JobSpec) -> Place:
    import ray

    resources = ray.cluster_resources()
    cpus, gpus = max(int(resources.get("CPU", 1)), 1), resources.get("GPU", 0.0)
    if spec.device == "cuda" and not gpus:
        raise SettingError("device = 'cuda': the Ray cluster has no GPU; use device = 'cpu' or another cluster")
    if gpus and spec.device != "cpu":
        # One core is reserved, but decoding may use the GPU's whole share of its node.
        return _OnRay("cuda", max(int(cpus / gpus), 1), min(1.0, cpus / gpus), 1.0)
    threads = min(cpus, _CPUS_PER_TASK)
    return _OnRay("cpu", threads, threads, 0.0)


def _with_threads(threads: int | None, function: Callable[..., R], arguments: tuple[Any, ...]) -> R:
    """Runs inside the task, which Ray keeps to one thread unless told otherwise."""
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return function(*arguments)


def _result(reference: Any, name: str) -> Any:
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, OvssError):
            raise error.cause from None
        raise RunFailedError(
            f"{name} failed: {type(error.cause).__name__}: {' '.join(str(error.cause).split())}"
        ) from error
    except RayError as error:
        raise RunFailedError(f"{name} failed: {' '.join(str(error).split())[:300]}") from error
