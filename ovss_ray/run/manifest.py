"""The manifest: the frozen, ordered list of a run's images, in Parquet parts with one row group per shard."""

from __future__ import annotations

import hashlib
import io
import itertools
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ovss_ray.errors import RunFailedError
from ovss_ray.images.listing import ImageRef
from ovss_ray.labels.layout import MANIFEST_FOLDER, Manifest, Part
from ovss_ray.labels.schema import load_schema
from ovss_ray.run.directory import RunDirectory

ROWS_PER_PART = 1_000_000
LARGEST_AUTO_SHARD = 1024
SMALLEST_AUTO_SHARD = 16
SHARDS_WANTED = 64


@dataclass(frozen=True)
class ManifestRow:
    """One image of the run: its id (position in the manifest), where its bytes are, and what is kept with it.

    The fields are columns of `schemas/manifest.yaml`.
    """

    image_id: int
    uri: str
    size_bytes: int | None = None
    offset: int | None = None
    extra: str | None = None
    etag: str | None = None
    header_bytes: int | None = None


_ROW_COLUMNS = [field.name for field in fields(ManifestRow)]
_REF_COLUMNS = [field.name for field in fields(ImageRef)]
_BATCH_ROWS = 1 << 16
_LOOKED_AT = 256 << 20  # characters of the beginning of an input
_PLANNED_PART = re.compile(r"\d{5,}(-[0-9a-f]{8})?\.parquet")
_WRITER_OPTIONS: dict[str, Any] = {
    "compression": "zstd",
    "write_page_checksum": True,
    # Hardly two images share a URI or an ETag: dictionaries of them only cost time and space.
    "use_dictionary": ["extra"],
    "column_encoding": {"image_id": "DELTA_BINARY_PACKED"},
    # Every reader of a part reads its footer, where the bounds of long texts for each shard would take half the space.
    "write_statistics": ["image_id"],
}


