"""A trial: one real worker of a job labels a sample in a temporary run directory, and is timed stage by stage."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from types import FrameType
from typing import Any

import pyarrow.parquet as pq

from ovss_ray.errors import OvssError, RunFailedError
from ovss_ray.estimate.temporary import temporary_directory
from ovss_ray.images.listing import ImageRef
from ovss_ray.labels.layout import RUN_FILE, shard_name
from ovss_ray.labels.shard import MAPS, read_shard_metadata
from ovss_ray.naming import setting_name
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.engines import SHARDS_PER_WORKER, LocalEngine, RayEngine, open_engine
from ovss_ray.run.events import ShardTask
from ovss_ray.run.job import LabellingJob, ResolvedSpec, labelling_job, run_record, with_dtype
from ovss_ray.run.manifest import write_manifest
from ovss_ray.run.pool import SLOWEST_BATCH, Engine, WorkerGoneError
from ovss_ray.run.progress import Progress, Reporter
from ovss_ray.run.reports import ShardReport
from ovss_ray.run.stats import Failures, WorkerProgress

POLL_S = 0.5
SHORTEST_PART_S = 0.001  # the resolution of the times in the footers
NAME = "worker"
LABELLING = "labelled the sample"
ISOLATED = (
    "; a run finds the image that does this and goes on without it, a trial does not: try another --sample-images"
)


@dataclass(frozen=True)
class TrialPart:
    """Some of the sample's images, and the seconds that the worker took for them in the middle of its work."""

    images: int
    seconds: float


@dataclass(frozen=True)
class StageTime:
    """Time spent in one stage, waiting for other stages not included.

    Attributes:
        stage: fetch, decode, segment, encode or write.
        threads: that may be in the stage at the same time.
        images: that went through it.
        seconds: added up over threads.
    """

    stage: str
    threads: int
    images: int
    seconds: float


@dataclass(frozen=True)
class Trial:
    """What a trial has measured.

    Attributes:
        device: "cuda" or "cpu".
        dtype: precision of the networks.
        workers: how many workers the job would have on this cluster now.
        start_up_s: from the start of the worker's process until it takes images: model loaded, vocabulary encoded.
        parts: of the sample, warm-up excluded.
        stages: in the order of the flow.
        binding_stage: the stage that the others wait for, by the rule of `Progress`; None if nothing was segmented.
        statuses: images by status, warm-up excluded as in what follows.
        failures: images without labels by (status, reason).
        label_map_bytes: of all parts; confidence maps count as label maps.
        statistics_bytes: all other columns.
        footer_bytes: of one shard file: what does not grow with the number of images.
    """

    device: str
    dtype: str
    workers: int
    start_up_s: float
    parts: tuple[TrialPart, ...]
    stages: tuple[StageTime, ...]
    binding_stage: str | None
    statuses: Mapping[str, int]
    failures: Mapping[tuple[str, str], int]
    label_map_bytes: int
    statistics_bytes: int
    footer_bytes: int


