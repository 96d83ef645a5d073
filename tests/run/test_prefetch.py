"""Loading ahead: order, bounds, failures and micro-batches; shards that share one budget."""

from __future__ import annotations

import io
import threading
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovss_ray.images.decoding import read_header
from ovss_ray.images.fetching import Fetcher
from ovss_ray.run import prefetch
from ovss_ray.run.budget import MemoryBudget
from ovss_ray.run.manifest import ManifestRow
from ovss_ray.run.prefetch import RESULT_BYTES, ImageLoader, LoadedImage, Prefetcher, WorkerStats, micro_batches


@pytest.fixture
def rows(photos: Path) -> list[ManifestRow]:
    return [ManifestRow(number, str(path), None) for number, path in enumerate(sorted(photos.rglob("*.jpg")))]


@pytest.fixture
def stats() -> WorkerStats:
    return WorkerStats()


@pytest.fixture
def loader(stats: WorkerStats) -> Iterator[ImageLoader]:
    with ThreadPoolExecutor(8) as pool:
        yield ImageLoader(Fetcher(), pool, decode_threads=2, max_pixels=10**8, stats=stats)


def all_of(images: Prefetcher) -> list[LoadedImage]:
    """Every image, each given back before the next one is taken."""
    found = []
    for image in images:
        assert image is not None  # nothing is held
        images.admit([image])
        images.segmented(image)
        images.encoded(image.result_bytes)
        found.append(image)
    return found


@pytest.mark.parametrize(("max_in_flight", "max_bytes"), [(1, 1), (8, 1), (8, 10**9), (3, 100_000)])
def test_images_come_in_manifest_order_with_their_own_pixels(
    rows: list[ManifestRow], loader: ImageLoader, max_in_flight: int, max_bytes: int
) -> None:
    loaded = all_of(Prefetcher(rows, loader, MemoryBudget(max_bytes), max_in_flight=max_in_flight))
    assert [image.row for image in loaded] == rows
    for image in loaded[::7]:
        assert image.pixels is not None
        np.testing.assert_array_equal(image.pixels, np.asarray(Image.open(image.row.uri)))


