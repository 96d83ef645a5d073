"""The manifest: the frozen, ordered list of a run's images, in Parquet parts with one row group per shard."""

from __future__ import annotations

import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ovss_ray.errors import RunFailedError
from ovss_ray.images.listing import ImageRef
from ovss_ray.labels.schema import load_schema
from ovss_ray.run.directory import RunDirectory

ROWS_PER_PART = 1_000_000
LARGEST_AUTO_SHARD = 1024
SMALLEST_AUTO_SHARD = 16
SHARDS_WANTED = 64


@dataclass(frozen=True)
class ManifestRow:
    """One image of the run: its id (position in the manifest) and where its bytes are."""

    image_id: int
    uri: str
    size_bytes: int | None


@dataclass(frozen=True)
class Manifest:
    """What `run.json` records about the manifest.

    Attributes:
        images: number of images.
        shard_size: images per shard; the last shard may hold fewer.
        digest: SHA-256 over id order, URIs, sizes and etags.
        parts: rows of each part file.
    """

    images: int
    shard_size: int
    digest: str
    parts: tuple[int, ...]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.images // self.shard_size)

    def images_in(self, shard: int) -> int:
        """Number of images of a shard."""
        return min(self.shard_size, self.images - shard * self.shard_size)

    def to_json(self) -> dict[str, Any]:
        """As stored in `run.json`."""
        return {**asdict(self), "parts": list(self.parts), "shards": self.shards}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> Manifest:
        """From `run.json`."""
        return cls(stored["images"], stored["shard_size"], stored["digest"], tuple(stored["parts"]))


def choose_shard_size(images: Iterator[ImageRef]) -> tuple[int, Iterator[ImageRef]]:
    """Pick the shard size for an input of unknown length by looking at its beginning.

    Returns:
        1024, or less where that would make fewer than 64 shards (never below 16), and the images, none consumed.
    """
    head = list(itertools.islice(images, LARGEST_AUTO_SHARD * SHARDS_WANTED))
    size = min(max(-(-len(head) // SHARDS_WANTED), SMALLEST_AUTO_SHARD), LARGEST_AUTO_SHARD)
    return size, itertools.chain(head, images)


def write_manifest(images: Iterable[ImageRef], directory: RunDirectory, shard_size: int) -> Manifest:
    """Stream the images into `manifest/`; memory holds one part at most, whatever the number of images.

    Parts that an interrupted planning left behind are replaced or removed: `run.json`, written after this, is what
    makes a manifest count.
    """
    schema = load_schema("manifest")
    shards_per_part = max(ROWS_PER_PART // shard_size, 1)
    digest = hashlib.sha256()
    parts: list[int] = []
    groups = _batched(images, shard_size)
    image_id = 0
    while True:
        part_rows = 0
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, schema, compression="zstd") as writer:
            for group in itertools.islice(groups, shards_per_part):
                writer.write_table(_table(group, image_id, schema), row_group_size=shard_size)
                digest.update("".join(f"{ref.uri}\t{ref.size_bytes}\t{ref.etag}\n" for ref in group).encode())
                image_id += len(group)
                part_rows += len(group)
        if not part_rows:
            break
        directory.replace(part_name(len(parts)), sink.getvalue())
        parts.append(part_rows)
        if part_rows < shards_per_part * shard_size:
            break
    for stale in set(directory.files_in("manifest")) - {part_name(index) for index in range(len(parts))}:
        directory.remove(stale)
    return Manifest(image_id, shard_size, digest.hexdigest(), tuple(parts))


def part_name(index: int) -> str:
    """Name of a manifest part inside the run directory."""
    return f"manifest/{index:05d}.parquet"


class ManifestReader:
    """Reads the rows of one shard at a time; keeps the footers of the parts that it has opened."""

    def __init__(self, manifest: Manifest, directory: RunDirectory) -> None:
        self._manifest = manifest
        self._directory = directory
        self._shards_per_part = max(ROWS_PER_PART // manifest.shard_size, 1)
        self._footer = lru_cache(maxsize=4)(self._read_footer)

    def rows(self, shard: int) -> list[ManifestRow]:
        """The images of a shard, in order.

        Raises:
            RunFailedError: the manifest is not the one that `run.json` describes.
        """
        part, group = divmod(shard, self._shards_per_part)
        footer = self._footer(part)
        with self._directory.fs.open(self._directory.path(part_name(part)), "rb") as file:
            table = pq.ParquetFile(file, metadata=footer).read_row_group(
                group, columns=["image_id", "uri", "size_bytes"]
            )
        rows = [ManifestRow(**row) for row in table.to_pylist()]
        first = shard * self._manifest.shard_size
        if len(rows) != self._manifest.images_in(shard) or rows[0].image_id != first:
            raise RunFailedError(
                f"{self._part_uri(part)} does not fit run.json (shard {shard}); "
                "the manifest was changed after planning: start in a new run directory"
            )
        return rows

    def _part_uri(self, part: int) -> str:
        return f"{self._directory.uri}/{part_name(part)}"

    def _read_footer(self, part: int) -> pq.FileMetaData:
        try:
            with self._directory.fs.open(self._directory.path(part_name(part)), "rb") as file:
                footer = pq.read_metadata(file)
        except FileNotFoundError:
            raise RunFailedError(f"{self._part_uri(part)} is missing; restore it to continue") from None
        if footer.num_rows != self._manifest.parts[part]:
            raise RunFailedError(f"{self._part_uri(part)} does not fit run.json; restore it to continue")
        return footer


def _batched(images: Iterable[ImageRef], size: int) -> Iterator[list[ImageRef]]:
    iterator = iter(images)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _table(group: list[ImageRef], first_id: int, schema: pa.Schema) -> pa.Table:
    columns = {
        "image_id": range(first_id, first_id + len(group)),
        "uri": [ref.uri for ref in group],
        "size_bytes": [ref.size_bytes for ref in group],
        "etag": [ref.etag for ref in group],
    }
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
