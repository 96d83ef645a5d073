"""What became of a run's images, counted shard by shard: memory grows with the kinds of failures only."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import pyarrow.parquet as pq

from ovss_ray.labels.schema import METADATA_PREFIX, load_contract

OTHER_REASONS = "other reasons"

_THREADS = 16  # of an object store each footer takes a few requests
_SHARDS_AHEAD = 1024
_REASONS_KEPT = 10_000
_STATUSES_KEY = (METADATA_PREFIX + "statuses").encode()

OpenShard = Callable[[int], AbstractContextManager[pq.ParquetFile]]


@dataclass(frozen=True)
class FailureReason:
    """Images without labels for the same reason.

    Attributes:
        status, error: as in their rows.
        images: how many.
        example: the first of their URIs in alphabetical order.
    """

    status: str
    error: str | None
    images: int
    example: str


@dataclass(frozen=True)
class Outcomes:
    """Images by status (none is left out, those without images are), and why some have no labels, most frequent first.

    Beyond ten thousand different reasons, those met later are `OTHER_REASONS`.
    """

    statuses: dict[str, int]
    failures: list[FailureReason]


def count_outcomes(open_shard: OpenShard, shards: Sequence[int], superseded: Mapping[int, Set[int]]) -> Outcomes:
    """Count the rows of shards; of a shard whose footer says that all its images have labels no row is read.

    Args:
        open_shard: opens the file of a shard.
        shards: those to count.
        superseded: by shard, images whose row there does not count.
    """
    total = _Tally()
    with ThreadPoolExecutor(_THREADS) as pool:
        for first in range(0, len(shards), _SHARDS_AHEAD):
            ahead = shards[first : first + _SHARDS_AHEAD]
            for tally in pool.map(lambda shard: _tally(open_shard, shard, superseded.get(shard, frozenset())), ahead):
                total.add(tally)
    known = next(column for column in load_contract("shard")["columns"] if column["name"] == "status")["values"]
    order = sorted(total.statuses, key=[*known, *total.statuses].index)
    failures = [FailureReason(*kind, total.reasons[kind], total.examples[kind]) for kind in total.reasons]
    failures.sort(key=lambda failure: (-failure.images, failure.status, failure.error or ""))
    return Outcomes({status: total.statuses[status] for status in order}, failures)


@dataclass
class _Tally:
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str | None]] = field(default_factory=Counter)
    examples: dict[tuple[str, str | None], str] = field(default_factory=dict)

    def count(self, row: Mapping[str, Any]) -> None:
        self.statuses[row["status"]] += 1
        if row["status"] != "ok":
            self._fail((row["status"], row["error"]), 1, row["uri"])

    def add(self, other: _Tally) -> None:
        self.statuses.update(other.statuses)
        for kind, images in other.reasons.items():
            self._fail(kind, images, other.examples[kind])

    def _fail(self, kind: tuple[str, str | None], images: int, example: str) -> None:
        if kind not in self.reasons and len(self.reasons) >= _REASONS_KEPT:
            kind = (kind[0], OTHER_REASONS)
        self.reasons[kind] += images
        self.examples[kind] = min(example, self.examples.get(kind, example))


def _tally(open_shard: OpenShard, shard: int, superseded: Set[int]) -> _Tally:
    tally = _Tally()
    with open_shard(shard) as parquet:
        footer = json.loads((parquet.schema_arrow.metadata or {}).get(_STATUSES_KEY, b"null"))
        if footer is not None and set(footer) <= {"ok"} and not superseded:
            tally.statuses.update(footer)
            return tally
        for row in parquet.read(columns=["image_id", "uri", "status", "error"]).to_pylist():
            if row["image_id"] not in superseded:
                tally.count(row)
    return tally
