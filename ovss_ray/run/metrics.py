"""The metrics of a run: the driver exports them through Ray, whose agents serve them to Prometheus."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ovss_ray.run.progress import Progress
from ovss_ray.spec import JobSpec

EXPORT_EVERY_S = 1.0
SHARD_SECONDS = [1.0, 5.0, 15.0, 30.0, 60.0, 120.0, 180.0, 300.0, 600.0, 1200.0, 3600.0]


class Metrics(Protocol):
    """Where the numbers of a session go."""

    def shard_finished(self, seconds: float) -> None:
        """A worker took this long for a shard."""
        ...

    def update(self, progress: Progress) -> None:
        """The latest; cheap enough for every turn of the driver's loop."""
        ...

    def close(self, progress: Progress) -> None:
        """The last."""
        ...


def open_metrics(spec: JobSpec) -> Metrics:
    """The metrics of a session; with `engine: local` there is nothing to export them to."""
    return NoMetrics() if spec.engine == "local" else RayMetrics(run=spec.run_name, method=spec.method)


class NoMetrics:
    """Exports nothing."""

    def shard_finished(self, seconds: float) -> None:
        pass

    def update(self, progress: Progress) -> None:
        pass

    def close(self, progress: Progress) -> None:
        pass


class RayMetrics:
    """Exports through `ray.util.metrics`; to be made once Ray is there.

    Ray puts `ray_` before each name and `_total` behind those of counters. Counters begin at 0 with each session;
    images and shards count once they are finished, each once. Without `ray[default]` on the driver's node Ray serves
    no metrics, and this does nothing.

    Args:
        run: value of the tag `run`.
        method: value of the tag `method`.
    """

    def __init__(self, *, run: str, method: str) -> None:
        from ray.util.metrics import Counter, Gauge, Histogram

        self._tags = {"run": run, "method": method}
        self._counters = [(metric, metric.made_by(Counter)) for metric in _COUNTERS]
        self._gauges = [(metric, metric.made_by(Gauge)) for metric in _GAUGES]
        self._shard_seconds = Histogram(
            "ovss_ray_shard_seconds",
            "Seconds of a worker for one shard, from its first image to its file",
            boundaries=SHARD_SECONDS,
            tag_keys=_RUN_TAGS,
        )
        self._counted: dict[tuple[str, str], float] = {}
        self._last = float("-inf")

    def shard_finished(self, seconds: float) -> None:
        self._shard_seconds.observe(seconds, tags=self._tags)

    def update(self, progress: Progress) -> None:
        if time.monotonic() - self._last >= EXPORT_EVERY_S:
            self._export(progress)

    def close(self, progress: Progress) -> None:
        self._export(progress)

    def _export(self, progress: Progress) -> None:
        self._last = time.monotonic()
        for metric, gauge in self._gauges:
            for tags, value in metric.values(progress):
                gauge.set(value, tags={**self._tags, **tags})
        for metric, counter in self._counters:
            for tags, total in metric.values(progress):
                key = metric.name, tags.get(metric.tag, "")
                increment = total - self._counted.get(key, 0.0)  # which is what Ray's counters take
                if increment > 0:
                    counter.inc(increment, tags={**self._tags, **tags})
                    self._counted[key] = total


@dataclass(frozen=True)
class _Metric:
    """One metric: its number, or its numbers by a tag. A tag has few values: never a reason or a place."""

    name: str
    text: str
    read: Callable[[Progress], float | Mapping[Any, float]]
    tag: str = ""

    def values(self, progress: Progress) -> list[tuple[dict[str, str], float]]:
        """Tags and number of each series."""
        read = self.read(progress)
        if isinstance(read, Mapping):
            return [({self.tag: str(label)}, value) for label, value in read.items()]
        return [({}, read)]

    def made_by(self, kind: Any) -> Any:
        """The metric as Ray's `Counter` or `Gauge`."""
        return kind(self.name, self.text, tag_keys=(*_RUN_TAGS, self.tag) if self.tag else _RUN_TAGS)


_RUN_TAGS = ("run", "method")
_COUNTERS = (
    _Metric("ovss_ray_images", "Images of finished shards", lambda p: p.statuses, "status"),
    _Metric("ovss_ray_stage_seconds", "Seconds by stage, over threads and workers", lambda p: p.stage_seconds, "stage"),
    _Metric("ovss_ray_fetch_retries", "Requests made again, by kind of failure before", lambda p: p.retries, "kind"),
    _Metric("ovss_ray_shard_retries", "Attempts at shards beyond the first", lambda p: p.incidents.shard_retries),
    _Metric("ovss_ray_worker_deaths", "Workers that ended unasked", lambda p: p.incidents.worker_deaths, "kind"),
    _Metric("ovss_ray_crashed_images", "Images found to end their worker", lambda p: p.incidents.crashed_images),
)
_GAUGES = (
    _Metric("ovss_ray_run_images", "Images of the run", lambda p: p.images),
    _Metric(
        "ovss_ray_run_images_finished",
        "Images labelled or found impossible, those of earlier sessions and of unfinished shards included",
        lambda p: p.images_before + p.images_now,
    ),
    _Metric("ovss_ray_run_shards", "Shards of the run", lambda p: p.shards),
    _Metric("ovss_ray_run_shards_finished", "Shards whose file exists", lambda p: p.shards_finished),
    _Metric("ovss_ray_images_per_second", "Mean rate of this driver, start-up left out", lambda p: p.images_per_s),
    _Metric("ovss_ray_workers", "Workers now: starting or ready", lambda p: p.incidents.workers, "state"),
    _Metric("ovss_ray_gpus_set_aside", "GPUs on which workers fail", lambda p: p.incidents.gpus_set_aside),
)
