"""Which requests go wrong, and how."""

from __future__ import annotations

import fnmatch
import random
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

F = TypeVar("F")


@dataclass(frozen=True)
class Rule(Generic[F]):
    """What goes wrong with which requests.

    Attributes:
        fault: what goes wrong.
        method: pattern of the method, such as "PUT".
        path: pattern of the path, with its query.
        nth: numbers of the requests that fail, counted from 1 for each method and path; None for all.
        share: probability, drawn for each method, path and number; 1 for all.
        seed: of these draws.
    """

    fault: F
    method: str
    path: str
    nth: frozenset[int] | None
    share: float
    seed: int

    def strikes(self, method: str, path: str, number: int) -> bool:
        """Whether the n-th request of this method and path fails; the same in every run, whatever the threads do."""
        if not (fnmatch.fnmatchcase(method, self.method) and fnmatch.fnmatchcase(path, self.path)):
            return False
        if self.nth is not None and number not in self.nth:
            return False
        return self.share >= 1 or random.Random(f"{self.seed} {method} {path} {number}").random() < self.share


class Plan(Generic[F]):
    """The rules by which requests fail; the first that strikes holds. Safe to share between threads."""

    def __init__(self) -> None:
        self._rules: list[Rule[F]] = []
        self._seen: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(
        self,
        fault: F,
        *,
        method: str = "*",
        path: str = "*",
        first: int | None = None,
        nth: Iterable[int] | None = None,
        share: float = 1.0,
        seed: int = 0,
    ) -> None:
        """Add a rule; `first=2` is short for `nth=[1, 2]`, the rest is as in `Rule`."""
        if first is not None:
            nth = range(1, first + 1)
        with self._lock:
            self._rules.append(Rule(fault, method, path, None if nth is None else frozenset(nth), share, seed))

    def clear(self) -> None:
        """Let everything succeed from now on, and begin to count anew."""
        with self._lock:
            self._rules.clear()
            self._seen.clear()

    def pick(self, method: str, path: str) -> F | None:
        """What goes wrong with the request that has just arrived."""
        with self._lock:
            self._seen[method, path] += 1
            number = self._seen[method, path]
            return next((rule.fault for rule in self._rules if rule.strikes(method, path, number)), None)
