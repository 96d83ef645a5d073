"""How many requests to one store may be under way: fewer when it says that it is busy, more again when it does not."""

from __future__ import annotations

import threading
from typing import Literal

Reply = Literal["good", "throttled", "none"]


class RequestWindow:
    """A window for requests by additive increase and multiplicative decrease (AIMD); shared by any number of threads.

    A throttled reply halves the window, a full window of good replies widens it by one. Only replies to requests that
    were sent after the last halving count: the others say nothing about the present window, and a burst of refusals
    from one round trip halves it once. It has no clock and makes no request itself.

        number = window.enter()  # waits for its turn
        window.leave(number, "good")

    Args:
        ceiling: the widest window, 1 or more, and the first one.
    """

    def __init__(self, ceiling: int) -> None:
        if ceiling < 1:
            raise ValueError("a request window must have room for 1 request at least")
        self._ceiling = ceiling
        self._size = ceiling
        self._sent = 0
        self._in_flight = 0
        self._sent_before_halving = 0
        self._good_replies = 0
        self._changed = threading.Condition()

    @property
    def size(self) -> int:
        """Requests that may be under way together now, from 1 to the ceiling."""
        return self._size

    def enter(self) -> int:
        """Wait until there is room for one more request; returns its number, for `leave`."""
        with self._changed:
            self._changed.wait_for(lambda: self._in_flight < self._size)
            self._in_flight += 1
            self._sent += 1
            return self._sent

    def leave(self, number: int, reply: Reply) -> None:
        """Say what became of a request.

        Args:
            number: as `enter` returned it.
            reply: "good" if the store served it (that there is no such object is served too), "throttled" if it
                refused it because it is busy, "none" if nothing can be concluded, as from a lost connection.
        """
        with self._changed:
            self._in_flight -= 1
            if number > self._sent_before_halving:
                self._take(reply)
            self._changed.notify(2)  # one place was left, and one may be new

    def _take(self, reply: Reply) -> None:
        if reply == "throttled":
            self._size = max(1, self._size // 2)
            self._sent_before_halving = self._sent
            self._good_replies = 0
        elif reply == "good":
            self._good_replies += 1
            if self._good_replies >= self._size:
                self._size = min(self._ceiling, self._size + 1)
                self._good_replies = 0
