"""Loading ahead: order, bounds, failures and micro-batches."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from ovss_ray.images.fetching import Fetcher
from ovss_ray.run.manifest import ManifestRow
from ovss_ray.run.prefetch import ImageLoader, LoadedImage, Prefetcher, WorkerStats, micro_batches


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


@pytest.mark.parametrize(("max_in_flight", "max_bytes"), [(1, 1), (8, 1), (8, 10**9), (3, 100_000)])
def test_images_come_in_manifest_order_with_their_own_pixels(
    rows: list[ManifestRow], loader: ImageLoader, max_in_flight: int, max_bytes: int
) -> None:
    loaded = list(Prefetcher(rows, loader, max_in_flight=max_in_flight, max_bytes=max_bytes))
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
    loaded = list(Prefetcher(mixed, loader, max_in_flight=4, max_bytes=10**9))
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


def test_memory_and_requests_are_bounded(rows: list[ManifestRow], stats: WorkerStats) -> None:
    gauge = Gauge()
    with ThreadPoolExecutor(8) as pool:
        loader = ImageLoader(gauge, pool, decode_threads=2, max_pixels=10**8, stats=stats)
        largest = 200 * 150 * 3
        images = iter(Prefetcher(rows, loader, max_in_flight=3, max_bytes=4 * largest))
        for taken, _ in enumerate(images, 1):
            # What was asked for and not yet taken is what is held or on its way.
            assert gauge.asked - taken <= 4 * largest // (64 * 64 * 3) + 3
    assert gauge.most <= 3
    assert gauge.asked == len(rows)


def test_stopping_asks_for_nothing_more(rows: list[ManifestRow], stats: WorkerStats) -> None:
    gauge = Gauge()
    with ThreadPoolExecutor(8) as pool:
        loader = ImageLoader(gauge, pool, decode_threads=2, max_pixels=10**8, stats=stats)
        prefetcher = Prefetcher(rows, loader, max_in_flight=2, max_bytes=1)
        next(iter(prefetcher))
        prefetcher.stop()
    assert gauge.asked < len(rows)


def test_stages_are_timed(rows: list[ManifestRow], loader: ImageLoader, stats: WorkerStats) -> None:
    list(Prefetcher(rows, loader, max_in_flight=4, max_bytes=10**9))
    seconds = stats.snapshot().stage_seconds
    assert seconds["fetch"] > 0
    assert seconds["decode"] > 0


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
