"""Reading a run, finished or not: its label maps, its statistics, and SQL over both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from os import PathLike, fspath
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ConfigDict

from ovss_ray.errors import OvssError, SettingError, nearest
from ovss_ray.images.stores import StorageOptions, explained, open_store
from ovss_ray.labels.codecs import LabelMap, decode_label_map
from ovss_ray.labels.layout import FORMAT_VERSION, Manifest
from ovss_ray.labels.schema import check_schema, load_contract, load_schema
from ovss_ray.labels.shard import list_shards
from ovss_ray.labels.views import BULKY_COLUMNS, connect
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
            raise SettingError(_explain_missing(fs, root, uri)) from None
    record, manifest = _parse_record(stored, uri)
    return Run(uri, fs, root, record, manifest)


class _Record(BaseModel):
    """What reading needs of `run.json`."""

    model_config = ConfigDict(frozen=True)
    fingerprint: str
    job: dict[str, Any]
    vocabulary: dict[str, Any]


class Run:
    """One labelling run; use `open_run`. Also a context manager, which closes the SQL connection.

    Attributes:
        uri: the run directory as it was given.
        job: the resolved settings of the run.
        fingerprint: SHA-256 over everything that changes the labels.
        vocabulary: the classes.
        num_images: number of images in the manifest.
        num_shards: number of shards that they are divided into.
    """

    def __init__(self, uri: str, fs: fsspec.AbstractFileSystem, root: str, record: _Record, manifest: Manifest) -> None:
        self.uri = uri
        self.job: dict[str, Any] = record.job
        self.fingerprint = record.fingerprint
        self.vocabulary = Vocabulary.from_json(json.dumps(record.vocabulary))
        self.num_images = manifest.images
        self.num_shards = manifest.shards
        self._manifest = manifest
        self._fs = fs
        self._shards = f"{root}/shards"

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the SQL connection, if `sql`, `images` or `segments` opened one; their relations end with it."""
        connection = self.__dict__.pop("_connection", None)
        if connection is not None:
            connection.close()

    def __repr__(self) -> str:
        return f"Run({self.uri!r}, {self.num_images} images, {self.vocabulary.num_classes} classes)"

    def shards_done(self) -> list[int]:
        """Numbers of the shards that are written, ascending; one listing."""
        with explained(self.uri):
            return list_shards(self._fs, self._shards)

    def status_counts(self) -> dict[str, int]:
        """Number of images by status, of the shards that are written; a status without images is left out."""
        if not self.shards_done():
            return {}
        counted = dict(self.sql("SELECT status, count(*) FROM images GROUP BY status").fetchall())
        known = next(column for column in load_contract("shard")["columns"] if column["name"] == "status")["values"]
        return {status: counted[status] for status in sorted(counted, key=[*known, *counted].index)}

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
        self._require_shards(self.shards_done())
        try:
            relation = self._connection.sql(query)
        except duckdb.Error as error:
            raise SettingError(f"the query cannot be run on {self.uri}: {_first_line(error)}") from error
        if relation is None:
            raise SettingError("the query gives no rows; write a SELECT statement")
        return relation

    def label_map(self, image_id: int) -> LabelMap:
        """The class ids of one image, [H, W] uint8 or uint16, `vocabulary.ignore_index` where there is none.

        Reads the footer and one row group of one file.

        Raises:
            SettingError: if the run has no such image.
            OvssError: if the image failed (with its reason) or its shard is not written yet.
        """
        if not 0 <= image_id < self.num_images:
            raise SettingError(f"{self.uri} has no image {image_id}: its image ids are 0 to {self.num_images - 1}")
        shard, position = self._manifest.home_of(image_id)
        with self._open_shard(shard) as parquet:
            row = _read_row(parquet, position, _LOOKUP_COLUMNS)
        if row is None or row["image_id"] != image_id:
            raise OvssError(f"{self._uri_of(shard)} lacks image {image_id}; remove the file and continue the run")
        if row["status"] != "ok":
            raise OvssError(f"image {image_id} ({row['uri']}) has no label map: {row['status']}, {row['error']}")
        return self._decode(row)

    def label_maps(self) -> Iterator[tuple[int, LabelMap]]:
        """All label maps as (image_id, [H, W] class ids), shard by shard; images that failed are left out.

        Holds one row group in memory.
        """
        for shard in self.shards_done():
            with self._open_shard(shard) as parquet:
                for group in range(parquet.num_row_groups):
                    for row in parquet.read_row_group(group, columns=_LOOKUP_COLUMNS).to_pylist():
                        if row["status"] == "ok":
                            yield row["image_id"], self._decode(row)

    def _decode(self, row: Mapping[str, Any]) -> LabelMap:
        try:
            return decode_label_map(row["label_map"], row["height"], row["width"], self.vocabulary.label_dtype)
        except OvssError as error:
            raise OvssError(f"image {row['image_id']} of {self.uri}: {error}") from error

    @cached_property
    def _connection(self) -> duckdb.DuckDBPyConnection:
        with self._open_shard(self.shards_done()[0]):  # refuses shards of a newer version
            return connect(self._fs, self._shards, self.vocabulary)

    @contextmanager
    def _open_shard(self, shard: int) -> Iterator[pq.ParquetFile]:
        path = f"{self._shards}/{shard:08d}.parquet"
        try:
            # Without read-ahead: fetch the footer and the columns that are asked for, not the rest of the file.
            file = self._fs.open(path, "rb", cache_type="none")
        except FileNotFoundError:
            done = self.shards_done()
            self._require_shards(done)
            raise OvssError(
                f"shard {shard} of {self.uri} is not written yet ({len(done)} of {self.num_shards} are); "
                "continue the run to label its images"
            ) from None
        with file:
            try:
                parquet = pq.ParquetFile(file, pre_buffer=True)
            except pa.ArrowInvalid as error:
                raise OvssError(
                    f"{self._uri_of(shard)} is damaged ({error}); remove it and continue the run"
                ) from error
            check_schema(parquet.schema_arrow, "shard", self._uri_of(shard))
            yield parquet

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


def _parse_record(stored: bytes, uri: str) -> tuple[_Record, Manifest]:
    try:
        content = json.loads(stored)
        version = int(content["format_version"])
        if version > FORMAT_VERSION:
            raise OvssError(
                f"{uri} has run format {version} and this ovss-ray reads {FORMAT_VERSION}; upgrade ovss-ray to read it"
            )
        return _Record.model_validate(content), Manifest.from_json(content["manifest"])
    except (ValueError, KeyError, TypeError) as error:
        raise OvssError(f"{uri}/run.json is damaged ({_first_line(error)}); restore it to read the run") from error


def _explain_missing(fs: fsspec.AbstractFileSystem, root: str, uri: str) -> str:
    """Why `uri` is not a run directory, and which place nearby is meant if any."""
    parent = root.rsplit("/", 1)[0]
    if fs.exists(f"{parent}/run.json"):
        return f"{uri} lies inside a run directory; open {uri.rsplit('/', 1)[0]}"
    if not fs.exists(root):
        return f"there is no run directory {uri}; check the path"
    entries = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(root, detail=False))
    if "manifest" in entries:
        return f"{uri} has no run.json: the planning of the run is not finished; start it again with the same command"
    runs = [entry for entry in entries[:100] if fs.exists(f"{root}/{entry}/run.json")]
    if runs:
        return f"{uri} is not a run directory but holds some; open {' or '.join(f'{uri}/{run}' for run in runs[:3])}"
    return f"{uri} is not a run directory: it has no run.json"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0] or repr(error)
