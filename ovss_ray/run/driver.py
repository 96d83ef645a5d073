"""The driver: plans or continues a run, and ties the scheduler to the workers. It knows shard ids, never pixels."""

from __future__ import annotations

import json
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from typing import Any

from ovss_ray.errors import OvssError, RunFailedError
from ovss_ray.images.references import ImageRef
from ovss_ray.labels.additions import read_additions
from ovss_ray.labels.classes import encode_classes
from ovss_ray.labels.layout import CLASSES_FILE, RUN_FILE, Manifest
from ovss_ray.run.alone import find_stranger, wait_for_turn, warn_of_store
from ovss_ray.run.breaker import too_many_failures
from ovss_ray.run.crashed import crashed_images, remember_crashed
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.engines import open_engine
from ovss_ray.run.events import (
    Assign,
    Decision,
    Event,
    LimitWorkers,
    LoadWorker,
    MarkCrashed,
    SetGpuAside,
    ShardDone,
    ShardFailed,
    ShardOverdue,
    StartWorker,
    StopRun,
    StopWorker,
    WorkerDied,
    WorkerFailedToStart,
)
from ovss_ray.run.heartbeat import Heartbeat
from ovss_ray.run.interrupts import StopSignal, stop_signals
from ovss_ray.run.job import (
    LabellingJob,
    ResolvedSpec,
    images_of,
    labelling_job,
    resolve,
    run_record,
    take_over,
    with_dtype,
)
from ovss_ray.run.logs import pass_to_root
from ovss_ray.run.manifest import choose_shard_size, remove_stray_parts, write_manifest
from ovss_ray.run.messages import limit_message, what_is_ahead, what_is_asked
from ovss_ray.run.metrics import open_metrics
from ovss_ray.run.pool import Engine, PoolEvent, ShardReported, TextEncoded, WorkerLoaded, WorkerPool
from ovss_ray.run.preflight import check_words, open_images
from ovss_ray.run.progress import Progress, Reporter, SilentReporter
from ovss_ray.run.scheduler import Scheduler
from ovss_ray.run.stragglers import ShardClock
from ovss_ray.run.summary import RunSummary, summarise_run
from ovss_ray.run.text import load_text, save_text
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import Vocabulary, describe_vocabulary

log = logging.getLogger(__name__)

POLL_S = 0.5
FINISH_SHARDS_S = 30.0  # how long shards in flight may still take after the first Ctrl-C


class RunInterrupted(OvssError):  # noqa: N818 (not an error of the run)
    """The run was asked to stop; nothing that was finished is lost."""

    def __init__(self, signum: int, what_is_left: str) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; {what_is_left}")
        self.exit_code = 128 + signum


def run_job(spec: JobSpec, *, reporter: Reporter | None = None, vocabulary: Vocabulary | None = None) -> RunSummary:
    """Label every image of the job that is not labelled yet, and summarise the run.

    Creates the run directory, or continues the one that is there; returns at once if it is complete.

    Args:
        spec: the job.
        reporter: shows the progress; silent by default.
        vocabulary: the classes of the run that is continued; by default they are read as the job says.

    Raises:
        SettingError, WeightsError, InputError: before any work starts.
        RunMismatchError: the run directory belongs to other settings.
        RunFailedError: the run stopped; what is finished is kept, and the same call continues.
        RunInterrupted: SIGINT or SIGTERM arrived.
    """
    try:
        reporter = reporter or SilentReporter()
        vocabulary = check_words(spec, vocabulary)
        reporter.message(what_is_asked(spec))  # before anything that takes its time
        images = open_images(spec, vocabulary)
        reporter.message(describe_vocabulary(vocabulary))
        return _run(spec, reporter, vocabulary, images)
    except KeyboardInterrupt:  # later, while workers run, the signal is noted instead of raised
        raise RunInterrupted(signal.SIGINT, "labelling had not begun") from None


