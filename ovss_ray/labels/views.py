"""A run's shards as SQL views: DuckDB over the Parquet files, on a local disk or in an object store."""

from __future__ import annotations

import glob
import tempfile
import uuid
from collections.abc import Iterator, Sequence, Set
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pyarrow as pa

from ovss_ray.images.addresses import storable
from ovss_ray.labels.classes import classes_table
from ovss_ray.labels.layout import Manifest
from ovss_ray.labels.schema import load_schema
from ovss_ray.vocabulary import Vocabulary

BULKY_COLUMNS = ("label_map", "segments", "confidence_map", "components")
"""Columns of a shard that the view `images` leaves out."""


_SHARD = "try_cast(parse_filename(filename, true) AS INTEGER)"


class ShardViews:
    """An in-memory DuckDB database over the shards of a run, which reads the files anew at each query.

    Views:

    * `shard_rows`: every column, one row per image;
    * `images`: the same without `BULKY_COLUMNS`;
    * `segments`: one row per image and class present, with all statistics;
    * `components`: one row per connected component, if the run describes them;
    * `classes`: the vocabulary; the table of `schemas/classes.yaml`, its id and name as class_id and class_name.

    Of an image that was labelled again the row with labels counts, of several (or none) that of the latest shard.

    Args:
        fs: where the run lies.
        shards: folder of the shard files on `fs`; holds one file at least.
        vocabulary: the classes.
        columns: that all shards have; older versions wrote fewer, and nothing stands in their place.
    """

    def __init__(
        self, fs: fsspec.AbstractFileSystem, shards: str, vocabulary: Vocabulary, columns: Sequence[str]
    ) -> None:
        self.connection = duckdb.connect(
            config={
                # All that is needed is built in; a query must never wait for a download.
                "autoinstall_known_extensions": "false",
                "autoload_known_extensions": "false",
                # A query larger than the memory spills here instead of into the working directory.
                "temp_directory": str(Path(tempfile.gettempdir()) / f"ovss-ray-sql-{uuid.uuid4().hex}"),
            }
        )
        self._folder = glob.escape(shards)
        if shards != storable(shards):
            self.connection.register_filesystem(_OddFolder(fs, shards))
            self._folder = f"{_OddFolder.PROTOCOL}://shards"
        elif "file" not in _protocols(fs):
            self.connection.register_filesystem(_ExactReads(fs))
            self._folder = f"{_protocols(fs)[0]}://{self._folder}"
        self._retried: tuple[int, ...] = ()
        # Named one by one: of files with different columns, `*` would mean those of the first.
        self._columns = ", ".join(
            name if name in columns else f"NULL::{_duckdb_type(name)} AS {name}" for name in load_schema("shard").names
        )
        _create_classes(self.connection, vocabulary)
        self._create_shard_rows()
        bulky = ", ".join(BULKY_COLUMNS)
        self.connection.execute(f"CREATE VIEW images AS SELECT * EXCLUDE ({bulky}) FROM shard_rows")
        self.connection.execute(_create_view("segments"))
        self.connection.execute(_create_view("components", "height, width, "))

    def update(self, manifest: Manifest, done: Sequence[int]) -> None:
        """Take account of the shards that are written: costs nothing unless one of them labels images again.

        Then it reads the image ids and statuses of those shards, and of the shards in which their images failed first.
        """
        written = set(done)
        retried = tuple(shard for shards in manifest.retry_shards for shard in shards if shard in written)
        if retried != self._retried:
            self._find_superseded(manifest, retried, written)
            self._retried = retried
            self._create_shard_rows()

    def superseded(self) -> dict[int, set[int]]:
        """By shard, the images whose row there does not count."""
        found: dict[int, set[int]] = {}
        if self._retried:
            for image_id, shard in self.connection.execute("SELECT image_id, shard FROM superseded").fetchall():
                found.setdefault(shard, set()).add(image_id)
        return found

    def _create_shard_rows(self) -> None:
        """The only place that says which row counts for an image."""
        files = _literal(f"{self._folder}/{'[0-9]' * 8}.parquet")  # not a copy that somebody left there
        rows = f"SELECT {self._columns} FROM read_parquet({files})"
        if self._retried:
            # An anti join with a small table, not a window over all rows: label maps stay where they are.
            rows = f"""
                SELECT {self._columns} FROM read_parquet({files}, filename = true) AS stored
                ANTI JOIN superseded ON superseded.image_id = stored.image_id AND superseded.shard = {_SHARD}
            """
        self.connection.execute(f"CREATE OR REPLACE VIEW shard_rows AS {rows}")

    def _find_superseded(self, manifest: Manifest, retried: Sequence[int], written: Set[int]) -> None:
        """Write the table `superseded` (image_id, shard): the rows that do not count."""
        execute = self.connection.execute
        execute(f"CREATE OR REPLACE TEMP TABLE outcomes AS SELECT image_id, shard, ok FROM {self._outcomes(retried)}")
        again = execute("SELECT image_id, bool_or(ok) FROM outcomes GROUP BY image_id").fetchall()
        # Where labels came later it does not matter what the first row says: its shard need not be read.
        labelled = [image_id for image_id, ok in again if ok]
        unsure = [image_id for image_id, ok in again if not ok]
        with self._table("first_rows", image_id=labelled, shard=[manifest.home_of(item)[0] for item in labelled]):
            execute("INSERT INTO outcomes SELECT image_id, shard, false FROM first_rows")
        to_read = sorted({manifest.home_of(item)[0] for item in unsure} & written)
        if to_read:
            with self._table("unsure", image_id=unsure):
                execute(
                    "INSERT INTO outcomes SELECT image_id, shard, ok "
                    f"FROM {self._outcomes(to_read)} SEMI JOIN unsure USING (image_id)"
                )
        execute(
            "CREATE OR REPLACE TABLE superseded AS SELECT image_id, shard FROM outcomes "
            "QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY ok DESC, shard DESC) > 1"
        )
        execute("DROP TABLE outcomes")

    @contextmanager
    def _table(self, name: str, **columns: list[int]) -> Iterator[None]:
        self.connection.register(name, pa.table({key: pa.array(values, pa.int64()) for key, values in columns.items()}))
        yield
        self.connection.unregister(name)

    def _outcomes(self, shards: Sequence[int]) -> str:
        files = ", ".join(_literal(f"{self._folder}/{shard:08d}.parquet") for shard in shards)
        return (
            f"(SELECT image_id, {_SHARD} AS shard, status = 'ok' AS ok FROM read_parquet([{files}], filename = true))"
        )


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _create_classes(connection: duckdb.DuckDBPyConnection, vocabulary: Vocabulary) -> None:
    connection.register("vocabulary_table", classes_table(vocabulary))
    connection.execute(
        "CREATE TABLE classes AS SELECT id AS class_id, name AS class_name, * EXCLUDE (id, name) FROM vocabulary_table"
    )
    connection.unregister("vocabulary_table")


