"""How many workers the memory has room for, as told by those that were killed for want of it. Pure.

The first such death may be chance: another process wanted the memory for a moment. Each further one, of a worker that
had neighbours on its node, leaves one place of that node empty, until the node goes. What dies without neighbours has
itself to blame, and is treated as any worker that ends: the image is looked for. Once it is found, all places are used
again.

Shards that such a worker held are tried again on the first node that this happened on, and nowhere else: there one
place after the other gets empty, until the worker with the image is alone. So an image costs as many workers as one
node has, and the four deaths by which it is found, however many nodes there are. (At the end of a run, when places are
free everywhere, each of the four may have to be had on another node, and nodes that were emptied may fill up again.)
"""

from __future__ import annotations

from collections import Counter


class MemoryLimit:
    """Places that are left empty, by node."""

    def __init__(self) -> None:
        self._left_out: Counter[str] = Counter()
        self._kills: Counter[str] = Counter()

    @property
    def left_out(self) -> int:
        """How many places are left empty."""
        return self._left_out.total()

    @property
    def nodes(self) -> list[str]:
        """Where workers that had neighbours were killed, the first such node first."""
        return list(self._kills)

    def of(self, places: int) -> int:
        """How many workers to keep where there is room for so many."""
        return max(places - self.left_out, min(places, 1))

    def killed(self, node: str, places: int) -> bool:
        """A worker that had neighbours was killed; returns whether one fewer is kept from now on."""
        self._kills[node] += 1
        if self._kills.total() == 1 or self.of(places) <= 1:
            return False
        self._left_out[node] += 1
        return True

    def gone(self, node: str) -> None:
        """The node goes, and its places with it; one that comes instead has not been short of memory."""
        self._kills.pop(node, None)
        self._left_out.pop(node, None)

    def found(self) -> bool:
        """The image that took the memory is known; returns whether places were left empty because of it."""
        was_limited = self.left_out > 0
        self._kills.clear()
        self._left_out.clear()
        return was_limited