def _run(
    spec: JobSpec, reporter: Reporter, vocabulary: Vocabulary, images: Iterator[ImageRef] | None = None
) -> RunSummary:
    resolved = resolve(spec, vocabulary)
    for warning in resolved.warnings:
        log.warning("%s", warning)
    directory = RunDirectory(resolved.spec.run, spec.storage_options)
    record = directory.read_json(RUN_FILE)
    if record is not None:
        return _continue(resolved, directory, record, reporter)
    images = images_of(resolved.spec) if images is None else images
    # If another process has started the run meanwhile, that one is continued.
    return _start(resolved, images, directory, reporter) or _run(spec, reporter, vocabulary)


def _continue(
    resolved: ResolvedSpec, directory: RunDirectory, record: dict[str, Any], reporter: Reporter
) -> RunSummary:
    additions = read_additions(directory.fs, directory.root, directory.uri)
    resolved, manifest = take_over(resolved, record, additions, run=directory.uri)
    directory.prepare()
    warn_of_store(directory)
    _write_classes(resolved.vocabulary, directory)  # runs of older versions have none
    # Without those that the manifest does not know: of an addition recorded since it was read.
    done = directory.done_shards() & set(range(manifest.shards))
    if len(done) == manifest.shards:
        reporter.message(f"{directory.uri} is complete already")
        summary = _summarise(directory, manifest, None)
        directory.sweep()
        return summary
    with Heartbeat(directory, "loading", fingerprint=record["fingerprint"]) as heart:
        labelled = _label(_Start(resolved, directory, reporter, heart), manifest, record, done)
    assert labelled is not None  # there is a record
    return labelled


def _start(
    resolved: ResolvedSpec, images: Iterator[ImageRef], directory: RunDirectory, reporter: Reporter
) -> RunSummary | None:
    """Plan and label a new run; None if another process has started it meanwhile."""
    shard_size = resolved.spec.shard_size
    if shard_size == "auto":
        shard_size, images = choose_shard_size(images)
    directory.prepare()
    warn_of_store(directory)
    with Heartbeat(directory, "planning") as heart:
        if not directory.conditional_put:
            wait_for_turn(directory, heart, reporter)
        manifest = _plan(shard_size, images, directory, reporter)
        if manifest is None:
            return None
        heart.enter("loading", images=manifest.rows, shards=manifest.shards)
        return _label(_Start(resolved, directory, reporter, heart), manifest, None, set())


@dataclass(frozen=True)
class _Start:
    """What a session begins with."""

    resolved: ResolvedSpec
    directory: RunDirectory
    reporter: Reporter
    heart: Heartbeat


def _label(start: _Start, manifest: Manifest, record: dict[str, Any] | None, done: set[int]) -> RunSummary | None:
    """Label the shards that are not done; creates the record of a new run, or returns None if another process has."""
    resolved, directory, reporter = start.resolved, start.directory, start.reporter
    with reporter.doing("starting Ray" if resolved.spec.engine == "ray" else "loading PyTorch"):
        engine = open_engine(resolved.spec)
    if resolved.spec.log_format == "json":
        pass_to_root("ray")  # which has set up its own logging by now
    try:
        if record is None:
            resolved = with_dtype(resolved, engine.device)
            record = _create_record(resolved, manifest, directory)
        if record is None:
            return None
        start.heart.enter("loading", fingerprint=record["fingerprint"], claims=False)
        if not directory.conditional_put:
            start.heart.watch_over(partial(find_stranger, directory, record["fingerprint"]))
        reporter.message(what_is_ahead(manifest, len(done), engine))
        reporter.message(f"If the run stops, continue it with: {directory.continue_command}")
        job = labelling_job(resolved, manifest, record, directory, device=engine.device)
        session = _Session(job, start, engine, done)
        with stop_signals() as stop:
            session.run(stop)
        summary = _summarise(directory, manifest, session.progress)
        start.heart.finished(session.progress)
        return summary
    except OvssError as error:
        stranger = None
        if record is not None and not directory.conditional_put:
            stranger = find_stranger(directory, record["fingerprint"])
        if stranger is not None:
            raise stranger from error
        if record is not None:
            error.continue_with = directory.continue_command
        raise
    finally:
        engine.close()
        directory.sweep()