def test_failures_keep_their_place(rows: list[ManifestRow], loader: ImageLoader, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("not a picture")
    mixed = [
        rows[0],
        ManifestRow(1, str(tmp_path / "gone.jpg"), None),
        rows[2],
        ManifestRow(3, str(tmp_path / "text.jpg"), 13),
    ]
    loaded = all_of(Prefetcher(mixed, loader, MemoryBudget(10**9), max_in_flight=4))
    assert [image.failure.status if image.failure else "ok" for image in loaded] == [
        "ok",
        "not_found",
        "ok",
        "unsupported",
    ]


class Gauge(Fetcher):
    """A fetcher that notes how many requests are in flight, and how many images were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self.now = self.most = self.asked = 0

    def fetch(self, *planned: Any, **more: Any) -> bytes:
        with self._lock:
            self.now += 1
            self.asked += 1
            self.most = max(self.most, self.now)
        try:
            return super().fetch(*planned, **more)
        finally:
            with self._lock:
                self.now -= 1


def test_requests_are_bounded(rows: list[ManifestRow], stats: WorkerStats) -> None:
    gauge = Gauge()
    with ThreadPoolExecutor(8) as pool:
        loader = ImageLoader(gauge, pool, decode_threads=2, max_pixels=10**8, stats=stats)
        all_of(Prefetcher(rows, loader, MemoryBudget(10**9), max_in_flight=3))
    assert gauge.most <= 3
    assert gauge.asked == len(rows)


def test_stopping_asks_for_nothing_more(rows: list[ManifestRow], stats: WorkerStats) -> None:
    gauge = Gauge()
    budget = MemoryBudget(1)
    with ThreadPoolExecutor(8) as pool:
        loader = ImageLoader(gauge, pool, decode_threads=2, max_pixels=10**8, stats=stats)
        prefetcher = Prefetcher(rows, loader, budget, max_in_flight=2)
        next(iter(prefetcher))
        prefetcher.stop()
    assert gauge.asked < len(rows)
    assert budget.used_bytes == 0


def test_stages_are_timed(rows: list[ManifestRow], loader: ImageLoader, stats: WorkerStats) -> None:
    all_of(Prefetcher(rows, loader, MemoryBudget(10**9), max_in_flight=4))
    seconds = stats.snapshot().stage_seconds
    assert seconds["fetch"] > 0
    assert seconds["decode"] > 0


@pytest.fixture(scope="module")
def mixed_files(tmp_path_factory: pytest.TempPathFactory) -> list[ManifestRow]:
    """Images of very different sizes, and what is none."""
    folder = tmp_path_factory.mktemp("mixed")
    sizes = [(8, 8), (64, 48), (64, 48), (300, 200), (900, 700)]
    kinds = ["png", "jpg", "webp", "gif", "png"]
    paths = [folder / f"{number}.{kind}" for number, kind in enumerate(kinds)]
    for path, size in zip(paths, sizes, strict=True):
        Image.new("RGB", size, (40, 90, 200)).save(path)
    (folder / "text.jpg").write_text("not a picture")
    paths += [folder / "text.jpg", folder / "missing.jpg"]
    return [ManifestRow(number, str(path), None) for number, path in enumerate(paths)]


@settings(max_examples=60, deadline=None)
@given(
    shards=st.lists(st.lists(st.integers(0, 6), max_size=12), min_size=1, max_size=3),
    limit_bytes=st.sampled_from([1, 100_000, 3_000_000, 40_000_000]),
    threads=st.tuples(st.integers(1, 4), st.integers(1, 2), st.integers(1, 2)),
    batch_size=st.integers(1, 4),
    sizes_known=st.booleans(),
    least_unknown=st.sampled_from([64, 1 << 20]),
)
def test_shards_that_share_a_budget_all_come_through_within_it(
    mixed_files: list[ManifestRow],
    shards: list[list[int]],
    limit_bytes: int,
    threads: tuple[int, int, int],
    batch_size: int,
    sizes_known: bool,
    least_unknown: int,
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefetch, "_UNKNOWN_SIZE", least_unknown)
        check_shards(mixed_files, shards, limit_bytes, threads, batch_size, sizes_known)


def check_shards(
    mixed_files: list[ManifestRow],
    shards: list[list[int]],
    limit_bytes: int,
    threads: tuple[int, int, int],
    batch_size: int,
    sizes_known: bool,
) -> None:
    fetching, decoding, encoding = threads
    budget = MemoryBudget(limit_bytes)
    device = threading.Lock()
    found: dict[int, list[int]] = {}
    files = [
        ManifestRow(row.image_id, row.uri, Path(row.uri).stat().st_size if sizes_known and row.image_id < 6 else None)
        for row in mixed_files
    ]

    with ThreadPoolExecutor(fetching) as pool, ThreadPoolExecutor(encoding) as encoders:
        loader = ImageLoader(Fetcher(), pool, decode_threads=decoding, max_pixels=10**8, stats=WorkerStats())

        def label(number: int) -> None:
            images = Prefetcher([files[which] for which in shards[number]], loader, budget, max_in_flight=fetching)
            done = []
            with device:
                for batch in micro_batches(iter(images), limit=lambda _: batch_size, max_bytes=limit_bytes / 4):
                    while batch:
                        count = images.admit(batch)
                        for image in batch[:count]:
                            done.append(image.row.image_id)
                            images.segmented(image)
                            encoders.submit(images.encoded, image.result_bytes)
                        del batch[:count]
            images.stop()
            found[number] = done

        workers = [threading.Thread(target=label, args=(number,), daemon=True) for number in range(len(shards))]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(30)
            assert not worker.is_alive(), "the shards wait for each other"
    assert {number: sorted(done) for number, done in found.items()} == dict(enumerate(map(sorted, shards)))
    assert budget.used_bytes == 0
    largest = 900 * 700 * (3 + RESULT_BYTES) + (1 << 20) * (1 + fetching)
    assert budget.most_bytes <= limit_bytes + largest


def test_the_size_of_an_image_counts_before_it_is_decoded(tmp_path: Path, stats: WorkerStats) -> None:
    for number in range(12):
        Image.new("RGB", (1000, 1000), (number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [
        ManifestRow(number, str(tmp_path / f"{number}.png"), (tmp_path / f"{number}.png").stat().st_size)
        for number in range(12)
    ]
    header = read_header((tmp_path / "0.png").read_bytes())
    budget = MemoryBudget(2 * (header.file_bytes + header.decode_bytes) + 1000)
    with ThreadPoolExecutor(8) as pool:
        loader = ImageLoader(Fetcher(), pool, decode_threads=8, max_pixels=10**8, stats=stats)
        all_of(Prefetcher(rows, loader, budget, max_in_flight=8))
    assert budget.most_bytes <= budget.limit_bytes + 1_000_000 * RESULT_BYTES


FILE_BYTES = 4 << 20


class LargeFiles(BaseHTTPRequestHandler):
    """Serves a small picture with megabytes behind it: with its length, or, under /untold/, without."""

    def do_GET(self) -> None:
        picture = io.BytesIO()
        Image.new("RGB", (8, 8), (10, 200, 30)).save(picture, "JPEG")
        self.send_response(200)
        if not self.path.startswith("/untold/"):
            self.send_header("Content-Length", str(FILE_BYTES))
        self.end_headers()
        self.wfile.write(picture.getvalue())
        self.wfile.write(PADDING[picture.tell() :])

    def log_message(self, *_: object) -> None: ...


PADDING = memoryview(bytes(FILE_BYTES))


class WebServer(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None: ...  # a client that has gone


@pytest.fixture(scope="module")
def web() -> Iterator[str]:
    server = WebServer(("127.0.0.1", 0), LargeFiles)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("folder", ["told", "untold"])
def test_files_whose_size_the_input_does_not_tell_stay_within_the_budget(
    web: str, folder: str, stats: WorkerStats
) -> None:
    rows = [ManifestRow(number, f"{web}/{folder}/{number}.jpg") for number in range(24)]
    budget = MemoryBudget(4 * FILE_BYTES)
    with ThreadPoolExecutor(16) as pool:
        loader = ImageLoader(Fetcher(), pool, decode_threads=2, max_pixels=10**8, stats=stats)
        tracemalloc.start()
        shards = [Prefetcher(half, loader, budget, max_in_flight=12) for half in (rows[:12], rows[12:])]
        loaded = [image for shard in shards for image in all_of(shard)]
        most_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert [image.row for image in loaded if image.failure is None] == rows
    assert budget.used_bytes == 0
    assert budget.most_bytes <= budget.limit_bytes + 4 * FILE_BYTES
    assert most_bytes < 9 * FILE_BYTES  # of 24


def test_a_shard_that_stops_early_gives_back_the_files_that_wait_to_be_decoded(photos: Path) -> None:
    paths = sorted(photos.rglob("*.jpg"))[:4]
    sizes = [path.stat().st_size for path in paths]
    rows = [ManifestRow(number, str(path), size) for number, (path, size) in enumerate(zip(paths, sizes, strict=True))]
    budget = MemoryBudget(4 * sum(sizes))  # of which a shard may take a quarter before its turn
    with ThreadPoolExecutor(4) as pool:
        loader = ImageLoader(Fetcher(), pool, decode_threads=1, max_pixels=10**8, stats=WorkerStats())
        images = Prefetcher(rows, loader, budget, max_in_flight=4)
    assert budget.used_bytes == sum(sizes)
    images.stop()
    assert budget.used_bytes == 0


def image_of(number: int, shape: tuple[int, int]) -> LoadedImage:
    return LoadedImage(ManifestRow(number, "", None), np.zeros((*shape, 3), np.uint8), None)


@settings(max_examples=100, deadline=None)
@given(
    shapes=st.lists(st.sampled_from([(8, 8), (8, 9), (30, 40), (1, 1)]), max_size=60),
    batch_size=st.integers(1, 9),
    max_bytes=st.sampled_from([1, 2_000, 10_000, 10**9]),
)
def test_micro_batches_lose_nothing_and_stay_small(
    shapes: list[tuple[int, int]], batch_size: int, max_bytes: int
) -> None:
    images = [image_of(number, shape) for number, shape in enumerate(shapes)]
    batches = list(micro_batches(iter(images), limit=lambda _: batch_size, max_bytes=max_bytes))
    assert sorted(image.row.image_id for batch in batches for image in batch) == list(range(len(shapes)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)


def test_full_micro_batches_have_one_shape() -> None:
    shapes = [(8, 8), (4, 4)] * 10
    images = [image_of(number, shape) for number, shape in enumerate(shapes)]
    batches = list(micro_batches(iter(images), limit=lambda _: 5, max_bytes=10**9))
    assert [len({image.pixels.shape for image in batch if image.pixels is not None}) for batch in batches] == [1] * 4