def run_trial(resolved: ResolvedSpec, images: Sequence[ImageRef], part_size: int, *, reporter: Reporter) -> Trial:
    """Label images with one worker of the job, two parts at a time, as in a run; the run directory is not touched.

    Every part is a shard of a temporary run directory beside the job's, on the same disk or in the same bucket, which
    is removed at the end. The part that is finished first warms the worker up and is not counted.

    Args:
        resolved: the job.
        images: at least two parts.
        part_size: images per part; the last may be smaller.
        reporter: shows the progress.

    Raises:
        SettingError, WeightsError, InputError: the job cannot be started.
        RunFailedError: the worker did not get through the sample.
    """
    engine = open_engine(resolved.spec)
    try:
        workers = engine.capacity()
        with _sigterm_as_ctrl_c(), temporary_directory(resolved.spec.run, resolved.spec.storage_options) as directory:
            job = _prepare(resolved, images, part_size, directory, engine)
            worker = _TimedWorker(engine, job, reporter)
            try:
                start_up_s = worker.start()
                reports = worker.label_all()
            finally:
                worker.end()
            files = {report.shard: _read_file(directory, report) for report in reports}
    finally:
        engine.close()
    finished = sorted(reports, key=lambda report: files[report.shard].finished_at)
    counted = finished[1:]
    failures: Failures = Counter()
    for report in counted:
        failures.update(report.failures)
    sizes = [files[report.shard] for report in counted]
    return Trial(
        device=engine.device,
        dtype=job.spec.dtype,
        workers=workers,
        start_up_s=start_up_s,
        parts=_parts([files[report.shard] for report in finished]),
        stages=worker.stages(_threads(engine)),
        binding_stage=worker.binding_stage(),
        statuses=dict(sum((Counter(report.statuses) for report in counted), Counter())),
        failures=dict(failures),
        label_map_bytes=sum(size.label_map_bytes for size in sizes),
        statistics_bytes=sum(size.statistics_bytes for size in sizes),
        footer_bytes=sum(size.footer_bytes for size in sizes) // len(sizes),
    )


