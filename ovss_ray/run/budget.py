"""One bound for the memory that images take in a worker, from the first byte fetched to the last row encoded.

All shards of a worker share it. Requests are served in the order in which images are needed: first those of the shard
whose turn on the device it is, in its own order, then those of the others. Nothing overtakes, so that no image starves.
What would wait for ever is let through although there is no room, one image at a time, once nothing of the shard's own
is left that could be given back: one image larger than the whole budget goes through alone, and the shard whose turn it
is always advances.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from typing import NamedTuple

SHARE_OF_OTHERS = 0.25
"""How much of the budget shards may take before it is their turn, and images of rare shapes while they wait."""


class _Request(NamedTuple):
    number: int  # of the image in its shard: the order of service
    size_bytes: int
    start: Callable[[], None]
    held_bytes: int


class MemoryBudget:
    """Bytes for images in all their forms; safe to use from any thread.

    Args:
        limit_bytes: what all of them may take together, but for one image that has to go through.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.most_bytes = 0
        self.changed = threading.Condition(threading.RLock())
        self._accounts: list[Account] = []
        self._turn: Account | None = None
        self._awaited: list[Callable[[], bool]] = []

    def open(self) -> Account:
        """An account for one more shard."""
        with self.changed:
            account = Account(self)
            self._accounts.append(account)
            return account

    @property
    def used_bytes(self) -> int:
        """What is taken now."""
        with self.changed:
            return sum(account.bytes for account in self._accounts)

    def _serve(self) -> None:
        """Start what there is room for; called with the lock after every change."""
        self.most_bytes = max(self.most_bytes, self.used_bytes)
        for account in sorted(self._accounts, key=lambda account: account is not self._turn):
            if not account.serve():
                break
        self._accounts = [account for account in self._accounts if not account.is_over]
        if any(is_met() for is_met in self._awaited):  # waking threads for nothing costs more than asking
            self.changed.notify_all()

    def _wait_until(self, is_met: Callable[[], bool]) -> None:
        self._awaited.append(is_met)
        try:
            self.changed.wait_for(is_met)
        finally:
            self._awaited.remove(is_met)

    def _fits(self, account: Account, size_bytes: int) -> bool:
        if self.used_bytes + size_bytes > self.limit_bytes:
            return False
        if account is self._turn:
            return True
        others = sum(other.ahead for other in self._accounts if other is not self._turn)
        return others + size_bytes <= self.limit_bytes * SHARE_OF_OTHERS

    def _fits_after_encoding(self, size_bytes: int) -> bool:
        encoding = sum(account.encoding for account in self._accounts)
        return self.used_bytes - encoding + size_bytes <= self.limit_bytes

    def _nothing_comes_back(self) -> bool:
        """Whether no image is in the hands of the segmenter or of the encoders, so that waiting frees nothing."""
        return not any(account.taken or account.encoding for account in self._accounts)


class Account:
    """What the images of one shard take; made by `MemoryBudget.open`, whose lock all methods hold.

    Attributes:
        ahead: bytes of images that are fetched, decoded or ready.
        taken: of images that the segmenter has, its results included.
        encoding: of results that wait for the encoders or are with them.
    """

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.ahead = self.taken = self.encoding = 0
        self._waiting: list[_Request] = []
        self._needed = -1  # the image that the segmenter waits for
        self._closed = False

    @property
    def bytes(self) -> int:
        """What all its images take."""
        return self.ahead + self.taken + self.encoding

    @property
    def is_over(self) -> bool:
        """Whether it is closed and empty."""
        return self._closed and not self.bytes

    def ask(self, number: int, size_bytes: int, start: Callable[[], None], *, held_bytes: int = 0) -> None:
        """Call `start` as soon as so many bytes may be taken for an image; they count as `ahead` from then on.

        Args:
            number: of the image in its shard.
            size_bytes: what it takes more than now.
            start: not called any more once the account is closed.
            held_bytes: of `ahead`, what the image takes while it waits.
        """
        with self._budget.changed:
            if not self._closed:
                heapq.heappush(self._waiting, _Request(number, size_bytes, start, held_bytes))
                self._budget._serve()

    def extend(self, number: int, size_bytes: int) -> bool:
        """Count more bytes for an image that is being loaded, if they may be taken now and nothing waits before it."""
        with self._budget.changed:
            if not self._may_extend(number, size_bytes):
                return False
            self.change(ahead=size_bytes)
            return True

    def change(self, *, ahead: int = 0, taken: int = 0, encoding: int = 0) -> None:
        """Count more bytes, or fewer, without asking: for what is known better now, given back or handed on."""
        with self._budget.changed:
            self.ahead += ahead
            self.taken += taken
            self.encoding += encoding
            self._budget._serve()

    def need(self, number: int, is_there: Callable[[], bool]) -> bool:
        """Wait for an image; it is this account's turn from then on.

        Returns:
            True when the image is there; False when it can't be loaded before the segmenter gives back what it has.
        """
        with self._budget.changed:
            self._budget._turn, self._needed = self, number
            self._budget._serve()
            try:
                self._budget._wait_until(lambda: is_there() or self._is_stuck())
                return is_there()
            finally:
                self._needed = -1

    def take_results(self, sizes: list[int]) -> int:
        """Count the results of the first images of a micro-batch as taken, waiting for encoders where that helps.

        Args:
            sizes: bytes of the results of each image.

        Returns:
            for how many images there is room, at least 1.
        """
        budget = self._budget
        with budget.changed:
            count = 1
            while count < len(sizes) and budget._fits_after_encoding(sum(sizes[: count + 1])):
                count += 1
            size = sum(sizes[:count])
            budget._wait_until(
                lambda: budget.used_bytes + size <= budget.limit_bytes or not any(a.encoding for a in budget._accounts)
            )
            self.change(taken=size)
            return count

    def close(self, ready_bytes: int) -> None:
        """Start nothing more; images that were ready, and those that the segmenter had, are gone."""
        with self._budget.changed:
            self._closed = True
            held = sum(request.held_bytes for request in self._waiting)
            self._waiting.clear()
            if self._budget._turn is self:
                self._budget._turn = None
            self.change(ahead=-ready_bytes - held, taken=-self.taken)

    def serve(self) -> bool:
        """Start the requests that may go ahead; False if one has to wait."""
        while self._waiting:
            request = self._waiting[0]
            alone = request.number == self._needed and self._budget._nothing_comes_back()
            if not alone and not self._budget._fits(self, request.size_bytes):
                return False
            heapq.heappop(self._waiting)
            self.ahead += request.size_bytes
            request.start()
        return True

    def _may_extend(self, number: int, size_bytes: int) -> bool:
        if number == self._needed and self._budget._nothing_comes_back():
            return True
        first = self._budget._turn
        if first is not None and first is not self and first._waiting:
            return False
        if self._waiting and self._waiting[0].number < number:
            return False
        return self._budget._fits(self, size_bytes)

    def _is_stuck(self) -> bool:
        request = self._waiting[0] if self._waiting else None
        if request is None or request.number != self._needed or not self.taken:
            return False
        return not self._budget._fits_after_encoding(request.size_bytes)
