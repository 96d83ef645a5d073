"""Reading a run, finished or not: its label maps, its statistics, and SQL over both."""

from __future__ import annotations

import json
import operator
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from os import PathLike, fspath
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from ovss_ray.errors import DamagedRunError, OvssError, SettingError, nearest
from ovss_ray.images.stores import StorageOptions, explained, open_store, store_failure
from ovss_ray.labels.additions import grown, read_additions
from ovss_ray.labels.codecs import LabelMap, decode_label_map
from ovss_ray.labels.layout import SHARDS_FOLDER, Manifest
from ovss_ray.labels.outcomes import Outcomes, count_outcomes
from ovss_ray.labels.pixels import PixelReader, RgbImage
from ovss_ray.labels.record import RunRecord, explain_missing, parse_record
from ovss_ray.labels.schema import check_schema, load_schema
from ovss_ray.labels.shard import list_shards
from ovss_ray.labels.views import BULKY_COLUMNS, ShardViews
from ovss_ray.vocabulary import Vocabulary

_LOOKUP_COLUMNS = ["image_id", "uri", "status", "error", "height", "width", "label_map"]


def open_run(path: str | PathLike[str], storage_options: StorageOptions | None = None) -> Run:
    """Open a run directory for reading; the run may still be going on.

    Args:
        path: the run directory, local or in an object store.
        storage_options: fsspec options by protocol, e.g. `{"s3": {"endpoint_url": ...}}`.

    Raises:
        SettingError: if there is no run there; says what is there instead.
        OvssError: if the store cannot be reached, or the run was written by a newer version of this package.
    """
    uri = fspath(path).rstrip("/")
    fs, root = open_store(uri or "/", storage_options)
    with explained(uri):
        try:
            stored = fs.cat_file(f"{root}/run.json")
        except (FileNotFoundError, NotADirectoryError):
            raise SettingError(explain_missing(fs, root, uri)) from None
    record, planned = parse_record(stored, uri)
    return Run(uri, fs, root, record, planned, storage_options)


class _NotWrittenError(OvssError):
    """A shard that has no file yet."""


@dataclass(frozen=True, eq=False)
class StoredImage:
    """One image as a shard holds it; `labels` is [H, W] class ids, None unless `status` is "ok"."""

    image_id: int
    uri: str
    status: str
    error: str | None
    labels: LabelMap | None


