"""Which shards take much longer than others do. Pure: the time is an argument."""

from __future__ import annotations

from collections import deque

REMEMBERED = 256
FEWEST = 8  # shards that must have finished before "longer than others" means something
TIMES_P95 = 2.0
SHORTEST_S = 5.0


class ShardClock:
    """Times shards from the moment a worker has nothing before them until they are finished."""

    def __init__(self) -> None:
        self._queues: dict[str, list[int]] = {}  # shards by worker, the one that it works on first
        self._since: dict[str, float] = {}
        self._seconds: deque[float] = deque(maxlen=REMEMBERED)

    def assigned(self, worker: str, shard: int, now: float) -> None:
        """A worker was given a shard."""
        queue = self._queues.setdefault(worker, [])
        queue.append(shard)
        if len(queue) == 1:
            self._since[worker] = now

    def finished(self, worker: str, shard: int, now: float) -> None:
        """A worker is through with a shard, successfully or not."""
        queue = self._queues.get(worker, [])
        if shard not in queue:
            return
        if queue[0] == shard:
            self._seconds.append(now - self._since[worker])
            self._since[worker] = now
        queue.remove(shard)

    def gone(self, worker: str) -> None:
        """A worker is gone."""
        self._queues.pop(worker, None)

    def overdue(self, now: float) -> list[int]:
        """Shards that have taken more than twice the 95th percentile of the last ones, and five seconds.

        Those that wait behind one of them on the same worker are overdue as well.
        """
        if len(self._seconds) < FEWEST:
            return []
        p95 = sorted(self._seconds)[int(0.95 * (len(self._seconds) - 1))]
        limit = max(TIMES_P95 * p95, SHORTEST_S)
        late = [queue for worker, queue in self._queues.items() if queue and now - self._since[worker] > limit]
        return [shard for queue in late for shard in queue]
