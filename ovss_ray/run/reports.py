"""What a worker says about its work; read by the driver, which does not import the worker."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ovss_ray.run.stats import WorkerProgress


@dataclass(frozen=True)
class ShardReport:
    """What a worker says about a finished shard.

    Attributes:
        shard: its id.
        created: False if another worker's file was there first; this worker's labels were then dropped.
        statuses: number of images by status.
        failures: number of images without labels by (status, kind of reason).
        bytes_written: size of the file.
        seconds: from its first image to its file; None if the file was there before.
        progress: of the worker, this shard included.
    """

    shard: int
    created: bool
    statuses: Mapping[str, int]
    failures: Mapping[tuple[str, str], int] = field(default_factory=dict)
    bytes_written: int = 0
    seconds: float | None = None
    progress: WorkerProgress = field(default_factory=WorkerProgress)


class DeviceLostError(Exception):
    """The process can no longer use its device; it must be replaced."""