def _create_view(column: str, of_image: str = "") -> str:
    """A view with one row per element of a list column, and more about its image."""
    fields = [field.name for field in load_schema("shard").field(column).type.value_type]
    own = ", ".join(f"item.{name} AS {name}" for name in fields if name != "class_id")
    return f"""
        CREATE VIEW {column} AS
        SELECT image_id, uri, {of_image}item.class_id AS class_id, class_name, {own}
        FROM (SELECT image_id, uri, {of_image}unnest({column}) AS item FROM shard_rows)
        LEFT JOIN classes ON classes.class_id = item.class_id
    """


def _duckdb_type(column: str) -> str:
    """What DuckDB calls the type of a column of the shards."""
    empty = load_schema("shard").empty_table().select([column])
    with duckdb.connect() as connection:
        connection.register("empty", empty)
        return str(connection.sql("SELECT * FROM empty").types[0])


def _protocols(fs: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)


class _ExactReads(fsspec.AbstractFileSystem):  # type: ignore[misc]
    """Another file system, read-only, whose files fetch exactly the ranges that are asked for.

    The read-ahead of fsspec's files would download the label maps with every query over the statistics.
    """

    cachable = False

    def __init__(self, fs: fsspec.AbstractFileSystem) -> None:
        super().__init__()
        self.protocol = fs.protocol
        self._fs = fs

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return self._fs.open(path, mode, cache_type="none")

    def glob(self, path: str, **options: Any) -> Any:
        return self._fs.glob(path, **options)

    def info(self, path: str, **options: Any) -> Any:
        return self._fs.info(path, **options)

    def ls(self, path: str, detail: bool = True, **options: Any) -> Any:
        return self._fs.ls(path, detail, **options)

    def modified(self, path: str) -> Any:
        return self._fs.modified(path)


class _OddFolder(_ExactReads):
    """The files of one local folder whose name is not UTF-8: under another name, because DuckDB takes text only."""

    PROTOCOL = "odd"

    def __init__(self, fs: fsspec.AbstractFileSystem, folder: str) -> None:
        super().__init__(fs)
        self.protocol = self.PROTOCOL
        self._folder = folder

    def open(self, path: str, mode: str = "rb", **_: Any) -> Any:
        return self._fs.open(self._real(path), mode)

    def glob(self, path: str, **options: Any) -> Any:
        found = self._fs.glob(f"{glob.escape(self._folder)}/{_name(path)}", **options)
        return [f"shards/{_name(file)}" for file in found]

    def info(self, path: str, **options: Any) -> Any:
        return {**self._fs.info(self._real(path), **options), "name": path}

    def modified(self, path: str) -> Any:
        return self._fs.modified(self._real(path))

    def _real(self, path: str) -> str:
        return f"{self._folder}/{_name(path)}"


def _name(path: str) -> str:
    return path.rpartition("/")[2]