def _prepare(
    resolved: ResolvedSpec, images: Sequence[ImageRef], part_size: int, directory: RunDirectory, engine: Engine
) -> LabellingJob:
    """A whole, small run as far as the worker can tell; what a killed process leaves behind is readable as one."""
    directory.prepare()
    manifest = write_manifest(images, directory, part_size)
    resolved = with_dtype(resolved, engine.device)
    spec = resolved.spec.model_copy(update={"run": directory.uri})
    settled = dataclasses.replace(resolved, spec=spec)
    record = run_record(settled, manifest, created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    directory.create(RUN_FILE, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return labelling_job(settled, manifest, record, directory, device=engine.device)


class _TimedWorker:
    """One worker, its parts, and what it says about itself after the first part and at the end."""

    def __init__(self, engine: Engine, job: LabellingJob, reporter: Reporter) -> None:
        self._engine = engine
        self._job = job
        self._reporter = reporter
        self._launched = time.monotonic()
        self._handle = engine.launch(job)
        self._progress = Progress(images=job.manifest.images, images_before=0, shards=job.manifest.shards)
        self._warm = self._last = WorkerProgress()
        self._timeout_s = job.batch_timeout_s

    def start(self) -> float:
        """Load the segmenter and the vocabulary; returns the seconds since the process was asked for."""
        _result(self._handle.place(), "started")
        self._ask("load", while_it="loaded the segmenter")
        text = self._ask("encode_text", while_it="encoded the vocabulary")
        self._ask("begin", text, {}, while_it="labelled a made-up image")
        return time.monotonic() - self._launched

    def label_all(self) -> list[ShardReport]:
        """Label all parts, as many at a time as in a run."""
        waiting = deque(range(self._job.manifest.shards))
        running: set[Future[Any]] = set()
        reports: list[ShardReport] = []
        with self._reporter.showing(self._progress):
            while waiting or running:
                while waiting and len(running) < SHARDS_PER_WORKER:
                    running.add(self._handle.call("label_shard", ShardTask(waiting.popleft(), attempt=1)))
                done, running = wait(running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                found = [_result(future, LABELLING, ISOLATED) for future in done]
                self._observe(found)
                if not reports:
                    self._warm = self._last
                reports += found
        return reports

    def end(self) -> None:
        self._handle.kill()

    def stages(self, threads: int) -> tuple[StageTime, ...]:
        """Time by stage.

        That on the device is of the images after the warm-up; those of the other stages, which run ahead or behind,
        and have no warm-up to speak of, are of all images.
        """
        spec = self._job.spec
        decoders = threads if spec.decode_threads == "auto" else spec.decode_threads
        whole, images = self._last.stage_seconds, sum(self._last.images.values())
        return (
            StageTime("fetch", spec.fetch_concurrency, images, whole.get("fetch", 0.0)),
            StageTime("decode", min(decoders, spec.fetch_concurrency), images, whole.get("decode", 0.0)),
            StageTime("segment", 1, images - sum(self._warm.images.values()), self._steady().get("segment", 0.0)),
            StageTime("encode", threads, images, whole.get("encode", 0.0)),
            StageTime("write", 1, images, whole.get("write", 0.0)),
        )

    def binding_stage(self) -> str | None:
        steady = Progress(images=0, images_before=0, shards=0)
        steady.observe({NAME: WorkerProgress(stage_seconds=self._steady())})
        return steady.binding_stage

    def _steady(self) -> dict[str, float]:
        return {
            name: seconds - self._warm.stage_seconds.get(name, 0.0)
            for name, seconds in self._last.stage_seconds.items()
        }

    def _observe(self, found: list[ShardReport]) -> None:
        asked = self._handle.call("progress")
        answered, _ = wait([asked], timeout=self._timeout_s)
        if answered:
            self._last = _result(asked, LABELLING, ISOLATED)
        limit = max(self._timeout_s, SLOWEST_BATCH * self._last.batch_s)
        if self._engine.isolates and (not answered or self._last.busy_s > limit):
            raise RunFailedError(
                f"one micro-batch or image of the sample took over {limit:.0f} s (hang){ISOLATED}, "
                f"or a longer {setting_name('batch_timeout_s')}"
            )
        self._progress.observe({NAME: self._last})
        for report in found:
            self._progress.shard_done(NAME, report.statuses, report.failures)
        self._reporter.update(self._progress)

    def _ask(self, method: str, *arguments: Any, while_it: str) -> Any:
        return _result(self._handle.call(method, *arguments), while_it)


def _result(future: Future[Any], while_it: str, hint: str = "") -> Any:
    try:
        return future.result()
    except OvssError:
        raise
    except Exception as error:  # of the process, the device or the method: a trial has no second worker
        reason = str(error) if isinstance(error, WorkerGoneError) else f"{type(error).__name__}: {error}"
        raise RunFailedError(f"the worker failed while it {while_it}: {reason}{hint}") from error


@dataclass(frozen=True)
class _ShardFile:
    images: int
    finished_at: float
    label_map_bytes: int
    statistics_bytes: int
    footer_bytes: int


def _read_file(directory: RunDirectory, report: ShardReport) -> _ShardFile:
    with directory.fs.open(directory.path(shard_name(report.shard)), "rb") as file:
        finished_at = float(read_shard_metadata(file)["finished_at"])
        file.seek(0)
        footer = pq.read_metadata(file)
    sizes: Counter[str] = Counter()
    for group in range(footer.num_row_groups):
        for index in range(footer.num_columns):
            column = footer.row_group(group).column(index)
            sizes[column.path_in_schema] += column.total_compressed_size
    return _ShardFile(
        images=footer.num_rows,
        finished_at=finished_at,
        label_map_bytes=sum(sizes[name] for name in MAPS),
        statistics_bytes=sizes.total() - sum(sizes[name] for name in MAPS),
        footer_bytes=report.bytes_written - sizes.total(),
    )


def _parts(files: list[_ShardFile]) -> tuple[TrialPart, ...]:
    """Parts in the order in which they were finished; the time of each runs from the end of the one before it."""
    return tuple(
        TrialPart(file.images, max(file.finished_at - before.finished_at, SHORTEST_PART_S))
        for before, file in itertools.pairwise(files)
    )


def _threads(engine: Engine) -> int:
    """CPU threads that a worker of the engine decodes and encodes with."""
    if isinstance(engine, LocalEngine):
        return engine._cpus
    assert isinstance(engine, RayEngine)
    return engine._threads_each


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """SIGTERM raises KeyboardInterrupt with its number, so that what is temporary is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt(signum)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
