"""Where workers run: Ray actors pinned to GPUs, or this process."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ovss_ray.errors import SettingError
from ovss_ray.naming import setting_name
from ovss_ray.run.cluster import Connection
from ovss_ray.run.job import LabellingJob
from ovss_ray.run.kernel_kills import KernelKills
from ovss_ray.run.pool import Engine, Place, WorkerGoneError, WorkerHandle
from ovss_ray.run.ray_errors import of_answer, of_no_answer, translate
from ovss_ray.spec import JobSpec

log = logging.getLogger(__name__)

SHARDS_PER_WORKER = 2  # one on the device, one being fetched or written
CPUS_PER_CPU_WORKER = 4
FIND_OUT_S = 60.0


def open_engine(spec: JobSpec) -> Engine:
    """Start, or connect to, the place where workers run.

    Raises:
        SettingError: the job asks for GPUs that are not there.
        RunFailedError: Ray cannot be started or reached.
    """
    return LocalEngine(spec) if spec.engine == "local" else RayEngine(spec)


class LocalEngine:
    """One worker in this process: no isolation, but a debugger and a profiler can follow it."""

    isolates = False

    def __init__(self, spec: JobSpec) -> None:
        import torch

        self.device = "cuda" if torch.cuda.is_available() and spec.device != "cpu" else "cpu"
        if spec.device == "cuda" and self.device == "cpu":
            raise SettingError("device = 'cuda': this machine has no GPU that PyTorch can use")
        cores = os.cpu_count() or 1
        self._cpus = cores if spec.cpus_per_worker == "auto" else max(int(spec.cpus_per_worker), 1)

    def capacity(self) -> int:
        return 1

    def leaving_nodes(self) -> set[str]:
        return set()

    def launch(self, job: LabellingJob) -> WorkerHandle:
        return _LocalWorker(job, self._cpus)

    def share(self, value: Any) -> Any:
        return value

    def close(self) -> None:
        pass


class _LocalWorker:
    def __init__(self, job: LabellingJob, cpus: int) -> None:
        from ovss_ray.run.worker import Worker

        self._threads = ThreadPoolExecutor(SHARDS_PER_WORKER + 1, thread_name_prefix="worker")
        self._worker = self._threads.submit(Worker, job, cpus=cpus)

    def place(self) -> Future[Place]:
        placed: Future[Place] = Future()
        placed.set_result(Place("local"))
        return placed

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        return self._threads.submit(lambda: getattr(self._worker.result(), method)(*arguments))

    def kill(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class RayEngine:
    """Ray actors, each with its share of the cluster's GPUs or CPUs."""

    isolates = True

    def __init__(self, spec: JobSpec) -> None:
        self._spec = spec
        self._has_lost_workers = False
        self._kernel_kills = KernelKills()
        self._connection = Connection(spec.ray_address)
        try:
            self._allot(spec)
        except Exception:
            self.close()
            raise

    def _allot(self, spec: JobSpec) -> None:
        cpus, gpus = _resources()
        if spec.gpus_per_worker == "auto":
            self._gpus_each = 1.0 if gpus and spec.device != "cpu" else 0.0
        else:
            self._gpus_each = spec.gpus_per_worker
        if self._gpus_each > gpus:
            # A cluster may grow: it starts nodes for actors that wait, if the job says how many it wants.
            if self._connection.embedded or spec.workers == "auto":
                raise SettingError(
                    f"{setting_name('gpus_per_worker')} = {self._gpus_each:g}: the Ray cluster has {gpus:g} GPUs; "
                    "for a cluster that grows on demand, say with workers = N how many to ask for"
                )
            log.warning("the Ray cluster has %g GPUs; the workers wait until it has more", gpus)
        if spec.device == "cuda" and not self._gpus_each:
            raise SettingError("device = 'cuda': the Ray cluster has no GPU; use device = 'cpu' or another cluster")
        self.device = "cuda" if self._gpus_each and spec.device != "cpu" else "cpu"
        workers = self.capacity()
        if spec.cpus_per_worker != "auto":
            self._cpus_each = float(spec.cpus_per_worker)
            self._threads_each = max(int(self._cpus_each), 1)
        elif self._gpus_each:
            # One core is reserved, but decoding and encoding may use the GPU's whole share of its node.
            self._cpus_each = min(1.0, cpus / workers)
            self._threads_each = max(int(cpus * self._gpus_each / max(gpus, 1)), 1)
        else:
            self._threads_each = max(min(cpus // workers, CPUS_PER_CPU_WORKER), 1)
            self._cpus_each = min(float(self._threads_each), cpus / workers)
        log.info(
            "Ray: %d workers, each with %g CPUs and %g GPUs, of %d CPUs and %g GPUs in the cluster",
            workers, self._cpus_each, self._gpus_each, cpus, gpus,
        )  # fmt: skip

    def capacity(self) -> int:
        if self._spec.workers != "auto":
            return self._spec.workers
        cpus, gpus = _resources()
        # At least one: if all nodes are gone, its waiting actor asks the cluster for another.
        room = int(gpus / self._gpus_each) if self._gpus_each else cpus // CPUS_PER_CPU_WORKER
        return max(room, 1)

    def leaving_nodes(self) -> set[str]:
        self._kernel_kills.look()
        from ray._private.state import state  # what Ray's own libraries use; there is no public call

        try:
            return set(state.get_draining_nodes())
        except (AttributeError, RuntimeError):
            return set()

    def launch(self, job: LabellingJob) -> WorkerHandle:
        import ray

        actor = ray.remote(_WorkerProcess).options(
            num_cpus=self._cpus_each,
            num_gpus=self._gpus_each,
            max_concurrency=SHARDS_PER_WORKER + 1,  # and one call that asks for progress
            max_restarts=0,  # the scheduler replaces workers, and counts
            max_task_retries=0,
        )
        handle = actor.remote(job, cpus=self._threads_each)
        return _RayWorker(handle, whole_gpu=self._gpus_each >= 1, on_loss=self._lost)

    def _lost(self, error: WorkerGoneError) -> WorkerGoneError:
        """What is known here of a worker's end beside what Ray says."""
        self._has_lost_workers = True
        on_this_machine = self._connection.embedded is not None
        if error.blameless or error.memory or not on_this_machine or not self._kernel_kills.any_lately:
            return error
        return WorkerGoneError(f"{error}: the kernel has ended a process for want of memory", memory=True)

    def share(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def close(self) -> None:
        self._connection.close(keep_logs=self._has_lost_workers)


class _WorkerProcess:
    """The actor: a `Worker`, which the driver never imports, nor torch with it."""

    def __init__(self, job: LabellingJob, cpus: int) -> None:
        from ovss_ray.run.worker import Worker

        self._worker = Worker(job, cpus=cpus)

    def call(self, method: str, *arguments: Any) -> Any:
        return getattr(self._worker, method)(*arguments)


class _RayWorker:
    def __init__(self, actor: Any, *, whole_gpu: bool, on_loss: Callable[[WorkerGoneError], Exception]) -> None:
        self._actor = actor
        self._whole_gpu = whole_gpu
        self._on_loss = on_loss
        self._is_stopped = False

    def place(self) -> Future[Place]:
        return self._settled(self._actor.__ray_call__.remote(_where, self._whole_gpu))

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        return self._settled(self._actor.call.options(name=method).remote(method, *arguments))

    def _settled(self, reference: Any) -> Future[Any]:
        """A future of what a Ray call gives, with Ray's errors translated."""
        outcome: Future[Any] = Future()

        def settle(answered: Future[Any]) -> None:
            error = answered.exception()
            if error is None:
                outcome.set_result(answered.result())
            elif (translated := translate(error)) is not None:
                self._fail(outcome, translated)
            else:
                self._find_out(outcome, error, time.monotonic() + FIND_OUT_S)

        reference.future().add_done_callback(settle)
        return outcome

    def _find_out(self, outcome: Future[Any], failure: BaseException, deadline: float) -> None:
        """Whether an actor lives whose call failed: Ray often knows only later if its process or its node has died."""

        def settle(answered: Future[Any]) -> None:
            error = answered.exception()
            if error is None:
                self._fail(outcome, of_answer(failure))
            elif (translated := translate(error)) is not None:
                self._fail(outcome, translated)
            elif time.monotonic() > deadline:
                self._fail(outcome, of_no_answer(error))
            else:
                again = threading.Timer(1.0, self._find_out, (outcome, failure, deadline))
                again.daemon = True
                again.start()

        self._actor.__ray_ready__.remote().future().add_done_callback(settle)

    def _fail(self, outcome: Future[Any], error: Exception) -> None:
        if isinstance(error, WorkerGoneError) and not self._is_stopped:
            error = self._on_loss(error)
        outcome.set_exception(error)

    def kill(self) -> None:
        import ray

        self._is_stopped = True

        ray.kill(self._actor)


def _where(_: _WorkerProcess, whole_gpu: bool) -> Place:
    """Runs inside the actor."""
    import ray

    context = ray.get_runtime_context()
    node, gpus = context.get_node_id(), context.get_accelerator_ids().get("GPU", [])
    return Place(node, f"{node[:12]}/{','.join(gpus)}" if gpus and whole_gpu else None)


def _resources() -> tuple[int, float]:
    """CPUs and GPUs of the cluster."""
    import ray

    total = ray.cluster_resources()
    return max(int(total.get("CPU", 1)), 1), float(total.get("GPU", 0.0))
