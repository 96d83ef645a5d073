"""Fetching and decoding ahead of the segmenter: in manifest order, within bounds of memory and requests in flight."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextvars import copy_context
from copy import copy
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from ovss_ray.errors import ImageError
from ovss_ray.images.decoding import EncodedImage, read_header
from ovss_ray.images.downloads import NoRoomError
from ovss_ray.images.fetching import Fetcher
from ovss_ray.images.reach import USERS_WORD, Reach
from ovss_ray.images.stores import is_local
from ovss_ray.run.budget import SHARE_OF_OTHERS, MemoryBudget
from ovss_ray.run.logs import ContextThreadPool, log_context
from ovss_ray.run.manifest import ManifestRow
from ovss_ray.run.stats import WorkerStats

log = logging.getLogger(__name__)

Image = NDArray[np.uint8]

_T = TypeVar("_T")

# Bytes a pixel of what a segmenter gives: labels in 32 bits while they are made, confidence and margin in 32 bits each;
# afterwards labels in 8 or 16 bits, and what statistics and codecs hold beside them.
RESULT_BYTES = 13

_UNKNOWN_SIZE = 1 << 20  # the least that is taken for a file whose size nothing tells


@dataclass(frozen=True)
class Postponed:
    """A file that turned out larger than expected when there was no room for it: to be asked for again.

    Attributes:
        bytes: memory that fetching it takes, as far as is known now.
    """

    bytes: int


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

    @property
    def pixel_bytes(self) -> int:
        """Bytes of its pixels."""
        return 0 if self.pixels is None else self.pixels.nbytes

    @property
    def result_bytes(self) -> int:
        """Bytes that its segmentation takes."""
        return RESULT_BYTES * self.pixel_bytes // 3


class ImageLoader:
    """Turns manifest rows into pixels; shared by all shards of a worker, and by their threads.

    Args:
        fetcher: reads the bytes.
        executor: runs one fetch per thread; with a `ContextThreadPool` its log lines say of which shard.
        decode_threads: how many images are decoded at the same time, in threads of their own.
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
        self._decoders = ContextThreadPool(decode_threads, thread_name_prefix="decode")
        self._max_pixels = max_pixels
        self._stats = stats
        self._reach_of = reach_of
        self._usual_unknown = _UNKNOWN_SIZE

    def under_limits(self, fetcher: Fetcher, *, max_pixels: int) -> ImageLoader:
        """One for images that may be larger; shares all threads with this one."""
        other = copy(self)
        other._fetcher, other._max_pixels = fetcher, max_pixels
        return other

    def expected_bytes(self, row: ManifestRow) -> int:
        """Memory that fetching a file takes: its size, twice where it comes in pieces over a network."""
        return _fetched_bytes(row, self._usual_unknown if row.size_bytes is None else row.size_bytes)

    def fetch(
        self,
        row: ManifestRow,
        then: Callable[[EncodedImage | Postponed | ImageError], None],
        extend: Callable[[int], bool],
    ) -> None:
        """Read a file and its header in a thread, and pass on what came of it.

        Args:
            extend: asked whether the file may take so much memory when it turns out to be larger than expected.
        """
        self._executor.submit(lambda: then(self._outcome(row, partial(self._read, extend=extend))))

    def decode(self, row: ManifestRow, image: EncodedImage, then: Callable[[Image | ImageError], None]) -> None:
        """Decode an image in a thread, and pass on what came of it."""
        self._decoders.submit(lambda: then(self._outcome(row, lambda _: self._decoded(image))))

    def close(self) -> None:
        """Start nothing more; what is under way ends by itself."""
        self._executor.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def _read(self, row: ManifestRow, extend: Callable[[int], bool]) -> EncodedImage | Postponed:
        try:
            with self._stats.stage("fetch"):
                data = self._fetcher.fetch(
                    row.uri,
                    row.size_bytes,
                    row.offset,
                    etag=row.etag,
                    header_bytes=row.header_bytes,
                    reach=self._reach_of(row.image_id),
                    room=lambda size_bytes: extend(_fetched_bytes(row, size_bytes)),
                )
        except NoRoomError as error:
            self._saw_unknown(error.size_bytes)
            return Postponed(_fetched_bytes(row, error.size_bytes))
        if row.size_bytes is None:
            self._saw_unknown(len(data))
        with self._stats.stage("decode", watched=True):
            return read_header(data, max_pixels=self._max_pixels)

    def _saw_unknown(self, size_bytes: int) -> None:
        """The largest of late: a file that is larger than expected costs a request if there is no room for it."""
        self._usual_unknown = max(size_bytes, self._usual_unknown * 7 // 8, _UNKNOWN_SIZE)

    def _decoded(self, image: EncodedImage) -> Image:
        with self._stats.stage("decode", watched=True):
            return image.decode()

    def _outcome(self, row: ManifestRow, work: Callable[[ManifestRow], _T]) -> _T | ImageError:
        with log_context(image_id=row.image_id, uri=row.uri):
            try:
                return work(row)
            except ImageError as failure:
                return failure
            except Exception as error:  # one image must not stop the others, whatever is wrong with it
                log.exception("reading %s failed", row.uri)
                status = "out_of_memory" if isinstance(error, MemoryError) else "crashed"
                return ImageError(status, f"{type(error).__name__}: {error}")


def _fetched_bytes(row: ManifestRow, size_bytes: int) -> int:
    """Over a network a file comes in pieces that are put together."""
    return size_bytes if is_local(row.uri) else 2 * size_bytes


class Prefetcher:
    """Yields the images of one shard in order while later ones are on their way.

    Args:
        rows: the shard.
        loader: fetches and decodes.
        budget: what all images of the worker may take, in all their forms.
        max_in_flight: images being loaded at the same time.
    """

    def __init__(
        self, rows: Sequence[ManifestRow], loader: ImageLoader, budget: MemoryBudget, *, max_in_flight: int
    ) -> None:
        self._rows = rows
        self._loader = loader
        self._budget = budget
        self._account = budget.open()
        self._max_in_flight = max_in_flight
        self._ready: dict[int, LoadedImage] = {}
        self._granted: dict[int, int] = {}  # bytes of files that are being fetched
        self._asked = 0
        self._in_flight = 0
        self._stopped = False
        self._context = copy_context()  # images are also asked for by threads that have finished one
        self._fill()

    def __iter__(self) -> Iterator[LoadedImage | None]:
        """The images in their order; None where the next one cannot be loaded before those taken are given back.

        Whoever takes an image gives it back by `admit`, `segmented` and `encoded`.
        """
        for index in range(len(self._rows)):
            while not self._account.need(index, partial(self._ready.__contains__, index)):
                yield None
            yield self._take(index)

    def admit(self, batch: Sequence[LoadedImage]) -> int:
        """How many of the first images of a micro-batch may be segmented together now, at least 1; may wait."""
        return self._account.take_results([image.result_bytes for image in batch])

    def segmented(self, image: LoadedImage) -> None:
        """The pixels of an image are not needed any more, its results wait to be encoded."""
        results = image.result_bytes
        self._account.change(taken=-image.pixel_bytes - results, encoding=results)

    def encoded(self, result_bytes: int) -> None:
        """The results of an image are not needed any more."""
        self._account.change(encoding=-result_bytes)

    def stop(self) -> None:
        """Start nothing more; images that were taken and not segmented are given back."""
        with self._budget.changed:
            self._stopped = True
            ready = sum(image.pixel_bytes for image in self._ready.values())
            self._ready.clear()
            self._account.close(ready)

    def _take(self, index: int) -> LoadedImage:
        with self._budget.changed:
            image = self._ready.pop(index)
            self._account.change(ahead=-image.pixel_bytes, taken=image.pixel_bytes)
            return image

    def _fill(self) -> None:
        with self._budget.changed:
            while self._asked < len(self._rows) and self._in_flight < self._max_in_flight and not self._stopped:
                index, size = self._asked, self._loader.expected_bytes(self._rows[self._asked])
                self._asked += 1
                self._in_flight += 1
                self._account.ask(index, size, partial(self._start_fetch, index, size))

    def _start_fetch(self, index: int, size_bytes: int) -> None:
        self._granted[index] = size_bytes
        self._context.run(
            self._loader.fetch, self._rows[index], partial(self._on_fetched, index), partial(self._extend, index)
        )

    def _extend(self, index: int, size_bytes: int) -> bool:
        with self._budget.changed:
            more = size_bytes - self._granted[index]
            if more > 0 and (self._stopped or not self._account.extend(index, more)):
                return False
            self._granted[index] += max(more, 0)
            return True

    def _on_fetched(self, index: int, found: EncodedImage | Postponed | ImageError) -> None:
        with self._budget.changed:
            granted = self._granted.pop(index)
            if isinstance(found, ImageError) or self._stopped:
                failure = found if isinstance(found, ImageError) else None
                self._finish(index, granted, LoadedImage(self._rows[index], None, failure))
            elif isinstance(found, Postponed):
                # Twice as much at least, so that no server can have this happen many times.
                size = max(found.bytes, 2 * granted)
                self._account.ask(index, size, partial(self._start_fetch, index, size))
                self._account.change(ahead=-granted)
            else:
                self._account.change(ahead=found.file_bytes - granted)
                start = partial(self._start_decode, index, found)
                self._account.ask(index, found.decode_bytes, start, held_bytes=found.file_bytes)

    def _start_decode(self, index: int, image: EncodedImage) -> None:
        size = image.file_bytes + image.decode_bytes
        self._context.run(self._loader.decode, self._rows[index], image, partial(self._on_decoded, index, size))

    def _on_decoded(self, index: int, size_bytes: int, found: Image | ImageError) -> None:
        row = self._rows[index]
        loaded = LoadedImage(row, None, found) if isinstance(found, ImageError) else LoadedImage(row, found, None)
        self._finish(index, size_bytes, loaded)

    def _finish(self, index: int, size_bytes: int, loaded: LoadedImage) -> None:
        with self._budget.changed:
            self._in_flight -= 1
            if self._stopped:
                self._account.change(ahead=-size_bytes)
                return
            self._ready[index] = loaded
            self._account.change(ahead=loaded.pixel_bytes - size_bytes)
            self._fill()


def micro_batches(
    images: Iterable[LoadedImage | None], *, limit: Callable[[Iterable[tuple[int, ...]]], int], max_bytes: float
) -> Iterator[list[LoadedImage]]:
    """Group decoded images of equal shape into micro-batches.

    Images whose shape stays rare wait until the end, or until `max_bytes` are held, or until a None says that there is
    no room for another image; leftovers go out in mixed batches. No image is held on to once its batch is out.

    Args:
        limit: how many images of these shapes may go together; asked anew for each micro-batch.
    """
    buckets: dict[tuple[int, ...], list[LoadedImage]] = defaultdict(list)
    held = 0
    for image in images:
        if image is not None:
            buckets[image.shape].append(image)
            held += image.pixel_bytes
        if image is not None and len(buckets[image.shape]) >= limit([image.shape]):
            shape = image.shape
        elif buckets and (image is None or held > max_bytes):
            shape = max(buckets, key=lambda shape: sum(other.pixel_bytes for other in buckets[shape]))
        else:
            continue
        image = None
        held -= sum(other.pixel_bytes for other in buckets[shape])
        yield buckets.pop(shape)
    rest = [image for bucket in buckets.values() for image in bucket]
    buckets.clear()
    while rest:
        size = limit({image.shape for image in rest})
        batch, rest = rest[:size], rest[size:]
        yield batch


def rare_shapes_bytes(budget: MemoryBudget) -> float:
    """How much of a budget images of rare shapes may take while they wait for others."""
    return budget.limit_bytes * SHARE_OF_OTHERS