def _plan(shard_size: int, images: Iterator[ImageRef], directory: RunDirectory, reporter: Reporter) -> Manifest | None:
    """The manifest of a new run; None if another process has started it meanwhile, so that it is to be continued."""
    stray = directory.done_shards()
    if directory.exists(RUN_FILE):
        return None
    if stray:
        raise RunFailedError(
            f"{directory.uri} holds {len(stray)} shards but no {RUN_FILE}; restore it, or use a new run directory"
        )
    manifest = write_manifest(reporter.counting(images), directory, shard_size)
    shards = f"{manifest.shards} shard{'' if manifest.shards == 1 else 's'} of {manifest.shard_size}"
    log.info("planned %d images in %s", manifest.images, shards)
    return manifest


def _create_record(resolved: ResolvedSpec, manifest: Manifest, directory: RunDirectory) -> dict[str, Any] | None:
    """From here on the run exists; None if another process was faster, whose run is to be continued."""
    record = run_record(resolved, manifest, created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    content = json.dumps(record, indent=1, ensure_ascii=False).encode()
    created = directory.create(RUN_FILE, content)
    if created and (directory.conditional_put or directory.read(RUN_FILE) == content):
        remove_stray_parts(manifest, directory)
        _write_classes(resolved.vocabulary, directory)
        return record
    log.warning("another process has just started a run in %s; it is continued", directory.uri)
    theirs = directory.read_json(RUN_FILE)
    if theirs is not None:
        remove_stray_parts(Manifest.from_json(theirs["manifest"]), directory)
    return None


def _summarise(directory: RunDirectory, manifest: Manifest, session: Progress | None) -> RunSummary:
    try:
        return summarise_run(directory, manifest, session=session)
    except KeyboardInterrupt:
        raise RunInterrupted(signal.SIGINT, "labelling is done, and its shards are kept; the summary is not") from None


def _write_classes(vocabulary: Vocabulary, directory: RunDirectory) -> None:
    """Only once `run.json` is there: of two processes that start a run, both then write the classes of the winner."""
    if not directory.exists(CLASSES_FILE):
        directory.create(CLASSES_FILE, encode_classes(vocabulary))


class _Session:
    """One start of the driver, from the first worker to the last shard."""

    def __init__(self, job: LabellingJob, start: _Start, engine: Engine, done: set[int]) -> None:
        manifest, directory = job.manifest, start.directory
        self._job = job
        self._directory = directory
        self._reporter = start.reporter
        self._heart = start.heart
        self._text = load_text(directory, job.vocabulary)
        self._encoder: str | None = None
        self._loaded: list[str] = []  # workers that wait for the text
        self._clock = ShardClock()
        self._pool = WorkerPool(engine, job)
        ahead = [shard for shard in range(manifest.shards) if shard not in done]
        self._scheduler = Scheduler(
            ahead,
            remaining=len(ahead),
            workers=engine.capacity(),
            crashed=crashed_images(directory),
            max_shard_attempts=job.spec.max_shard_attempts,
        )
        self.progress = Progress(
            images=manifest.rows,
            images_before=sum(manifest.images_in(shard) for shard in done),
            shards=manifest.shards,
            shards_before=len(done),
        )
        self._metrics = open_metrics(job.spec)

    def run(self, stop: StopSignal) -> None:
        with self._reporter.showing(self.progress):
            try:
                self._carry_out(self._scheduler.start())
                while self._scheduler.remaining and not (stop.received and self._give_up(stop)):
                    events = self._pool.poll(POLL_S)
                    # Before the events are taken: a worker without further work is let go, and its times with it.
                    self.progress.observe(self._pool.progress())
                    for event in events:
                        self._take(event)
                    self._reporter.update(self.progress)
                    self._metrics.update(self.progress)
                    self._heart.update(self.progress)
                    self._heart.check()
                    self._look_after()
            finally:
                self._pool.close()
                self.progress.incidents.closed()
                self._metrics.close(self.progress)
        if self._scheduler.remaining:
            done = self.progress.shards - self._scheduler.remaining
            kept = f"{done} of {self.progress.shards} shards are finished and kept"
            raise RunInterrupted(stop.received or signal.SIGINT, kept)

    def _give_up(self, stop: StopSignal) -> bool:
        if not stop.announced:
            stop.announced = True
            self._heart.enter("stopping")
            self._scheduler.drain()
            if self._scheduler.in_flight:
                self._reporter.message(
                    f"Stopping: shards in flight have {FINISH_SHARDS_S:.0f} s to finish; Ctrl-C again drops them."
                )
        overdue = time.monotonic() - stop.since > FINISH_SHARDS_S
        return stop.count > 1 or overdue or not self._scheduler.in_flight

    def _look_after(self) -> None:
        """What no event tells: shards that take long, and failures that add up."""
        for shard in self._clock.overdue(time.monotonic()):
            self._tell(ShardOverdue(shard))
        seen, failures = self.progress.first_attempts()
        reason = too_many_failures(
            failures,
            seen=seen,
            images=self._job.manifest.images,
            max_failed_fraction=self._job.spec.max_failed_fraction,
        )
        if reason is not None:
            raise self._stopped(reason)

    def _take(self, event: PoolEvent) -> None:
        match event:
            case WorkerLoaded():
                self._loaded.append(event.worker)
                self._hand_out_text()
            case TextEncoded():
                self._encoder = None
                self._loaded.append(event.worker)
                self._text = save_text(self._directory, event.text)
                self._hand_out_text()
            case ShardReported():
                report = event.report
                self._clock.finished(event.worker, report.shard, time.monotonic())
                self.progress.shard_done(
                    event.worker,
                    report.statuses,
                    report.failures,
                    labelled=report.created or bool(report.bytes_written),
                    counts=self._scheduler.is_open(report.shard),
                    retried=self._job.manifest.is_retry(report.shard),
                )
                if report.seconds is not None:
                    self._metrics.shard_finished(report.seconds)
                self._tell(ShardDone(event.worker, report.shard))
            case ShardFailed():
                self._clock.finished(event.worker, event.shard, time.monotonic())
                self._tell(event)
            case WorkerFailedToStart() | WorkerDied():
                self._forget(event.worker)
                self._tell(event)
            case _:
                self._tell(event)

    def _forget(self, worker: str) -> None:
        """A worker is no more; if it was encoding the vocabulary, another does."""
        self._clock.gone(worker)
        if worker in self._loaded:
            self._loaded.remove(worker)
        if worker == self._encoder:
            self._encoder = None
            self._hand_out_text()

    def _hand_out_text(self) -> None:
        """Text is encoded once: by the first worker that is ready, while the others wait."""
        if self._text is None:
            if self._encoder is None and self._loaded:
                self._encoder = self._loaded.pop(0)
                self._pool.encode_text(self._encoder)
            return
        while self._loaded:
            self._pool.begin(self._loaded.pop(0), self._text)

    def _tell(self, event: Event) -> None:
        self.progress.incidents.heard(event)
        self._carry_out(self._scheduler.handle(event))

    def _carry_out(self, decisions: list[Decision]) -> None:
        for decision in decisions:
            self.progress.incidents.decided(decision)
            match decision:
                case StartWorker():
                    self._pool.start(decision.worker)
                case LoadWorker():
                    self._pool.load(decision.worker)
                case Assign():
                    if self._job.manifest.is_retry(decision.task.shard):
                        self.progress.retrying(decision.worker)
                    self._clock.assigned(decision.worker, decision.task.shard, time.monotonic())
                    self._pool.assign(decision.worker, decision.task)
                case StopWorker():
                    self._pool.stop(decision.worker)
                    self._forget(decision.worker)
                case MarkCrashed(image):
                    log.warning(
                        "image %d of shard %d ends its worker: %s", image.image_id, image.shard, image.reason,
                        extra={"image_id": image.image_id, "shard": image.shard},
                    )  # fmt: skip
                    remember_crashed(self._directory, image)
                case SetGpuAside():
                    self._reporter.message(f"GPU {decision.gpu} is set aside, workers fail on it: {decision.reason}")
                case LimitWorkers(workers, reason):
                    self._reporter.message(limit_message(workers, reason))
                case StopRun():
                    raise self._stopped(decision.reason)

    def _stopped(self, reason: str) -> RunFailedError:
        done = self.progress.shards - self._scheduler.remaining
        return RunFailedError(
            " ".join(reason.split()),  # a library's words may take several lines
            f"{done} of {self.progress.shards} shards are finished and kept; "
            "continue the run once the cause is removed",
        )
