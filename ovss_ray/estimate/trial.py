"""A trial: one real worker of a job labels a sample in a temporary run directory, and is timed stage by stage."""

from __future__ import annotations

import dataclasses
import json
import signal
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from types import FrameType
from typing import Any

from ovss_ray.errors import OvssError, RunFailedError
from ovss_ray.estimate.parts import WARM_UP_SHARDS, TrialPart, measured, read_file
from ovss_ray.estimate.temporary import temporary_directory
from ovss_ray.images.listing import ImageRef
from ovss_ray.labels.layout import MANIFEST_FOLDER, RUN_FILE, Manifest
from ovss_ray.naming import setting_name
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.engines import SHARDS_PER_WORKER, LocalEngine, RayEngine
from ovss_ray.run.events import ShardTask
from ovss_ray.run.job import LabellingJob, ResolvedSpec, labelling_job, run_record, with_dtype
from ovss_ray.run.manifest import write_parts
from ovss_ray.run.pool import SLOWEST_BATCH, Engine, WorkerGoneError
from ovss_ray.run.progress import Progress, Reporter
from ovss_ray.run.reports import ShardReport
from ovss_ray.run.stats import WorkerProgress

POLL_S = 0.5
NAME = "worker"
LABELLING = "labelled the sample"
ISOLATED = (
    "; a run finds the image that does this and goes on without it, a trial does not: try another --sample-images"
)


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
        cpus: CPU cores that each of them has.
        start_up_s: from the start of the worker's process until it takes images: model loaded, vocabulary encoded.
        parts: of the sample, warm-up excluded.
        stages: in the order of the flow.
        binding_stage: the stage that the others wait for, by the rule of `Progress`; None if nothing was segmented.
        statuses: images by status, warm-up excluded as in what follows.
        failures: images without labels by (status, reason).
        sized_images: images of the parts that sizes were taken of.
        label_map_bytes: of these parts; confidence maps count as label maps.
        statistics_bytes: all other columns.
        footer_bytes: of one shard file: what does not grow with the number of images.
        stopped: whether its time was over before the sample was.
    """

    device: str
    dtype: str
    workers: int
    cpus: int
    start_up_s: float
    parts: tuple[TrialPart, ...]
    stages: tuple[StageTime, ...]
    binding_stage: str | None
    statuses: Mapping[str, int]
    failures: Mapping[tuple[str, str], int]
    sized_images: int
    label_map_bytes: int
    statistics_bytes: int
    footer_bytes: int
    stopped: bool = False


def first_size(part_size: int, batch_size: int) -> int:
    """Images of the first shard of a trial."""
    return min(part_size, batch_size)


def run_trial(
    resolved: ResolvedSpec,
    images: Sequence[ImageRef],
    part_size: int,
    *,
    engine: Engine,
    deadline: float,
    reporter: Reporter,
) -> Trial:
    """Label images with one worker of the job, two parts at a time, as in a run; the run directory is not touched.

    Every part is a shard of a temporary run directory beside the job's, on the same disk or in the same bucket, which
    is removed at the end. A first micro-batch and the part that is finished first warm the worker up and are not
    counted. When the time is over, what is under way is given up, and what was done until then is counted.

    Args:
        resolved: the job.
        images: a micro-batch, and at least two parts.
        part_size: images per part; the last may be smaller.
        engine: where the worker runs.
        deadline: of `time.monotonic()`.
        reporter: shows the progress.

    Raises:
        SettingError, WeightsError, InputError: the job cannot be started.
        RunFailedError: the worker did not get through enough of the sample to tell.
    """
    workers = engine.capacity()
    with _sigterm_as_ctrl_c(), temporary_directory(resolved.spec.run, resolved.spec.storage_options) as directory:
        job = _prepare(resolved, images, part_size, directory, engine)
        worker = _TimedWorker(engine, job, reporter, deadline)
        try:
            start_up_s = worker.start()
            reports = worker.label_all()
        finally:
            worker.end()
        files = [read_file(directory, report) for report in reports]
    files.sort(key=lambda file: file.finished_at)
    work = measured(files, worker.history, is_late=worker.is_late)
    if work.before is not None:
        worker.warm = work.before
    threads = _threads(engine)
    return Trial(
        device=engine.device,
        dtype=job.spec.dtype,
        workers=workers,
        cpus=threads,
        start_up_s=start_up_s,
        parts=work.parts,
        stages=worker.stages(threads),
        binding_stage=worker.binding_stage(),
        statuses=work.statuses,
        failures=work.failures,
        sized_images=sum(file.images for file in work.files),
        label_map_bytes=sum(file.label_map_bytes for file in work.files),
        statistics_bytes=sum(file.statistics_bytes for file in work.files),
        footer_bytes=sum(file.footer_bytes for file in work.files) // len(work.files),
        stopped=worker.is_late,
    )


def _prepare(
    resolved: ResolvedSpec, images: Sequence[ImageRef], part_size: int, directory: RunDirectory, engine: Engine
) -> LabellingJob:
    """A whole, small run as far as the worker can tell; what a killed process leaves behind is readable as one."""
    directory.prepare()
    manifest = _write_manifest(images, first_size(part_size, resolved.spec.batch_size), part_size, directory)
    resolved = with_dtype(resolved, engine.device)
    spec = resolved.spec.model_copy(update={"run": directory.uri})
    settled = dataclasses.replace(resolved, spec=spec)
    record = run_record(settled, manifest, created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    directory.create(RUN_FILE, json.dumps(record, indent=1, ensure_ascii=False).encode())
    return labelling_job(settled, manifest, record, directory, device=engine.device)


def _write_manifest(images: Sequence[ImageRef], first: int, part_size: int, directory: RunDirectory) -> Manifest:
    """A shard of `first` images, so that something is soon known however slow the work is; then parts of their size."""

    def write(_: int, data: bytes) -> str:
        name = f"{MANIFEST_FOLDER}/{uuid.uuid4().hex}.parquet"
        directory.create(name, data)
        return name

    numbered = list(enumerate(images))
    head, digest = write_parts(numbered[:first], part_size, write)
    rest, _ = write_parts(numbered[first:], part_size, write)
    return Manifest(part_size, digest, (*head, *rest))


class _TimedWorker:
    """One worker, its parts, and what it says about itself while it works.

    Attributes:
        is_late: whether the time was over before all parts were done.
        history: what it had done at which time (`time.monotonic()`).
        warm: what it had done when it was warm.
    """

    def __init__(self, engine: Engine, job: LabellingJob, reporter: Reporter, deadline: float) -> None:
        self.is_late = False
        self.history: list[tuple[float, WorkerProgress]] = []
        self._deadline = deadline
        self._running: set[Future[Any]] = set()
        self._engine = engine
        self._job = job
        self._reporter = reporter
        self._launched = time.monotonic()
        self._handle = engine.launch(job)
        self._progress = Progress(images=job.manifest.images, images_before=0, shards=job.manifest.shards)
        self.warm = self._last = WorkerProgress()
        self._timeout_s = job.batch_timeout_s

    def start(self) -> float:
        """Load the segmenter and the vocabulary; returns the seconds since the process was asked for."""
        self._in_time(self._handle.place(), "started")
        self._in_time(self._handle.call("load"), "loaded the segmenter")
        text = self._in_time(self._handle.call("encode_text"), "encoded the vocabulary")
        self._in_time(self._handle.call("begin", text, {}), "labelled a made-up image")
        return time.monotonic() - self._launched

    def label_all(self) -> list[ShardReport]:
        """Label the parts, as many at a time as in a run, until all are done or the time is over."""
        waiting = deque(range(self._job.manifest.shards))
        reports: list[ShardReport] = []
        with self._reporter.showing(self._progress):
            while waiting or self._running:
                # The first shard alone: it is the smallest, and tells something even if the others take too long.
                while waiting and len(self._running) < (SHARDS_PER_WORKER if reports else 1):
                    self._running.add(self._handle.call("label_shard", ShardTask(waiting.popleft(), attempt=1)))
                done, self._running = wait(self._running, timeout=POLL_S, return_when=FIRST_COMPLETED)
                found = [_result(future, LABELLING, ISOLATED) for future in done]
                self._observe(found)
                if len(reports) < WARM_UP_SHARDS:
                    self.warm = self._last
                reports += found
                if time.monotonic() > self._deadline and (waiting or self._running):
                    self.is_late = True
                    break
        return reports

    def end(self) -> None:
        """Let the worker go, and nothing of it be left."""
        if self._running and not self._engine.isolates:
            self._handle.call("abandon")
            wait(self._running, timeout=self._timeout_s)
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
            StageTime("segment", 1, images - sum(self.warm.images.values()), self._steady().get("segment", 0.0)),
            StageTime("encode", threads, images, whole.get("encode", 0.0)),
            StageTime("write", 1, images, whole.get("write", 0.0)),
        )

    def binding_stage(self) -> str | None:
        steady = Progress(images=0, images_before=0, shards=0)
        steady.observe({NAME: WorkerProgress(stage_seconds=self._steady())})
        return steady.binding_stage

    def _steady(self) -> dict[str, float]:
        return {
            name: seconds - self.warm.stage_seconds.get(name, 0.0) for name, seconds in self._last.stage_seconds.items()
        }

    def _observe(self, found: list[ShardReport]) -> None:
        asked = self._handle.call("progress")
        answered, _ = wait([asked], timeout=min(self._timeout_s, max(self._deadline - time.monotonic(), POLL_S)))
        if answered:
            self._last = _result(asked, LABELLING, ISOLATED)
            self.history.append((time.monotonic(), self._last))
        is_silent = not answered and time.monotonic() < self._deadline
        limit = max(self._timeout_s, SLOWEST_BATCH * self._last.batch_s)
        if self._engine.isolates and (is_silent or self._last.busy_s > limit):
            raise RunFailedError(
                f"one micro-batch or image of the sample took over {limit:.0f} s (hang){ISOLATED}, "
                f"or a longer {setting_name('batch_timeout_s')}"
            )
        self._progress.observe({NAME: self._last})
        for report in found:
            self._progress.shard_done(NAME, report.statuses, report.failures)
        self._reporter.update(self._progress)

    def _in_time(self, future: Future[Any], while_it: str) -> Any:
        wait([future], timeout=max(self._deadline - time.monotonic(), 0.0))
        if not future.done():
            raise RunFailedError(
                f"the time was over before the worker had {while_it}, so nothing can be told; give a larger "
                "--max-minutes"
            )
        return _result(future, while_it)


def _result(future: Future[Any], while_it: str, hint: str = "") -> Any:
    try:
        return future.result()
    except OvssError:
        raise
    except Exception as error:  # of the process, the device or the method: a trial has no second worker
        reason = str(error) if isinstance(error, WorkerGoneError) else f"{type(error).__name__}: {error}"
        raise RunFailedError(f"the worker failed while it {while_it}: {reason}{hint}") from error


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
