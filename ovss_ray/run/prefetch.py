"""Fetching and decoding ahead of the segmenter: in manifest order, within bounds of memory and requests in flight."""

from __future__ import annotations

import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from contextvars import copy_context
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ovss_ray.errors import ImageError
from ovss_ray.images.decoding import decode_image
from ovss_ray.images.fetching import Fetcher
from ovss_ray.images.reach import USERS_WORD, Reach
from ovss_ray.run.logs import log_context
from ovss_ray.run.manifest import ManifestRow
from ovss_ray.run.stats import WorkerStats

log = logging.getLogger(__name__)

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class LoadedImage:
    """One image of the shard, decoded, or the reason why it cannot be."""

    row: ManifestRow
    pixels: Image | None
    failure: ImageError | None

    @property
    def shape(self) -> tuple[int, ...]:
        """(height, width); empty for an image without pixels."""
        return () if self.pixels is None else self.pixels.shape[:2]


class ImageLoader:
    """Turns manifest rows into pixels; shared by all shards of a worker, and by their threads.

    Args:
        fetcher: reads the bytes.
        executor: runs one fetch and decode per thread; with a `ContextThreadPool` its log lines say of which shard.
        decode_threads: how many of those threads may decode at the same time.
        max_pixels: larger images fail with `too_large`.
        stats: where the time goes (`fetch`, `decode`).
        reach_of: what the address of an image, by its id, may lead to.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        executor: Executor,
        *,
        decode_threads: int,
        max_pixels: int,
        stats: WorkerStats,
        reach_of: Callable[[int], Reach] = lambda _: USERS_WORD,
    ) -> None:
        self._fetcher = fetcher
        self._executor = executor
        self._decode_slots = threading.BoundedSemaphore(decode_threads)
        self._max_pixels = max_pixels
        self._stats = stats
        self._reach_of = reach_of

    def submit(self, row: ManifestRow) -> Future[LoadedImage]:
        """Begin to load one image."""
        return self._executor.submit(self._load, row)

    def _load(self, row: ManifestRow) -> LoadedImage:
        with log_context(image_id=row.image_id, uri=row.uri):
            return self._fetch_and_decode(row)

    def _fetch_and_decode(self, row: ManifestRow) -> LoadedImage:
        try:
            with self._stats.stage("fetch"):
                data = self._fetcher.fetch(
                    row.uri,
                    row.size_bytes,
                    row.offset,
                    etag=row.etag,
                    header_bytes=row.header_bytes,
                    reach=self._reach_of(row.image_id),
                )
            # A thread that waits here fetches nothing meanwhile: a slow decoder holds the fetching back.
            with self._decode_slots, self._stats.stage("decode", watched=True):
                pixels = decode_image(data, max_pixels=self._max_pixels)
        except ImageError as failure:
            return LoadedImage(row, None, failure)
        except Exception as error:  # one image must not stop the others, whatever is wrong with it
            log.exception("reading %s failed", row.uri)
            status = "out_of_memory" if isinstance(error, MemoryError) else "crashed"
            return LoadedImage(row, None, ImageError(status, f"{type(error).__name__}: {error}"))
        return LoadedImage(row, pixels, None)


class Prefetcher:
    """Yields the images of one shard in order while later ones are on their way.

    Args:
        rows: the shard.
        loader: fetches and decodes.
        max_in_flight: images being loaded at the same time.
        max_bytes: decoded bytes held ahead; one image is always allowed, however large.
    """

    def __init__(self, rows: list[ManifestRow], loader: ImageLoader, *, max_in_flight: int, max_bytes: int) -> None:
        self._rows = rows
        self._loader = loader
        self._max_in_flight = max_in_flight
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._futures: list[Future[LoadedImage]] = []
        self._in_flight = 0
        self._held_bytes = 0
        self._loaded_bytes = 0
        self._loaded = 0
        self._stopped = False
        self._context = copy_context()  # images are also asked for by threads that have finished one
        self._fill()

    def __iter__(self) -> Iterator[LoadedImage]:
        for index in range(len(self._rows)):
            self._fill(must_have=index)
            loaded = self._futures[index].result()
            self._futures[index] = Future()  # drop the reference to the pixels
            with self._lock:
                self._held_bytes -= _size(loaded)
            self._fill()
            yield loaded

    def stop(self) -> None:
        """Start nothing more."""
        with self._lock:
            self._stopped = True

    def _fill(self, must_have: int = -1) -> None:
        while True:
            with self._lock:
                index = len(self._futures)
                if index == len(self._rows) or self._stopped or not (index <= must_have or self._has_room()):
                    return
                self._in_flight += 1
                future = self._context.run(self._loader.submit, self._rows[index])
                self._futures.append(future)
            future.add_done_callback(self._on_loaded)

    def _has_room(self) -> bool:
        if self._in_flight >= self._max_in_flight:
            return False
        expected = self._loaded_bytes / self._loaded if self._loaded else 0
        return self._held_bytes + (self._in_flight + 1) * expected <= self._max_bytes

    def _on_loaded(self, future: Future[LoadedImage]) -> None:
        size = _size(future.result()) if not future.cancelled() and future.exception() is None else 0
        with self._lock:
            self._in_flight -= 1
            self._held_bytes += size
            self._loaded_bytes += size
            self._loaded += 1
        self._fill()


def _size(loaded: LoadedImage) -> int:
    return 0 if loaded.pixels is None else loaded.pixels.nbytes


def micro_batches(
    images: Iterator[LoadedImage], *, limit: Callable[[Iterable[tuple[int, ...]]], int], max_bytes: int
) -> Iterator[list[LoadedImage]]:
    """Group decoded images of equal shape into micro-batches.

    Images whose shape stays rare wait until the end, or until `max_bytes` are held; leftovers go out in mixed batches.

    Args:
        limit: how many images of these shapes may go together; asked anew for each micro-batch.
    """
    buckets: dict[tuple[int, ...], list[LoadedImage]] = defaultdict(list)
    held = 0
    for image in images:
        bucket = buckets[image.shape]
        bucket.append(image)
        held += _size(image)
        full = len(bucket) >= limit([image.shape])
        if not full and held <= max_bytes:
            continue
        if not full:
            bucket = max(buckets.values(), key=lambda candidate: sum(map(_size, candidate)))
        del buckets[bucket[0].shape]
        held -= sum(map(_size, bucket))
        yield bucket
    rest = [image for bucket in buckets.values() for image in bucket]
    while rest:
        size = limit({image.shape for image in rest})
        yield rest[:size]
        rest = rest[size:]
