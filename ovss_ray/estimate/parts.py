"""The parts of a trial's work: how long each took, what became of its images, and how large its output is."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from ovss_ray.errors import RunFailedError
from ovss_ray.labels.layout import shard_name
from ovss_ray.labels.shard import MAPS, read_shard_metadata
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.reports import ShardReport
from ovss_ray.run.stats import WorkerProgress

WARM_UP_SHARDS = 2  # one micro-batch, and a part like the others
FEWEST_PARTS = 2  # without two there is no interval
MOST_WINDOWS = 8
SHORTEST_PART_S = 0.001  # the resolution of the times in the footers

History = Sequence[tuple[float, WorkerProgress]]
"""What a worker had done at which time (`time.monotonic()`)."""


@dataclass(frozen=True)
class TrialPart:
    """Some of the sample's images, and the seconds that the worker took for them in the middle of its work."""

    images: int
    seconds: float


@dataclass(frozen=True)
class ShardFile:
    """The file of one part."""

    report: ShardReport
    images: int
    finished_at: float
    label_map_bytes: int
    statistics_bytes: int
    footer_bytes: int


def read_file(directory: RunDirectory, report: ShardReport) -> ShardFile:
    """When a part was finished and how its size divides, by its footer."""
    with directory.fs.open(directory.path(shard_name(report.shard)), "rb") as file:
        finished_at = float(read_shard_metadata(file)["finished_at"])
        file.seek(0)
        footer = pq.read_metadata(file)
    sizes: Counter[str] = Counter()
    for group in range(footer.num_row_groups):
        for index in range(footer.num_columns):
            column = footer.row_group(group).column(index)
            sizes[column.path_in_schema] += column.total_compressed_size
    return ShardFile(
        report=report,
        images=footer.num_rows,
        finished_at=finished_at,
        label_map_bytes=sum(sizes[name] for name in MAPS),
        statistics_bytes=sizes.total() - sum(sizes[name] for name in MAPS),
        footer_bytes=report.bytes_written - sizes.total(),
    )


@dataclass(frozen=True)
class Work:
    """What is counted of the work that was done.

    Attributes:
        parts: of it.
        statuses: images by status.
        failures: images without labels by (status, reason).
        files: from which sizes are known.
        before: what the worker had done before the first part; None if that is the warm-up by whole parts.
    """

    parts: tuple[TrialPart, ...]
    statuses: Mapping[str, int]
    failures: Mapping[tuple[str, str], int]
    files: Sequence[ShardFile]
    before: WorkerProgress | None


def measured(files: Sequence[ShardFile], history: History, *, is_late: bool) -> Work:
    """By whole parts, each from the end of the one before it; by images, if the time was over before there were two.

    Args:
        files: in the order in which they were finished.
        history: see `windows`.
        is_late: whether the time was over before all parts were done.

    Raises:
        RunFailedError: too little was done to tell anything.
    """
    # What warms up is finished first, and is made of the first shards; these are not always the same.
    timed = files[WARM_UP_SHARDS - 1 :]
    counted = [file for file in files if file.report.shard >= WARM_UP_SHARDS]
    if not is_late or len(counted) >= FEWEST_PARTS:
        parts = [
            TrialPart(after.images, max(after.finished_at - before.finished_at, SHORTEST_PART_S))
            for before, after in itertools.pairwise(timed)
        ]
        statuses = sum((Counter(file.report.statuses) for file in counted), Counter[str]())
        failures = sum((Counter(file.report.failures) for file in counted), Counter[tuple[str, str]]())
        return Work(tuple(parts), statuses, failures, counted, None)
    parts_by_images, before = windows(history, files[0].images if files else 0)
    if not files or not parts_by_images:
        done = sum(history[-1][1].images.values()) if history else 0
        raise RunFailedError(
            f"{done:,} images of the sample were labelled before the time was over, too few to tell anything; give a "
            "larger --max-minutes"
        )
    last = history[-1][1]
    return Work(
        parts_by_images,
        _difference(last.images, before.images),
        _difference(last.failures, before.failures),
        files,
        before,
    )


def windows(history: History, first: int) -> tuple[tuple[TrialPart, ...], WorkerProgress]:
    """Parts of about the same number of images, of work that was seen only from outside.

    Args:
        history: what the worker had done, at which time.
        first: images that warmed it up, which are not counted; a part holds as many at least.

    Returns:
        the parts, none if hardly anything was done, and what had been done before them.
    """
    counts = [sum(progress.images.values()) for _, progress in history]
    start = next((index for index, count in enumerate(counts) if count >= first), len(counts) - 1)
    images = counts[-1] - counts[start] if counts else 0
    if images < 1:
        return (), WorkerProgress()
    number = min(max(images // max(first, 1), 1), MOST_WINDOWS)
    ends = [next(i for i, count in enumerate(counts) if count >= counts[start] + images * (part + 1) / number)
            for part in range(number)]  # fmt: skip
    edges = [start, *dict.fromkeys(ends)]
    parts = [
        TrialPart(counts[end] - counts[begin], max(history[end][0] - history[begin][0], SHORTEST_PART_S))
        for begin, end in itertools.pairwise(edges)
    ]
    return tuple(parts), history[start][1]


def _difference(after: Mapping[Any, int], before: Mapping[Any, int]) -> dict[Any, int]:
    return {key: count - before.get(key, 0) for key, count in after.items() if count > before.get(key, 0)}
