"""Where shards are scored: Ray tasks of one core each, this process, or a few processes of this machine."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from typing import Any, Literal

from ovss_ray.errors import InputError, RunFailedError
from ovss_ray.evaluation.scoring import ShardScorer
from ovss_ray.run.cluster import Connection
from ovss_ray.run.interrupts import held_interrupts

log = logging.getLogger(__name__)

RETRIES = 3
"""How often a shard is given out again whose process died, or whose store failed."""

_AHEAD = 2  # tasks per core of the cluster, so that none waits for the driver

_LISTEN_S = 0.2  # how long Ctrl-C may go unheard

EngineName = Literal["ray", "local"]


def score_shards(
    scorer: ShardScorer,
    shards: Sequence[int],
    *,
    engine: EngineName = "ray",
    workers: int | None = None,
    ray_address: str | None = None,
) -> Iterator[int]:
    """Score shards and keep their tables; yields the number of each when it is done, in any order.

    Args:
        scorer: does one shard.
        shards: those to do.
        engine: "ray", or "local": this process, or with several workers as many processes.
        workers: shards under way at once; None: as many as the cluster has cores, or 1 on this machine.
        ray_address: as for labelling; an embedded Ray without.

    Raises:
        OvssError: a shard cannot be scored; tables that are kept stay.
    """
    if not shards:
        return iter(())
    if engine == "ray":
        return _in_ray(scorer, shards, workers, ray_address)
    return _here(scorer, shards) if workers in (None, 1) else _in_processes(scorer, shards, workers or 1)


def _here(scorer: ShardScorer, shards: Sequence[int]) -> Iterator[int]:
    for shard in shards:
        scorer.score(shard)
        yield shard


def _in_processes(scorer: ShardScorer, shards: Sequence[int], workers: int) -> Iterator[int]:
    waiting = iter(shards)
    # Not forked: the threads and connections of the stores do not survive that.
    with ProcessPoolExecutor(
        workers,
        multiprocessing.get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_IGN),  # Ctrl-C is for this process: they finish what they have
    ) as pool:
        try:
            running = {pool.submit(_score, scorer, shard): shard for shard in islice(waiting, workers)}
            while running:
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    shard = running.pop(future)
                    future.result()
                    running.update({pool.submit(_score, scorer, shard): shard for shard in islice(waiting, 1)})
                    yield shard
        except BrokenProcessPool as error:
            raise _stopped("a process ended while it scored a shard") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _in_ray(scorer: ShardScorer, shards: Sequence[int], workers: int | None, address: str | None) -> Iterator[int]:
    import ray

    with held_interrupts() as interrupts:
        connection = Connection(address)
        try:
            interrupts.raise_noted()
            task = ray.remote(_score).options(num_cpus=1, max_retries=0)  # `_Attempts` counts, and logs
            shared = ray.put(scorer)
            waiting = iter(shards)
            attempts = _Attempts()
            running: dict[Any, int] = {}
            while True:
                limit = workers or _AHEAD * max(int(ray.cluster_resources().get("CPU", 1)), 1)
                free = max(limit - len(running), 0)  # a cluster can shrink
                running.update({task.remote(shared, shard): shard for shard in islice(waiting, free)})
                if not running:
                    return
                settled, _ = ray.wait(list(running), num_returns=1, timeout=_LISTEN_S)
                interrupts.raise_noted()  # first: tasks that Ctrl-C has reached too did not fail
                for reference in settled:
                    shard = running.pop(reference)
                    if attempts.succeeded(reference, shard):
                        yield shard
                    else:
                        running[task.remote(shared, shard)] = shard
        finally:
            connection.close()


class _Attempts:
    """Which shards are worth another attempt: what is wrong with a shard stays wrong, a process or a store recovers."""

    def __init__(self) -> None:
        self._failed: Counter[int] = Counter()

    def succeeded(self, settled: Any, shard: int) -> bool:
        """Whether a task is done; False if it failed and should run once more, else raises why it failed."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            ray.get(settled)
        except RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            self._note(shard, cause, cause if isinstance(cause, (InputError, OSError)) else None)
        except RayError as error:  # its process or its node was lost
            said = " ".join(str(error).split())[:300]
            self._note(shard, error, _stopped(f"shard {shard} could not be scored in {RETRIES + 1} attempts: {said}"))
        else:
            return True
        return False

    def _note(self, shard: int, error: Exception, at_last: Exception | None) -> None:
        """Count a failure; raises `at_last` once there were too many, the error itself if that is None."""
        self._failed[shard] += 1
        if at_last is None:
            raise error from None
        if self._failed[shard] > RETRIES:
            raise at_last from (None if at_last is error else error)
        log.warning("scoring shard %d failed and is tried again: %s", shard, " ".join(str(error).split())[:300])


def _stopped(reason: str) -> RunFailedError:
    return RunFailedError(f"{reason}; the shards that were scored are kept, and the same command continues")


def _score(scorer: ShardScorer, shard: int) -> None:
    scorer.score(shard)
