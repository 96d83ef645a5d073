"""The worker: labels one shard after another, with fetching, computing and writing of different shards overlapped.

It knows nothing of Ray; the same object runs inside an actor or inside the driver's own process.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from functools import partial

import numpy as np
import torch

from ovss_ray.errors import ImageError, MeaninglessLabelsWarning, RunFailedError, WeightsError
from ovss_ray.images.fetching import Fetcher
from ovss_ray.labels.layout import RUN_FILE, shard_name
from ovss_ray.labels.shard import ImageRow, encode_shard, failed_row, read_shard_metadata, summarise
from ovss_ray.models.sources import resolve_weights
from ovss_ray.run.alone import find_stranger
from ovss_ray.run.budget import MemoryBudget
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.events import ShardTask
from ovss_ray.run.isolation import groups_of
from ovss_ray.run.job import LabellingJob
from ovss_ray.run.logs import ContextThreadPool, LogSettings, configure_logging, log_context
from ovss_ray.run.manifest import ManifestReader, ManifestRow
from ovss_ray.run.memory import BatchLimits, Shape, is_device_lost, is_out_of_memory
from ovss_ray.run.prefetch import Image, ImageLoader, LoadedImage, Prefetcher, micro_batches, rare_shapes_bytes
from ovss_ray.run.reports import DeviceLostError, ShardReport
from ovss_ray.run.stats import Failures, WorkerProgress, WorkerStats, count_failure
from ovss_ray.segmenters import Segmentation, TextEmbeddings, get_method, load_segmenter
from ovss_ray.version import __version__

log = logging.getLogger(__name__)

WARM_UP_SHAPE = (64, 64, 3)
WARM_UP_ROW = ManifestRow(-1, "a made-up image")


class Worker:
    """Loads the segmenter once, then labels shards; `label_shard` may be called from several threads.

    Of two shards given to it at the same time, one is on the device while the other is fetched and decoded, or encoded
    and written.

    Args:
        job: what to do, as resolved by the driver.
        cpus: CPU cores that the worker may use.
    """

    def __init__(self, job: LabellingJob, *, cpus: int) -> None:
        self._job = job
        self._cpus = max(cpus, 1)
        self._stats = WorkerStats()
        self._limits = BatchLimits(job.spec.batch_size)
        self._budget = MemoryBudget(job.spec.prefetch_mib * 2**20)
        self._device_turn = threading.Lock()
        self._loaders_lock = threading.Lock()
        self._text: TextEmbeddings | None = None
        self._texts_before: int | None = None  # while the vocabulary is encoded
        self._is_abandoned = False
        self._careful: Iterator[tuple[int, ...] | ShardReport] = iter(())
        self._careful_task = ShardTask(-1, attempt=0)

    def load(self, logs: LogSettings | None = None) -> None:
        """Load the segmenter and open the run directory; once, before anything else.

        Args:
            logs: how to log, for a process that is this worker's own.

        Raises:
            WeightsError: the weights found here are not those that the run was started with.
            RunFailedError: the run directory cannot be reached from here.
        """
        spec = self._job.spec
        if logs is not None:
            configure_logging(logs)
        # Of an image that is damaged but readable Pillow warns once per tag; what matters becomes a row.
        warnings.filterwarnings("ignore", module="PIL")
        if spec.device == "cpu":
            torch.set_num_threads(self._cpus)
        if resolve_weights(spec.clip, get_method(spec.method).Tower).digest != self._job.weights_digest:
            raise WeightsError(
                f"the weights of {spec.clip} on {socket.gethostname()} are not those that the run was started with; "
                "put the same file on every node"
            )
        self._directory = RunDirectory(spec.run, spec.storage_options, conditional_put=self._job.conditional_put)
        if not self._directory.exists(RUN_FILE):
            raise RunFailedError(
                f"{spec.run} cannot be seen from {socket.gethostname()}; "
                "put the run directory in object storage or on a shared file system"
            )
        self._manifest = ManifestReader(self._job.manifest, self._directory)
        loader = ImageLoader(
            self._open_fetcher(spec.max_bytes),
            ContextThreadPool(spec.fetch_concurrency, thread_name_prefix="load"),
            decode_threads=self._cpus if spec.decode_threads == "auto" else spec.decode_threads,
            max_pixels=spec.max_pixels,
            stats=self._stats,
            reach_of=self._job.reach_of,
        )
        self._loaders = {spec.limits: loader}
        self._encoders = ContextThreadPool(self._cpus, thread_name_prefix="encode")
        self._segmenter = load_segmenter(
            spec.method,
            clip=spec.clip,
            device=spec.device,
            dtype=spec.dtype,
            trust_weights=spec.trust_weights,
            **spec.settings,
        )

    def encode_text(self) -> TextEmbeddings:
        """Encode the run's vocabulary with this worker's text tower; `progress` tells how far it is."""
        self._texts_before = self._segmenter.texts_encoded
        try:
            with warnings.catch_warnings():
                # The driver has said it, once for all workers.
                warnings.simplefilter("ignore", MeaninglessLabelsWarning)
                return self._segmenter.encode_vocabulary(self._job.vocabulary)
        finally:
            self._texts_before = None

    def begin(self, text: TextEmbeddings, batch_limits: Mapping[Shape, int]) -> None:
        """Take the encoded vocabulary, and the micro-batch sizes that others found to fit; shards may follow.

        One made-up image goes through first: a device that is broken shows here, and not as the fault of a shard.
        """
        self._try([LoadedImage(WARM_UP_ROW, np.zeros(WARM_UP_SHAPE, np.uint8), None)], text)
        self._text = text
        self._limits = BatchLimits(self._job.spec.batch_size, batch_limits)

    def progress(self) -> WorkerProgress:
        """Images finished so far by status, and seconds by stage, over the worker's life."""
        return self._stats.snapshot(self._limits.reduced(), self._texts())

    def _texts(self) -> tuple[int, int]:
        before = self._texts_before
        if before is None:
            return 0, 0
        vocabulary = self._job.vocabulary
        total = len(vocabulary.queries) * len(vocabulary.templates)  # some methods encode a few more
        return min(self._segmenter.texts_encoded - before, total), total

    def abandon(self) -> None:
        """Give up the shards under way at their next micro-batch; for a worker whose process lives on."""
        self._is_abandoned = True

    def _go_on(self) -> None:
        if self._is_abandoned:
            raise RuntimeError("the shard was given up: nobody waits for it")

    def label_shard(self, task: ShardTask) -> ShardReport:
        """Label one shard and create its file.

        Raises:
            OSError: the run directory cannot be read or written.
            DeviceLostError: this process cannot go on.
        """
        with log_context(shard=task.shard, attempt=task.attempt):
            report = self._already_there(task)
            if report is not None:
                return report
            started = time.time()
            rows = self._manifest.rows(task.shard)
            crashed = self._crashed_rows(task, rows)
            known = {row.image_id for row in crashed}
            labelled = self._label(task.shard, [row for row in rows if row.image_id not in known])
            return self._finish(task, started, crashed + labelled)

    def open_carefully(self, task: ShardTask) -> tuple[int, ...] | ShardReport:
        """Begin to label one shard group by group; returns the ids of the first group, which is not touched yet."""
        self._careful_task, self._careful = task, self._label_carefully(task)
        return self.label_next()

    def label_next(self) -> tuple[int, ...] | ShardReport:
        """Label the group that was named last; returns the next one (empty before the file is written), or the report.

        Raises:
            OSError, DeviceLostError: as `label_shard`.
        """
        with log_context(shard=self._careful_task.shard, attempt=self._careful_task.attempt):
            return next(self._careful)

    def _label_carefully(self, task: ShardTask) -> Iterator[tuple[int, ...] | ShardReport]:
        report = self._already_there(task)
        if report is not None:
            yield report
            return
        started = time.time()
        rows = {row.image_id: row for row in self._manifest.rows(task.shard)}
        done = self._crashed_rows(task, list(rows.values()))
        for group in groups_of(task, rows, self._job.spec.batch_size):
            yield group
            done += self._label(task.shard, [rows[image_id] for image_id in group])
        yield ()
        yield self._finish(task, started, done)

    def _already_there(self, task: ShardTask) -> ShardReport | None:
        """The report of a shard that another worker has finished: one of a second driver, or of a copy."""
        name = shard_name(task.shard)
        if not self._directory.exists(name):
            return None
        with self._directory.fs.open(self._directory.path(name), "rb") as file:
            footer = read_shard_metadata(file)
        if footer["fingerprint"] != self._job.fingerprint:
            raise RunFailedError(
                f"{self._directory.uri}/{name} was labelled under other settings, by another driver; "
                f"remove such shards: ovss-ray verify {self._directory.uri} --fast --remove-damaged"
            )
        statuses = json.loads(footer["statuses"])
        log.info("shard %d is there already", task.shard)
        return ShardReport(task.shard, False, statuses, progress=self.progress())

    def _crashed_rows(self, task: ShardTask, rows: list[ManifestRow]) -> list[ImageRow]:
        crashed = {image.image_id: ImageError(image.status, image.reason) for image in task.crashed}
        return [self._row(row, crashed[row.image_id]) for row in rows if row.image_id in crashed]

    def _finish(self, task: ShardTask, started: float, rows: list[ImageRow]) -> ShardReport:
        self._go_on()
        statuses = Counter(row.status for row in rows)
        failures: Failures = Counter()
        for row in rows:
            if row.error is not None:
                count_failure(failures, row.status, row.error)
        data = encode_shard(rows, self._metadata(task, started, statuses))
        stranger = None
        if not self._job.conditional_put:
            stranger = find_stranger(self._directory, self._job.fingerprint)
        if stranger is not None:
            raise RunFailedError(str(stranger))  # which stops the run at once
        with self._stats.stage("write"):
            created = self._directory.create(shard_name(task.shard), data)
        seconds = time.time() - started
        if created:
            log.info("finished: %d images, %d without labels, %.1f s", len(rows), len(rows) - statuses["ok"], seconds)
        else:
            log.info("shard %d was already there; this copy is dropped", task.shard)
            self._already_there(task)  # it may not be one of this run
        return ShardReport(task.shard, created, dict(statuses), dict(failures), len(data), seconds, self.progress())

    def _label(self, shard: int, rows: list[ManifestRow]) -> list[ImageRow]:
        if self._text is None:
            raise RuntimeError("shards are labelled only after begin")
        images = Prefetcher(rows, self._loader_of(shard), self._budget, max_in_flight=self._job.spec.fetch_concurrency)
        pending: list[Future[ImageRow]] = []
        try:
            with self._device_turn:
                good = self._without_failures(images, pending)
                held = rare_shapes_bytes(self._budget)
                for batch in micro_batches(good, limit=self._limits.limit, max_bytes=held):
                    while batch:
                        self._go_on()
                        count = images.admit(batch)
                        self._label_batch(batch[:count], self._text, images, pending)
                        del batch[:count]
        finally:
            images.stop()
        return [future.result() for future in pending]

    def _loader_of(self, shard: int) -> ImageLoader:
        limits = self._job.limits_of(shard)
        with self._loaders_lock:
            if limits not in self._loaders:
                assert limits.max_pixels is not None
                assert limits.max_bytes is not None
                own = self._loaders[self._job.spec.limits]
                self._loaders[limits] = own.under_limits(
                    self._open_fetcher(limits.max_bytes), max_pixels=limits.max_pixels
                )
            return self._loaders[limits]

    def _open_fetcher(self, max_bytes: int) -> Fetcher:
        spec = self._job.spec
        return Fetcher(
            spec.storage_options,
            attempts=spec.fetch_attempts,
            timeout_s=spec.fetch_timeout_s,
            connections=spec.fetch_concurrency,
            max_bytes=max_bytes,
            on_retry=self._count_retry,
        )

    def _without_failures(self, images: Prefetcher, pending: list[Future[ImageRow]]) -> Iterator[LoadedImage | None]:
        loaded = enumerate(images)
        while True:
            with self._stats.stage("wait_for_images"):
                number, image = next(loaded, (-1, None))
            if number < 0:
                return
            if image is None or image.failure is None:
                yield image
                image = None  # not to be held while the next one is awaited
            else:
                pending.append(self._encoders.submit(self._row, image.row, image.failure))

    def _label_batch(
        self, batch: list[LoadedImage], text: TextEmbeddings, images: Prefetcher, pending: list[Future[ImageRow]]
    ) -> None:
        with self._stats.stage("segment", watched=True):
            outcomes = self._segment(batch, text)
        for image, outcome in zip(batch, outcomes, strict=True):
            images.segmented(image)
            encoded = partial(images.encoded, image.result_bytes)
            pending.append(self._encoders.submit(self._row, image.row, outcome, encoded))
        del outcomes, outcome, batch
        # The budget bounds what waits in bytes; this bounds how far results fall behind.
        with self._stats.stage("wait_for_encode"):
            most = 4 * self._job.spec.batch_size
            if len(pending) > most:
                pending[-most].result()

    def _segment(self, batch: list[LoadedImage], text: TextEmbeddings) -> list[Segmentation | ImageError]:
        """Segment a micro-batch; one that fails is halved until the failure is pinned to an image."""
        shapes = [image.shape for image in batch]
        half = min(self._limits.limit(shapes), len(batch))
        if half == len(batch):
            outcome = self._try(batch, text)
            if not isinstance(outcome, ImageError):
                self._limits.fitted(shapes, len(batch))
                return outcome
            if outcome.status == "out_of_memory":
                self._limits.did_not_fit(shapes, len(batch))
            if len(batch) == 1:
                return [outcome if outcome.status == "crashed" else self._segment_in_little_memory(batch[0], text)]
            half = len(batch) // 2
        return self._segment(batch[:half], text) + self._segment(batch[half:], text)

    def _try(
        self, batch: list[LoadedImage], text: TextEmbeddings, *, low_memory: bool = False
    ) -> list[Segmentation | ImageError] | ImageError:
        """The outcomes of the images, or the failure of all of them together."""
        pixels: list[Image] = [image.pixels for image in batch if image.pixels is not None]
        try:
            return list(self._segmenter.segment(pixels, text, low_memory=low_memory))
        except Exception as error:  # a method may raise anything; here it is decided what becomes of the images
            if is_device_lost(error):
                raise DeviceLostError(f"{type(error).__name__}: {error}") from error
            status = "out_of_memory" if is_out_of_memory(error) else "crashed"
            if status == "crashed" and len(batch) == 1:
                row = batch[0].row
                log.exception("segmenting %s failed", row.uri, extra={"image_id": row.image_id, "uri": row.uri})
            failure = ImageError(status, f"{type(error).__name__}: {error}")
        # Not before the exception is gone: its frames hold the tensors.
        if failure.status == "out_of_memory" and torch.cuda.is_available():
            torch.cuda.empty_cache()
        return failure

    def _segment_in_little_memory(self, image: LoadedImage, text: TextEmbeddings) -> Segmentation | ImageError:
        outcome = self._try([image], text, low_memory=True)
        if not isinstance(outcome, ImageError):
            return outcome[0]
        height, width = image.shape
        return (
            ImageError("out_of_memory", f"{width} x {height} pixels do not fit into the memory")
            if outcome.status == "out_of_memory"
            else outcome
        )

    def _row(
        self, image: ManifestRow, outcome: Segmentation | ImageError, done: Callable[[], None] = lambda: None
    ) -> ImageRow:
        try:
            with log_context(image_id=image.image_id, uri=image.uri), self._stats.stage("encode"):
                row = self._encoded(image, outcome)
                if row.error is not None:
                    log.debug("no labels for %s: %s, %s", row.uri, row.status, row.error)
        finally:
            done()
        self._stats.count_image(row.status, row.error)
        return row

    def _encoded(self, image: ManifestRow, outcome: Segmentation | ImageError) -> ImageRow:
        if isinstance(outcome, ImageError):
            return failed_row(image.image_id, image.uri, outcome, image.extra)
        try:
            return summarise(
                image.image_id,
                image.uri,
                outcome.labels,
                outcome.confidence,
                outcome.margin,
                ignore_index=self._job.vocabulary.ignore_index,
                codec=self._job.spec.label_map,
                keep_confidence=self._job.spec.confidence_map != "none",
                smallest_component=self._job.spec.components,
                extra=image.extra,
            )
        except ValueError as error:  # what the method returned is no label map
            return failed_row(image.image_id, image.uri, ImageError("crashed", f"ValueError: {error}"), image.extra)

    def _count_retry(self, kind: str) -> None:
        self._stats.count_retry(kind)
        log.debug("asking once more after a failure: %s", kind)

    def _metadata(self, task: ShardTask, started: float, statuses: Counter[str]) -> dict[str, str]:
        return {
            "fingerprint": self._job.fingerprint,
            "shard_id": str(task.shard),
            "attempt": str(task.attempt),
            "vocabulary": self._job.vocabulary.to_json(),
            "label_map": self._job.spec.label_map,
            "package_version": __version__,
            "host": socket.gethostname(),
            "pid": str(os.getpid()),
            "device": str(self._segmenter.device),
            "started_at": f"{started:.3f}",
            "finished_at": f"{time.time():.3f}",
            "statuses": json.dumps(statuses, sort_keys=True),
        }