def choose_shard_size(images: Iterator[ImageRef]) -> tuple[int, Iterator[ImageRef]]:
    """Pick the shard size for an input of unknown length by looking at its beginning.

    Returns:
        1024, or less where that would make fewer than 64 shards (never below 16) or large ones, because much is kept
        with each image; and the images, none consumed.
    """
    head: list[ImageRef] = []
    characters = 0
    for image in itertools.islice(images, LARGEST_AUTO_SHARD * SHARDS_WANTED):
        head.append(image)
        characters += len(image.uri) + len(image.extra or "")
        if characters > _LOOKED_AT:
            break
    size = min(max(-(-len(head) // SHARDS_WANTED), SMALLEST_AUTO_SHARD), LARGEST_AUTO_SHARD)
    return size, itertools.chain(head, images)


def write_manifest(images: Iterable[ImageRef], directory: RunDirectory, shard_size: int) -> Manifest:
    """Stream the images into `manifest/`; memory holds one part at most, whatever the number of images.

    `run.json`, written after this, is what makes a manifest count. Parts that are there are left alone: they may be
    those of another process that is planning the same run, and may be the one whose `run.json` counts.
    """

    def write(index: int, data: bytes) -> str:
        name = f"{MANIFEST_FOLDER}/{index:05d}.parquet"
        if not directory.conditional_put or not directory.create(name, data):
            name = f"{MANIFEST_FOLDER}/{index:05d}-{uuid.uuid4().hex[:8]}.parquet"
            directory.create(name, data)
        return name

    parts, digest = write_parts(enumerate(images), shard_size, write)
    return Manifest(shard_size, digest, tuple(parts))


def remove_stray_parts(manifest: Manifest, directory: RunDirectory) -> None:
    """Remove what other plannings left behind; only once `run.json` says that this manifest counts.

    In a store without conditional put it stays: another driver may have written `run.json` just now, and label from it.
    """
    if not directory.conditional_put:
        return
    for name in set(directory.files_in(MANIFEST_FOLDER)) - {part.name for part in manifest.parts}:
        if _PLANNED_PART.fullmatch(name.rpartition("/")[2]):
            directory.remove(name)


def write_parts(
    images: Iterable[tuple[int, ImageRef]],
    shard_size: int,
    write: Callable[[int, bytes], str],
) -> tuple[list[Part], str]:
    """Stream images with their ids into parts of a million; returns the parts and the SHA-256 over all images.

    Args:
        write: creates the file of the n-th part, counted from 0, and returns its name.
    """
    schema = load_schema("manifest")
    shards_per_part = max(ROWS_PER_PART // shard_size, 1)
    digest = hashlib.sha256()
    parts: list[Part] = []
    groups = _batched(images, shard_size)
    while True:
        part_rows = 0
        sink = io.BytesIO()
        with pq.ParquetWriter(sink, schema, **_WRITER_OPTIONS) as writer:
            for group in itertools.islice(groups, shards_per_part):
                writer.write_table(_table(group, schema), row_group_size=shard_size)
                digest.update("".join(map(_identity, group)).encode())
                part_rows += len(group)
        if not part_rows:
            break
        parts.append(Part(write(len(parts), sink.getvalue()), part_rows))
        if part_rows < shards_per_part * shard_size:
            break
    return parts, digest.hexdigest()


class ManifestReader:
    """Reads the rows of one shard at a time; keeps the footers of the parts that it has opened."""

    def __init__(self, manifest: Manifest, directory: RunDirectory) -> None:
        self._manifest = manifest
        self._directory = directory
        self._footer = lru_cache(maxsize=4)(self._read_footer)

    def rows(self, shard: int) -> list[ManifestRow]:
        """The images of a shard, in order.

        Raises:
            RunFailedError: the manifest is not the one that `run.json` describes.
        """
        part, group = self._manifest.place_of(shard)
        footer = self._footer(part)
        with self._directory.fs.open(self._directory.path(self._manifest.parts[part].name), "rb") as file:
            table = pq.ParquetFile(file, metadata=footer).read_row_group(group, columns=_ROW_COLUMNS)
        rows = [ManifestRow(**row) for row in table.to_pylist()]
        first = self._manifest.first_id(shard)
        if len(rows) != self._manifest.images_in(shard) or first not in (None, rows[0].image_id):
            raise RunFailedError(
                f"{self._part_uri(part)} does not fit run.json (shard {shard}); "
                "the manifest was changed after planning: start in a new run directory"
            )
        return rows

    def _part_uri(self, part: int) -> str:
        return f"{self._directory.uri}/{self._manifest.parts[part].name}"

    def _read_footer(self, part: int) -> pq.FileMetaData:
        try:
            with self._directory.fs.open(self._directory.path(self._manifest.parts[part].name), "rb") as file:
                footer = pq.read_metadata(file)
        except FileNotFoundError:
            raise RunFailedError(f"{self._part_uri(part)} is missing; restore it to continue") from None
        if footer.num_rows != self._manifest.parts[part].rows:
            raise RunFailedError(f"{self._part_uri(part)} does not fit run.json; restore it to continue")
        return footer


def stored_uris(manifest: Manifest, directory: RunDirectory) -> Iterator[list[str]]:
    """The URIs of all images in batches; reads that column only."""
    for part in manifest.parts:
        if not part.retry:
            with directory.fs.open(directory.path(part.name), "rb") as file:
                for batch in pq.ParquetFile(file).iter_batches(_BATCH_ROWS, columns=["uri"]):
                    yield batch.column(0).to_pylist()


def stored_images(
    image_ids: Sequence[int], manifest: Manifest, directory: RunDirectory
) -> Iterator[tuple[int, ImageRef]]:
    """The images with these ids (ascending, distinct), as they were planned; holds one part in memory at most."""
    ids = np.asarray(image_ids, np.int64)
    first = 0
    for part in manifest.parts:
        if part.retry:
            continue
        inside = ids[(ids >= first) & (ids < first + part.rows)] - first
        groups, counts = np.unique(inside // manifest.shard_size, return_counts=True)
        if len(inside):
            with directory.fs.open(directory.path(part.name), "rb") as file:
                parquet = pq.ParquetFile(file, pre_buffer=True)
                table = parquet.read_row_groups(groups.tolist(), columns=["image_id", *_REF_COLUMNS])
            # Whole groups were read one after another: move each position by the groups that were left out.
            shift = (groups - np.arange(len(groups))) * manifest.shard_size
            for row in _rows(table.take(pa.array(inside - np.repeat(shift, counts)))):
                image_id: int = row.pop("image_id")
                yield image_id, ImageRef(**row)
        first += part.rows


def digest_of(parts: Iterable[Part], directory: RunDirectory) -> str:
    """The SHA-256 that `write_parts` gave for these parts, computed from their files."""
    digest = hashlib.sha256()
    for part in parts:
        with directory.fs.open(directory.path(part.name), "rb") as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            for batch in parquet.iter_batches(_BATCH_ROWS, columns=_REF_COLUMNS):
                digest.update("".join(_identity((0, ImageRef(**row))) for row in _rows(batch)).encode())
    return digest.hexdigest()


def _rows(table: pa.Table | pa.RecordBatch) -> Iterator[dict[str, Any]]:
    for start in range(0, table.num_rows, _BATCH_ROWS):
        yield from table.slice(start, _BATCH_ROWS).to_pylist()


def _batched(images: Iterable[tuple[int, ImageRef]], size: int) -> Iterator[list[tuple[int, ImageRef]]]:
    iterator = iter(images)
    while batch := list(itertools.islice(iterator, size)):
        yield batch


def _identity(image: tuple[int, ImageRef]) -> str:
    _, ref = image
    headers = "" if ref.header_bytes is None else f"\t{ref.header_bytes}"  # a later column: older digests stay
    return f"{ref.uri}\t{ref.size_bytes}\t{ref.etag}\t{ref.offset}\t{ref.extra}{headers}\n"


def _table(group: list[tuple[int, ImageRef]], schema: pa.Schema) -> pa.Table:
    refs = [ref for _, ref in group]
    columns: dict[str, list[Any]] = {name: [getattr(ref, name) for ref in refs] for name in _REF_COLUMNS}
    columns["image_id"] = [image_id for image_id, _ in group]
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)
