"""How many workers the memory has room for, as told by those that were killed for want of it. Pure.

The first such death may be chance: another process wanted the memory for a moment. Each further one, of a worker that
had neighbours on its node, leaves one place empty. What dies without neighbours has itself to blame, and is treated
as any worker that ends: the image is looked for. Once it is found, all places are used again.
"""

from __future__ import annotations


class MemoryLimit:
    """Places that are left empty.

    Attributes:
        left_out: how many.
    """

    def __init__(self) -> None:
        self.left_out = 0
        self._kills = 0

    def of(self, places: int) -> int:
        """How many workers to keep where there is room for so many."""
        return max(places - self.left_out, min(places, 1))

    def killed(self, places: int) -> bool:
        """A worker that had neighbours was killed; returns whether one fewer is kept from now on."""
        self._kills += 1
        if self._kills == 1 or self.of(places) <= 1:
            return False
        self.left_out += 1
        return True

    def found(self) -> bool:
        """The image that took the memory is known; returns whether places were left empty because of it."""
        was_limited = self.left_out > 0
        self._kills = self.left_out = 0
        return was_limited
