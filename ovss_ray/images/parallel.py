"""Reading several files at once while their contents come out in order."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from typing import Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_CHUNK = 256  # results that pass from thread to thread together


def flat_map_ordered(
    function: Callable[[T], Iterable[R]], items: Iterable[T], *, threads: int = 16, held: int = 20_000
) -> Iterator[R]:
    """What `for item in items: yield from function(item)` gives, with several items under way at once.

    Items are taken in the calling thread, one window ahead; a single one is worked on there too. A failure is raised
    when its place in the order comes, after all results before it. Whoever stops early leaves no thread working.

    Args:
        function: runs in a thread; lazily, where it is a generator.
        threads: items under way.
        held: results of one item that wait for their turn; its thread pauses there, so memory is bounded.
    """
    iterator = iter(items)
    first = list(islice(iterator, 2))
    if len(first) < 2:
        yield from chain.from_iterable(map(function, first))
        return
    iterator = chain(first, iterator)
    window: deque[_Stream[R]] = deque()
    try:
        while True:
            for item in islice(iterator, threads - len(window)):
                window.append(_Stream(held))
                # A daemon: whoever keeps the iterator, half read, until the interpreter ends, is not held up by it.
                threading.Thread(target=window[-1].fill, args=(function, item), daemon=True).start()
            if not window:
                return
            yield from window[0]
            window.popleft()
    finally:
        for stream in window:
            stream.abandon()


class _Stream(Generic[R]):
    """The results of one item on their way from its thread to the reader."""

    def __init__(self, held: int) -> None:
        self._held = held
        self._changed = threading.Condition()
        self._chunks: deque[list[R]] = deque()
        self._waiting = 0
        self._ended = False
        self._abandoned = False
        self._failure: BaseException | None = None

    def fill(self, function: Callable[[T], Iterable[R]], item: T) -> None:
        chunk: list[R] = []
        failure: BaseException | None = None
        try:
            for result in function(item):
                chunk.append(result)
                if len(chunk) == _CHUNK:
                    if not self._put(chunk):
                        return
                    chunk = []
        except BaseException as error:  # raised again in the reader's thread
            failure = error
        self._put(chunk)
        with self._changed:
            self._failure, self._ended = failure, True
            self._changed.notify_all()

    def _put(self, chunk: list[R]) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting < self._held or self._abandoned)
            if not self._abandoned:
                self._chunks.append(chunk)
                self._waiting += len(chunk)
                self._changed.notify_all()
            return not self._abandoned

    def abandon(self) -> None:
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def __iter__(self) -> Iterator[R]:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._chunks or self._ended)
                if not self._chunks:
                    if self._failure is not None:
                        raise self._failure
                    return
                chunk = self._chunks.popleft()
                self._waiting -= len(chunk)
                self._changed.notify_all()
            yield from chunk
