"""The images of a sample, fetched and decoded ahead within bounds of memory, in micro-batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ovss_ray.images.fetching import Fetcher
from ovss_ray.images.splits import reach_of
from ovss_ray.run.budget import MemoryBudget
from ovss_ray.run.logs import ContextThreadPool
from ovss_ray.run.manifest import ManifestRow
from ovss_ray.run.prefetch import Image, ImageLoader, LoadedImage, Prefetcher, micro_batches, rare_shapes_bytes
from ovss_ray.run.stats import WorkerStats
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import Vocabulary

Batch = Sequence[tuple[LoadedImage, Image]]
"""Images with their pixels."""


@dataclass(frozen=True)
class Setting:
    """What all candidates share; picklable.

    Attributes:
        spec: where images are and how they are fetched; the segmenters' CLIP, device and precision.
        vocabulary: the classes.
        judge: the CLIP that judges.
        threads: CPU threads for decoding.
    """

    spec: JobSpec
    vocabulary: Vocabulary
    judge: str
    threads: int


def load_batches(setting: Setting, rows: Sequence[ManifestRow]) -> Iterator[tuple[Batch, list[LoadedImage]]]:
    """Micro-batches of images of one shape, each with the images that failed to load meanwhile; no image is lost.

    The last micro-batch, and only that one, may be empty. Images take `prefetch_mib` in all their forms, and one
    more may be over that.
    """
    warnings.filterwarnings("ignore", module="PIL")  # of images that are damaged but readable, once per tag
    spec = setting.spec
    fetcher = Fetcher(
        spec.storage_options,
        attempts=spec.fetch_attempts,
        timeout_s=spec.fetch_timeout_s,
        connections=spec.fetch_concurrency,
        max_bytes=spec.max_bytes,
    )
    pool = ContextThreadPool(spec.fetch_concurrency, thread_name_prefix="load")
    reach = reach_of(spec.input, spec.allow_schemes, spec.allow_hosts)
    loader = ImageLoader(
        fetcher,
        pool,
        decode_threads=setting.threads,
        max_pixels=spec.max_pixels,
        stats=WorkerStats(),
        reach_of=lambda _: reach,
    )
    budget = MemoryBudget(spec.prefetch_mib * 2**20)
    ahead = Prefetcher(rows, loader, budget, max_in_flight=spec.fetch_concurrency)
    failed: list[LoadedImage] = []

    def readable() -> Iterator[LoadedImage | None]:
        for image in ahead:
            if image is not None and image.pixels is None:
                failed.append(image)
            else:
                yield image

    try:
        for batch in micro_batches(readable(), limit=lambda _: spec.batch_size, max_bytes=rare_shapes_bytes(budget)):
            while batch:
                count = ahead.admit(batch)
                yield [(image, image.pixels) for image in batch[:count] if image.pixels is not None], failed
                failed.clear()
                for image in batch[:count]:
                    ahead.segmented(image)
                    ahead.encoded(image.result_bytes)
                del batch[:count]
        yield [], failed
    finally:
        ahead.stop()
        loader.close()
