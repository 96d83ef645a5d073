"""The images of a run, read back as its workers read them: out of files, tars and Parquet files alike."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from functools import lru_cache
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ovss_ray.errors import DamagedRunError, ImageError
from ovss_ray.images.decoding import DEFAULT_MAX_PIXELS, decode_image
from ovss_ray.images.fetching import Fetcher
from ovss_ray.images.limits import DEFAULT_MAX_BYTES, Limits
from ovss_ray.images.listing import ImageRef
from ovss_ray.images.splits import reach_of
from ovss_ray.images.stores import StorageOptions, explained
from ovss_ray.labels.damage import open_part
from ovss_ray.labels.layout import Manifest, Part

RgbImage = npt.NDArray[np.uint8]

_REF_COLUMNS = [field.name for field in fields(ImageRef)]
_GROUPS_KEPT = 8  # images are mostly asked for one after another


class PixelReader:
    """Reads the images of one run; for many threads, and for any number of images.

    Args:
        fs: where the run lies.
        root: the run directory on `fs`.
        uri: the run directory as users write it, for messages.
        job: the resolved settings of the run: its bounds hold here too.
        storage_options: fsspec options by protocol, of the images.
    """

    def __init__(
        self,
        fs: fsspec.AbstractFileSystem,
        root: str,
        uri: str,
        job: dict[str, Any],
        storage_options: StorageOptions | None,
    ) -> None:
        self._fs = fs
        self._root = root
        self._uri = uri
        self._job = job
        self._storage_options = storage_options
        self._limits = Limits(job.get("max_pixels"), job.get("max_bytes"))
        self._fetcher = lru_cache(self._open_fetcher)
        self._group = lru_cache(_GROUPS_KEPT)(self._read_group)

    def read(self, image_id: int, manifest: Manifest, shards: Iterable[int]) -> RgbImage:
        """Fetch and decode one image.

        Args:
            manifest: the images of the run.
            shards: those that may list the image, the one that counts first.

        Returns:
            uint8 [H, W, 3], RGB.

        Raises:
            ImageError: it cannot be read; with the status that it would have in a shard.
            DamagedRunError: the manifest does not list it, or a file of the manifest cannot be read.
        """
        with explained(self._uri):
            ref, part = self._planned(image_id, manifest, shards)
        try:
            source = manifest.source_of(image_id) or self._job.get("input", "")
            reach = reach_of(source, self._job.get("allow_schemes"), self._job.get("allow_hosts"))
            limits = part.limits.over(self._limits)
            data = self._fetcher(limits.max_bytes).fetch(
                ref.uri, ref.size_bytes, ref.offset, etag=ref.etag, header_bytes=ref.header_bytes, reach=reach
            )
            return decode_image(data, max_pixels=limits.max_pixels or DEFAULT_MAX_PIXELS)
        except ImageError as error:
            raise ImageError(error.status, f"{error.reason} (image {image_id}, {ref.uri})") from error

    def _open_fetcher(self, max_bytes: int | None) -> Fetcher:
        how = {"attempts": "fetch_attempts", "timeout_s": "fetch_timeout_s"}
        given = {name: self._job[field] for name, field in how.items() if field in self._job}
        return Fetcher(self._storage_options, **given, max_bytes=max_bytes or DEFAULT_MAX_BYTES)

    def _planned(self, image_id: int, manifest: Manifest, shards: Iterable[int]) -> tuple[ImageRef, Part]:
        for shard in shards:
            part, group = manifest.place_of(shard)
            ref = self._listed(image_id, manifest.parts[part].name, group)
            if ref is not None:
                return ref, manifest.parts[part]
        raise DamagedRunError(f"the manifest of {self._uri} lacks image {image_id}; restore it to read the image")

    def _listed(self, image_id: int, part: str, group: int) -> ImageRef | None:
        rows = self._group(part, group)
        position = rows["image_id"].index(image_id).as_py()
        if position < 0:
            return None
        row: dict[str, Any] = rows.slice(position, 1).drop_columns("image_id").to_pylist()[0]
        return ImageRef(**row)

    def _read_group(self, part: str, group: int) -> pa.Table:
        with open_part(self._fs, self._root, self._uri, part) as parquet:
            if group >= parquet.num_row_groups:
                raise pa.ArrowInvalid("it lists other images than were planned")
            return parquet.read_row_group(group, columns=["image_id", *_REF_COLUMNS])
