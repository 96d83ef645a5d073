"""The rate of the last while, smoothed: what the time left is told from. Pure."""

from __future__ import annotations

import math

SHORTEST_MEMORY_S = 30.0
LONGEST_MEMORY_S = 600.0
OVERDUE = 3.0  # times the usual wait


class Pace:
    """An exponentially weighted mean of how many images come per second.

    Its memory is a third of the time watched so far, between half a minute and ten: a run that has just begun has
    nothing better than its mean, and one that is long under way should not remember its first hour. Images come in
    lumps (a micro-batch, a shard): between two the mean stays as it is, until the next one is overdue.

    Attributes:
        per_s: images per second; None before there is anything to tell it from.
    """

    def __init__(self) -> None:
        self.per_s: float | None = None
        self._begun: float | None = None
        self._seen_at = 0.0
        self._count = 0
        self._sum = 0.0
        self._weight = 0.0
        self._usual_s = 0.0  # between two lumps

    def see(self, count: int, now: float) -> None:
        """So many images are done at this time, in seconds of any clock; the first images are where it begins."""
        if self._begun is None:
            if count:
                self._begun, self._seen_at, self._count = now, now, count
            return
        passed = now - self._seen_at
        is_overdue = self._usual_s and passed > OVERDUE * self._usual_s
        if passed <= 0 or (count == self._count and not is_overdue):
            return
        memory = min(max((now - self._begun) / 3, SHORTEST_MEMORY_S), LONGEST_MEMORY_S)
        kept = math.exp(-passed / memory)
        # Divided by the sum of the weights, it is the plain mean as long as there is little to forget.
        total = kept * self._sum + (1 - kept) * (count - self._count) / passed
        weight = kept * self._weight + (1 - kept)
        self.per_s = max(total / weight, 0.0)
        if count != self._count:
            self._usual_s = passed if not self._usual_s else 0.8 * self._usual_s + 0.2 * passed
            self._sum, self._weight = total, weight
            self._seen_at, self._count = now, count
