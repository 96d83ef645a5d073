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
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from ovss_ray.errors import ImageError, RunFailedError, WeightsError
from ovss_ray.images.fetching import Fetcher
from ovss_ray.labels.layout import RUN_FILE, shard_name
from ovss_ray.labels.shard import ImageRow, encode_shard, failed_row, summarise
from ovss_ray.models.sources import resolve_weights
from ovss_ray.run.directory import RunDirectory, is_final
from ovss_ray.run.job import LabellingJob
from ovss_ray.run.manifest import ManifestReader
from ovss_ray.run.prefetch import (
    Image,
    ImageLoader,
    LoadedImage,
    Prefetcher,
    WorkerProgress,
    WorkerStats,
    micro_batches,
)
from ovss_ray.segmenters import Segmentation, TextEmbeddings, load_segmenter
from ovss_ray.version import __version__

log = logging.getLogger(__name__)

WRITE_ATTEMPTS = 5


@dataclass(frozen=True)
class ShardReport:
    """What a worker says about a finished shard.

    Attributes:
        shard: its id.
        created: False if another worker's file was there first; this worker's labels were then dropped.
        statuses: number of images by status.
        bytes_written: size of the file.
    """

    shard: int
    created: bool
    statuses: dict[str, int]
    bytes_written: int


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
        self._device_turn = threading.Lock()
        self._text: TextEmbeddings | None = None

    def load(self) -> None:
        """Load the segmenter and open the run directory; once, before anything else.

        Raises:
            WeightsError: the weights found here are not those that the run was started with.
            RunFailedError: the run directory cannot be reached from here.
        """
        spec = self._job.spec
        # Of an image that is damaged but readable Pillow warns once per tag; what matters becomes a row.
        warnings.filterwarnings("ignore", module="PIL")
        if spec.device == "cpu":
            torch.set_num_threads(self._cpus)
        if resolve_weights(spec.clip).digest != self._job.weights_digest:
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
        fetcher = Fetcher(spec.storage_options, attempts=spec.fetch_attempts, timeout_s=spec.fetch_timeout_s)
        self._loader = ImageLoader(
            fetcher,
            ThreadPoolExecutor(spec.fetch_concurrency, thread_name_prefix="load"),
            decode_threads=self._cpus if spec.decode_threads == "auto" else spec.decode_threads,
            max_pixels=spec.max_pixels,
            stats=self._stats,
        )
        self._encoders = ThreadPoolExecutor(self._cpus, thread_name_prefix="encode")
        self._segmenter = load_segmenter(
            spec.method, clip=spec.clip, device=spec.device, dtype=spec.dtype, **spec.settings
        )

    def encode_text(self) -> TextEmbeddings:
        """Encode the run's vocabulary with this worker's text tower."""
        return self._segmenter.encode_vocabulary(self._job.vocabulary)

    def begin(self, text: TextEmbeddings) -> None:
        """Take the encoded vocabulary; shards may follow."""
        self._text = text

    def progress(self) -> WorkerProgress:
        """Images finished so far by status, and seconds by stage, over the worker's life."""
        return self._stats.snapshot()

    def label_shard(self, shard: int, attempt: int) -> ShardReport:
        """Label one shard and create its file.

        Raises:
            OSError: the run directory cannot be read or written.
        """
        if self._text is None:
            raise RuntimeError("label_shard before begin")
        started = time.time()
        rows = self._label(shard, self._text)
        statuses = Counter(row.status for row in rows)
        data = encode_shard(rows, self._metadata(shard, attempt, started, statuses))
        start = time.perf_counter()
        created = self._write(shard_name(shard), data)
        self._stats.add_seconds("write", time.perf_counter() - start)
        if not created:
            log.info("shard %d was already there; this copy is dropped", shard)
        return ShardReport(shard, created, dict(statuses), len(data))

    def _label(self, shard: int, text: TextEmbeddings) -> list[ImageRow]:
        spec = self._job.spec
        budget = spec.prefetch_mib * 2**20
        images = Prefetcher(
            self._manifest.rows(shard), self._loader, max_in_flight=spec.fetch_concurrency, max_bytes=budget
        )
        pending: list[Future[ImageRow]] = []
        try:
            with self._device_turn:
                good = self._without_failures(iter(images), pending)
                for batch in micro_batches(good, batch_size=spec.batch_size, max_bytes=budget):
                    for image, outcome in zip(batch, self._segment(batch, text), strict=True):
                        pending.append(self._encoders.submit(self._row, image, outcome))
                    # Label maps and scores are larger than the image: let the encoders keep up.
                    start = time.perf_counter()
                    if len(pending) > 4 * spec.batch_size:
                        pending[-4 * spec.batch_size].result()
                    self._stats.add_seconds("wait_for_encode", time.perf_counter() - start)
        finally:
            images.stop()
        return [future.result() for future in pending]

    def _without_failures(
        self, images: Iterator[LoadedImage], pending: list[Future[ImageRow]]
    ) -> Iterator[LoadedImage]:
        while True:
            start = time.perf_counter()
            image = next(images, None)
            self._stats.add_seconds("wait_for_images", time.perf_counter() - start)
            if image is None:
                return
            if image.failure is None:
                yield image
            else:
                pending.append(self._encoders.submit(self._row, image, image.failure))

    def _segment(self, batch: list[LoadedImage], text: TextEmbeddings) -> list[Segmentation | ImageError]:
        start = time.perf_counter()
        outcomes = self._try_segment(batch, text)
        self._stats.add_seconds("segment", time.perf_counter() - start)
        return outcomes

    def _try_segment(self, batch: list[LoadedImage], text: TextEmbeddings) -> list[Segmentation | ImageError]:
        """Segment a micro-batch; one that fails is halved until the failure is pinned to an image."""
        pixels = [image.pixels for image in batch if image.pixels is not None]
        try:
            return list(self._segmenter.segment(pixels, text))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if len(batch) == 1:
                return [self._segment_in_little_memory(pixels[0], text)]
        except (RuntimeError, ValueError, TypeError, ArithmeticError) as error:
            if "CUDA error" in str(error):
                raise  # the device context is lost: only a new process helps
            if len(batch) == 1:
                log.exception("segmenting %s failed", batch[0].row.uri)
                return [ImageError("crashed", f"{type(error).__name__}: {error}")]
        half = len(batch) // 2
        return self._try_segment(batch[:half], text) + self._try_segment(batch[half:], text)

    def _segment_in_little_memory(self, pixels: Image, text: TextEmbeddings) -> Segmentation | ImageError:
        try:
            return self._segmenter.segment([pixels], text, low_memory=True)[0]
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            height, width = pixels.shape[:2]
            return ImageError("out_of_memory", f"{width} x {height} pixels do not fit into the device's memory")

    def _row(self, image: LoadedImage, outcome: Segmentation | ImageError) -> ImageRow:
        start = time.perf_counter()
        if isinstance(outcome, ImageError):
            row = failed_row(image.row.image_id, image.row.uri, outcome, image.row.extra)
        else:
            row = summarise(
                image.row.image_id,
                image.row.uri,
                outcome.labels,
                outcome.confidence,
                outcome.margin,
                ignore_index=self._job.vocabulary.ignore_index,
                codec=self._job.spec.label_map,
                extra=image.row.extra,
            )
        self._stats.count_image(row.status)
        self._stats.add_seconds("encode", time.perf_counter() - start)
        return row

    def _metadata(self, shard: int, attempt: int, started: float, statuses: Counter[str]) -> dict[str, str]:
        return {
            "fingerprint": self._job.fingerprint,
            "shard_id": str(shard),
            "attempt": str(attempt),
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

    def _write(self, name: str, data: bytes) -> bool:
        for attempt in range(WRITE_ATTEMPTS):
            try:
                return self._directory.create(name, data)
            except OSError as error:
                if is_final(error) or attempt == WRITE_ATTEMPTS - 1:
                    raise
                log.warning("writing %s failed (%s); trying again", name, error)
                time.sleep(min(2**attempt, 10))
        raise AssertionError("unreachable")