class Run:
    """One labelling run; use `open_run`. Also a context manager, which closes the SQL connection.

    Attributes:
        uri: the run directory as it was given.
        job: the resolved settings of the run.
        fingerprint: SHA-256 over everything that changes the labels.
        warnings: why labels mean nothing, for a run with random weights, or with the demo's model and other classes.
        vocabulary: the classes.
        additions: images added later or labelled again, oldest first.
        manifest: the images and how they divide into shards, those of the additions included.
    """

    def __init__(
        self,
        uri: str,
        fs: fsspec.AbstractFileSystem,
        root: str,
        record: RunRecord,
        planned: Manifest,
        storage_options: StorageOptions | None = None,
    ) -> None:
        self.uri = uri
        self.job: dict[str, Any] = record.job
        self.fingerprint = record.fingerprint
        self.warnings = record.warnings
        self.vocabulary = Vocabulary.from_json(json.dumps(record.vocabulary))
        self._planned = planned
        self._fs = fs
        self._root = root
        self._shards = f"{root}/{SHARDS_FOLDER}"
        self._storage_options = storage_options
        self._read_additions()

    @property
    def num_images(self) -> int:
        """Number of images in the manifest."""
        return self.manifest.images

    @property
    def num_shards(self) -> int:
        """Number of shards, those that label images again included."""
        return self.manifest.shards

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the SQL connection, if `sql`, `images` or `segments` opened one; their relations end with it."""
        views: ShardViews | None = self.__dict__.pop("_views", None)
        if views is not None:
            views.connection.close()

    def __repr__(self) -> str:
        return f"Run({self.uri!r}, {self.num_images} images, {self.vocabulary.num_classes} classes)"

    def shards_done(self) -> list[int]:
        """Numbers of the shards that are written, ascending; one listing."""
        with explained(self.uri):
            found = list_shards(self._fs, self._shards)
            if found and found[-1] >= self.manifest.shards:
                self._read_additions()  # the run has grown since it was opened
        if found and found[-1] >= self.manifest.shards:
            raise DamagedRunError(
                f"{self._uri_of(found[-1])} is no part of the run, which has {self.manifest.shards} shards; remove it"
            )
        return found

    def status_counts(self) -> dict[str, int]:
        """Number of images by status, of the shards that are written; a status without images is left out."""
        return self.outcomes().statuses

    def outcomes(self) -> Outcomes:
        """What became of the images of the shards that are written: counts by status, and the reasons of failures."""
        done = self.shards_done()
        with explained(self.uri):
            return count_outcomes(self._open_shard, done, self.superseded(done))

    def images(self, columns: Sequence[str] | None = None, *, status: str | Sequence[str] | None = None) -> pa.Table:
        """One row per image of the shards that are written, by ascending image_id.

        Args:
            columns: names from `schemas/shard.yaml`; all but label_map and segments if not given.
            status: only images with this status, or one of these.

        Raises:
            SettingError: for an unknown column.
            OvssError: if no shard is written yet.
        """
        known = load_schema("shard").names
        chosen = [name for name in known if name not in BULKY_COLUMNS] if columns is None else columns
        for name in chosen:
            if name not in known:
                hint = nearest(name, known) or f"; there are {', '.join(known)}"
                raise SettingError(f"images have no column {name!r}{hint}")
        statuses = [status] if isinstance(status, str) else status
        literals = ", ".join("'" + value.replace("'", "''") + "'" for value in statuses or ())
        where = "" if statuses is None else f"WHERE status IN ({literals or 'NULL'})"
        return self.sql(f"SELECT {', '.join(chosen)} FROM shard_rows {where} ORDER BY image_id").to_arrow_table()

    def segments(self) -> pa.Table:
        """One row per image and class present, by ascending image_id and class_id.

        Columns: image_id, uri, class_id, class_name and the statistics in `segments` of `schemas/shard.yaml`.

        Raises:
            OvssError: if no shard is written yet.
        """
        return self.sql("SELECT * FROM segments ORDER BY image_id, class_id").to_arrow_table()

    def sql(self, query: str) -> duckdb.DuckDBPyRelation:
        """Query the shards that are written with DuckDB.

        Views: `images` (one row per image), `segments` (one row per image and class present), `classes` (the
        vocabulary), `shard_rows` (`images` with label_map and segments).

        Returns:
            A relation; nothing is read before `.fetchall()`, `.show()`, `.to_arrow_table()`, or, for a result larger
            than memory, an iteration over `pa.RecordBatchReader.from_stream(relation)`.

        Raises:
            SettingError: if the query is not valid.
            OvssError: if no shard is written yet.
        """
        done = self.shards_done()
        self._require_shards(done)
        try:
            self._views.update(self.manifest, done)
            relation = self._views.connection.sql(query)
        except duckdb.Error as error:
            raise SettingError(f"the query cannot be run on {self.uri}: {_first_line(error)}") from error
        if relation is None:
            raise SettingError("the query gives no rows; write a SELECT statement")
        return relation

    def label_map(self, image_id: int) -> LabelMap:
        """The class ids of one image, [H, W] uint8 or uint16, `vocabulary.ignore_index` where there is none.

        Reads the footer and one row group of one file; of an image that was labelled again, of one file per attempt.

        Raises:
            SettingError: if the run has no such image.
            OvssError: if the image failed (with its reason) or its shard is not written yet.
        """
        image_id = self._checked_id(image_id)
        row = self._read_home(image_id) if not self.manifest.retry_shards else self._read_best(image_id)
        if row["status"] != "ok":
            raise OvssError(f"image {image_id} ({row['uri']}) has no label map: {row['status']}, {row['error']}")
        return self._decode(row)

    def image(self, image_id: int) -> RgbImage:
        """One image as the segmenter saw it, uint8 [H, W, 3] RGB, from wherever it lies, also in a tar or Parquet file.

        It is fetched again and decoded by the rules and within the limits of the run. Images without labels can be
        asked for too.

        Raises:
            SettingError: if the run has no such image, or `image_id` is no number.
            ImageError: if it cannot be read (any more); `status` and `reason` are those of a row of a shard.
            OvssError: if the run itself cannot be read.
        """
        image_id = self._checked_id(image_id)
        shards = chain(self._retries_of(image_id), [self.manifest.home_of(image_id)[0]])
        return self._pixels.read(image_id, self.manifest, shards)

    @cached_property
    def _pixels(self) -> PixelReader:
        return PixelReader(self._fs, self._root, self.uri, self.job, self._storage_options)

    def _checked_id(self, image_id: int) -> int:
        try:
            number = operator.index(image_id)
        except TypeError:
            raise SettingError(f"image_id is {image_id!r}; give the number of an image, from 0") from None
        if not 0 <= number < self.num_images:
            raise SettingError(f"{self.uri} has no image {number}: its image ids are 0 to {self.num_images - 1}")
        return number

    def _read_best(self, image_id: int) -> dict[str, Any]:
        """The row that counts, by the rule of `ShardViews`."""
        latest_failed: dict[str, Any] | None = None
        for shard in self._retries_of(image_id):
            try:
                with self._open_shard(shard) as parquet:
                    row = _read_image(parquet, image_id)
            except _NotWrittenError:
                continue
            if row is not None and row["status"] == "ok":
                return row
            latest_failed = latest_failed or row
        try:
            home = self._read_home(image_id)
        except _NotWrittenError:
            if latest_failed is None:
                raise
            return latest_failed
        return home if home["status"] == "ok" or latest_failed is None else latest_failed

    def _read_home(self, image_id: int) -> dict[str, Any]:
        shard, position = self.manifest.home_of(image_id)
        with self._open_shard(shard) as parquet:
            row = _read_row(parquet, position, _LOOKUP_COLUMNS)
        if row is None or row["image_id"] != image_id:
            raise OvssError(f"{self._uri_of(shard)} lacks image {image_id}; remove the file and continue the run")
        return row

    def _retries_of(self, image_id: int) -> Iterator[int]:
        """The shards that may hold the image once more, latest first."""
        for part in reversed(range(len(self.manifest.parts))):
            if self.manifest.parts[part].retry:
                firsts = self._first_ids(self.manifest.parts[part].name)
                group = bisect_right(firsts, image_id) - 1
                if group >= 0:
                    yield self.manifest.shards_of(part)[group]

    def _first_ids(self, part: str) -> list[int]:
        """The first image of each shard of a part whose images are labelled again; they ascend."""
        if part not in self._retry_parts:
            with self._fs.open(f"{self._root}/{part}", "rb") as file:
                footer = pq.read_metadata(file)
            groups = range(footer.num_row_groups)
            column = footer.schema.names.index("image_id")
            self._retry_parts[part] = [footer.row_group(group).column(column).statistics.min for group in groups]
        return self._retry_parts[part]

    def label_maps(self) -> Iterator[tuple[int, LabelMap]]:
        """All label maps as (image_id, [H, W] class ids), shard by shard; images that failed are left out.

        Holds one row group in memory. The images of a shard that labels some again come with that shard.
        """
        done = self.shards_done()
        superseded = self.superseded(done)
        for shard in done:
            for image in self.rows_of(shard, without=superseded.get(shard, frozenset())):
                if image.labels is not None:
                    yield image.image_id, image.labels

    def rows_of(self, shard: int, *, without: Set[int] = frozenset()) -> Iterator[StoredImage]:
        """All images of one shard that is written, labelled or not, by ascending image_id; holds one row group.

        Args:
            shard: its number.
            without: images to leave out, such as those that are `superseded`.
        """
        with explained(self.uri), self._open_shard(shard) as parquet:
            for group in range(parquet.num_row_groups):
                for row in parquet.read_row_group(group, columns=_LOOKUP_COLUMNS).to_pylist():
                    if row["image_id"] not in without:
                        labels = self._decode(row) if row["status"] == "ok" else None
                        yield StoredImage(row["image_id"], row["uri"], row["status"], row["error"], labels)

    def superseded(self, done: Sequence[int]) -> Mapping[int, Set[int]]:
        """Of these shards, the images whose row does not count, because that of a later shard does; by shard."""
        if not done or not self.manifest.retry_shards:
            return {}
        self._views.update(self.manifest, done)
        return self._views.superseded()

    def _read_additions(self) -> None:
        with explained(self.uri):
            self.additions = tuple(read_additions(self._fs, self._root, self.uri))
        self.manifest = grown(self._planned, self.additions)
        self._retry_parts: dict[str, list[int]] = {}

    def _decode(self, row: Mapping[str, Any]) -> LabelMap:
        try:
            return decode_label_map(row["label_map"], row["height"], row["width"], self.vocabulary.label_dtype)
        except OvssError as error:
            raise DamagedRunError(f"image {row['image_id']} of {self.uri}: {error}") from error

    @cached_property
    def _views(self) -> ShardViews:
        with self._open_shard(self.shards_done()[0]):  # refuses shards of a newer version
            return ShardViews(self._fs, self._shards, self.vocabulary)

    @contextmanager
    def _open_shard(self, shard: int) -> Iterator[pq.ParquetFile]:
        path = f"{self._shards}/{shard:08d}.parquet"
        try:
            # Without read-ahead: fetch the footer and the columns that are asked for, not the rest of the file.
            file = self._fs.open(path, "rb", cache_type="none")
        except FileNotFoundError:
            done = self.shards_done()
            self._require_shards(done)
            raise _NotWrittenError(
                f"shard {shard} of {self.uri} is not written yet ({len(done)} of {self.num_shards} are); "
                "continue the run to label its images"
            ) from None
        with file:
            try:
                parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
                check_schema(parquet.schema_arrow, "shard", self._uri_of(shard))
                yield parquet
            except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
                if not _tells_damage(error):
                    raise
                reason = _first_line(error)
                raise DamagedRunError(
                    f"{self._uri_of(shard)} is damaged ({reason}); remove it and continue the run"
                ) from error

    def _require_shards(self, done: Sequence[int]) -> None:
        if not done:
            raise OvssError(f"no shard of {self.uri} is written yet; start or continue the run, or wait for the first")

    def _uri_of(self, shard: int) -> str:
        return f"{self.uri}/shards/{shard:08d}.parquet"


def _read_row(parquet: pq.ParquetFile, position: int, columns: list[str]) -> dict[str, Any] | None:
    """The row at `position` of the file, or None beyond its end; reads its row group only."""
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if position < rows:
            row: dict[str, Any] = parquet.read_row_group(group, columns=columns).slice(position, 1).to_pylist()[0]
            return row
        position -= rows
    return None


def _read_image(parquet: pq.ParquetFile, image_id: int) -> dict[str, Any] | None:
    """The row of an image in a file sorted by image_id, or None; reads the row groups that may hold it."""
    column = parquet.metadata.schema.names.index("image_id")
    for group in range(parquet.num_row_groups):
        statistics = parquet.metadata.row_group(group).column(column).statistics
        if statistics.min <= image_id <= statistics.max:
            ids = parquet.read_row_group(group, columns=["image_id"])["image_id"]
            position = ids.index(image_id).as_py()
            if position >= 0:
                rows = parquet.read_row_group(group, columns=_LOOKUP_COLUMNS)
                row: dict[str, Any] = rows.slice(position, 1).to_pylist()[0]
                return row
    return None


def _tells_damage(error: Exception) -> bool:
    """Whether it is about the bytes of a Parquet file: PyArrow says so by a plain `OSError` too."""
    if not isinstance(error, OSError):
        return True
    return error.errno is None and not isinstance(error, OvssError) and store_failure(error) == "other"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or repr(error)
