"""Where workers run: Ray actors pinned to GPUs, or this process."""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from ovss_ray.errors import RunFailedError, SettingError
from ovss_ray.run.job import LabellingJob
from ovss_ray.run.pool import Engine, WorkerGoneError, WorkerHandle
from ovss_ray.run.worker import Worker
from ovss_ray.spec import JobSpec

log = logging.getLogger(__name__)

SHARDS_PER_WORKER = 2  # one on the device, one being fetched or written
CPUS_PER_CPU_WORKER = 4


def open_engine(spec: JobSpec) -> Engine:
    """Start, or connect to, the place where workers run.

    Raises:
        SettingError: the job asks for GPUs that are not there.
        RunFailedError: Ray cannot be started or reached.
    """
    return LocalEngine(spec) if spec.engine == "local" else RayEngine(spec)


class LocalEngine:
    """One worker in this process: no isolation, but a debugger and a profiler can follow it."""

    def __init__(self, spec: JobSpec) -> None:
        import torch

        self.workers = 1
        self.device = "cuda" if torch.cuda.is_available() and spec.device != "cpu" else "cpu"
        if spec.device == "cuda" and self.device == "cpu":
            raise SettingError("device = 'cuda': this machine has no GPU that PyTorch can use")
        cores = os.cpu_count() or 1
        self._cpus = cores if spec.cpus_per_worker == "auto" else max(int(spec.cpus_per_worker), 1)

    def launch(self, job: LabellingJob) -> WorkerHandle:
        return _LocalWorker(job, self._cpus)

    def share(self, value: Any) -> Any:
        return value

    def close(self) -> None:
        pass


class _LocalWorker:
    def __init__(self, job: LabellingJob, cpus: int) -> None:
        self._threads = ThreadPoolExecutor(SHARDS_PER_WORKER + 1, thread_name_prefix="worker")
        self._worker = self._threads.submit(Worker, job, cpus=cpus)

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        return self._threads.submit(lambda: getattr(self._worker.result(), method)(*arguments))

    def kill(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)


class RayEngine:
    """Ray actors, each with its share of the cluster's GPUs or CPUs."""

    def __init__(self, spec: JobSpec) -> None:
        import ray

        self._started_here = not ray.is_initialized()
        if self._started_here:
            _connect(spec.ray_address)
        try:
            self._allot(spec)
        except Exception:
            self.close()
            raise

    def _allot(self, spec: JobSpec) -> None:
        import ray

        total = ray.cluster_resources()
        cpus, gpus = int(total.get("CPU", 1)), total.get("GPU", 0.0)
        if spec.gpus_per_worker == "auto":
            self._gpus_each = 1.0 if gpus and spec.device != "cpu" else 0.0
        else:
            self._gpus_each = spec.gpus_per_worker
        if self._gpus_each > gpus:
            raise SettingError(f"gpus_per_worker = {self._gpus_each:g}: the Ray cluster has {gpus:g} GPUs")
        if spec.device == "cuda" and not self._gpus_each:
            raise SettingError("device = 'cuda': the Ray cluster has no GPU; use device = 'cpu' or another cluster")
        self.device = "cuda" if self._gpus_each else "cpu"

        if spec.workers != "auto":
            self.workers = spec.workers
        elif self._gpus_each:
            self.workers = max(int(gpus / self._gpus_each), 1)
        else:
            self.workers = max(cpus // CPUS_PER_CPU_WORKER, 1)

        if spec.cpus_per_worker != "auto":
            self._cpus_each = float(spec.cpus_per_worker)
            self._threads_each = max(int(self._cpus_each), 1)
        elif self._gpus_each:
            # One core is reserved, but decoding and encoding may use the GPU's whole share of its node.
            self._cpus_each = 1.0
            self._threads_each = max(int(cpus * self._gpus_each / gpus), 1)
        else:
            self._threads_each = max(min(cpus // self.workers, CPUS_PER_CPU_WORKER), 1)
            self._cpus_each = min(float(self._threads_each), cpus / self.workers)
        log.info(
            "Ray: %d workers, each with %g CPUs and %g GPUs, of %d CPUs and %g GPUs in the cluster",
            self.workers, self._cpus_each, self._gpus_each, cpus, gpus,
        )  # fmt: skip

    def launch(self, job: LabellingJob) -> WorkerHandle:
        import ray

        actor = ray.remote(Worker).options(
            num_cpus=self._cpus_each,
            num_gpus=self._gpus_each,
            max_concurrency=SHARDS_PER_WORKER + 1,  # and one call that asks for progress
            max_restarts=0,  # the scheduler replaces workers, and counts
            max_task_retries=0,
        )
        return _RayWorker(actor.remote(job, cpus=self._threads_each))

    def share(self, value: Any) -> Any:
        import ray

        return ray.put(value)

    def close(self) -> None:
        import ray

        if self._started_here:
            ray.shutdown()


class _RayWorker:
    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def call(self, method: str, *arguments: Any) -> Future[Any]:
        outcome: Future[Any] = Future()

        def settle(answered: Future[Any]) -> None:
            error = answered.exception()
            if error is None:
                outcome.set_result(answered.result())
            else:
                outcome.set_exception(_translate(error))

        getattr(self._actor, method).remote(*arguments).future().add_done_callback(settle)
        return outcome

    def kill(self) -> None:
        import ray

        ray.kill(self._actor)


def _translate(error: BaseException) -> Exception:
    """Ray's errors in the engine's terms: what the worker raised, or that the worker is gone."""
    from ray.exceptions import RayActorError, RayTaskError

    if isinstance(error, RayTaskError):
        return error.cause if isinstance(error.cause, Exception) else RuntimeError(str(error.cause))
    if isinstance(error, RayActorError):
        return WorkerGoneError(" ".join(str(error).split())[:500], blameless=error.preempted)
    return error if isinstance(error, Exception) else RuntimeError(str(error))


def _connect(address: str | None) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    address = address or os.environ.get("RAY_ADDRESS")
    try:
        if address:
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            # Pixels never pass through the object store, so the embedded one can be small.
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=100 * 2**20,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        place = f"the Ray cluster at {address}" if address else "an embedded Ray"
        raise RunFailedError(f"{place} could not be reached or started: {' '.join(str(error).split())}") from error
