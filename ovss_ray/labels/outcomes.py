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

from ovss_ray.labels.reasons import KINDS_KEPT, OTHER_REASONS, kind_of
from ovss_ray.labels.schema import METADATA_PREFIX, load_contract

_THREADS = 16  # of an object store each footer takes a few requests
_SHARDS_AHEAD = 64
_FINGERPRINT_KEY = (METADATA_PREFIX + "fingerprint").encode()
_STATUSES_KEY = (METADATA_PREFIX + "statuses").encode()

OpenShard = Callable[[int], AbstractContextManager[pq.ParquetFile]]


@dataclass(frozen=True)
class FailureReason:
    """Images without labels for the same kind of reason.

    Attributes:
        status: as in their rows.
        kind: their reason without numbers, names and addresses (`kind_of`).
        images: how many.
        example: the first of their URIs in alphabetical order.
        error: the reason in the row of this one.
    """

    status: str
    kind: str
    images: int
    example: str
    error: str | None


@dataclass(frozen=True)
class Outcomes:
    """Images by status (none is left out, those without images are), and why some have no labels, most frequent first.

    Beyond a thousand kinds of reasons, those met later are `OTHER_REASONS`. `fingerprints` are those that shards were
    labelled under, each with the first such shard: there should be one.
    """

    statuses: dict[str, int]
    failures: list[FailureReason]
    fingerprints: dict[str, int] = field(default_factory=dict)


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
    failures = [FailureReason(*kind, total.reasons[kind], *total.examples[kind]) for kind in total.reasons]
    failures.sort(key=lambda failure: (-failure.images, failure.status, failure.kind))
    return Outcomes({status: total.statuses[status] for status in order}, failures, total.fingerprints)


_Example = tuple[str, str | None]


@dataclass
class _Tally:
    statuses: Counter[str] = field(default_factory=Counter)
    reasons: Counter[tuple[str, str]] = field(default_factory=Counter)
    examples: dict[tuple[str, str], _Example] = field(default_factory=dict)
    fingerprints: dict[str, int] = field(default_factory=dict)

    def count(self, row: Mapping[str, Any]) -> None:
        self.statuses[row["status"]] += 1
        if row["status"] != "ok":
            self._fail((row["status"], kind_of(row["error"])), 1, (row["uri"], row["error"]))

    def add(self, other: _Tally) -> None:
        self.statuses.update(other.statuses)
        for fingerprint, shard in other.fingerprints.items():
            self.fingerprints[fingerprint] = min(shard, self.fingerprints.get(fingerprint, shard))
        for kind, images in other.reasons.items():
            self._fail(kind, images, other.examples[kind])

    def _fail(self, kind: tuple[str, str], images: int, example: _Example) -> None:
        if kind not in self.reasons and len(self.reasons) >= KINDS_KEPT:
            kind = (kind[0], OTHER_REASONS)
        self.reasons[kind] += images
        self.examples[kind] = min(example, self.examples.get(kind, example), key=lambda pair: pair[0])


def _tally(open_shard: OpenShard, shard: int, superseded: Set[int]) -> _Tally:
    tally = _Tally()
    with open_shard(shard) as parquet:
        metadata = parquet.schema_arrow.metadata or {}
        if _FINGERPRINT_KEY in metadata:
            tally.fingerprints[metadata[_FINGERPRINT_KEY].decode()] = shard
        footer = json.loads(metadata.get(_STATUSES_KEY, b"null"))
        if footer is not None and set(footer) <= {"ok"} and not superseded:
            tally.statuses.update(footer)
            return tally
        for row in parquet.read(columns=["image_id", "uri", "status", "error"]).to_pylist():
            if row["image_id"] not in superseded:
                tally.count(row)
    return tally
