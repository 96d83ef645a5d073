"""A run's shards as SQL views: DuckDB over the Parquet files, on a local disk or in an object store."""

from __future__ import annotations

import glob
import tempfile
import uuid
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import pyarrow as pa

from ovss_ray.labels.schema import load_schema
from ovss_ray.vocabulary import Vocabulary

BULKY_COLUMNS = ("label_map", "segments")
"""Columns of a shard that the view `images` leaves out."""


def connect(fs: fsspec.AbstractFileSystem, shards: str, vocabulary: Vocabulary) -> duckdb.DuckDBPyConnection:
    """An in-memory DuckDB database with these views; it reads the files anew at each query.

    * `shard_rows`: every column, one row per image;
    * `images`: the same without label map and segments;
    * `segments`: one row per image and class present, with all statistics;
    * `classes`: the vocabulary.

    Args:
        fs: where the run lies.
        shards: folder of the shard files on `fs`; holds one file at least.
    """
    connection = duckdb.connect(
        config={
            # All that is needed is built in; a query must never wait for a download.
            "autoinstall_known_extensions": "false",
            "autoload_known_extensions": "false",
            # A query larger than the memory spills here instead of into the working directory.
            "temp_directory": str(Path(tempfile.gettempdir()) / f"ovss-ray-sql-{uuid.uuid4().hex}"),
        }
    )
    _create_classes(connection, vocabulary)
    connection.execute(f"CREATE VIEW shard_rows AS {_one_row_per_image(_files(connection, fs, shards))}")
    bulky = ", ".join(BULKY_COLUMNS)
    connection.execute(f"CREATE VIEW images AS SELECT * EXCLUDE ({bulky}) FROM shard_rows")
    connection.execute(_create_segments())
    return connection


def _one_row_per_image(files: str) -> str:
    """The only place that says which row counts for an image: each has exactly one, in the shard it belongs to."""
    return f"SELECT * FROM read_parquet({files})"


def _files(connection: duckdb.DuckDBPyConnection, fs: fsspec.AbstractFileSystem, shards: str) -> str:
    """The SQL literal for all shard files; makes `fs` known to DuckDB unless it is the local disk."""
    path = glob.escape(shards)
    if "file" not in _protocols(fs):
        connection.register_filesystem(_ExactReads(fs))
        path = f"{_protocols(fs)[0]}://{path}"
    return "'" + f"{path}/*.parquet".replace("'", "''") + "'"


def _create_classes(connection: duckdb.DuckDBPyConnection, vocabulary: Vocabulary) -> None:
    classes = pa.table(
        {
            "class_id": pa.array([item.id for item in vocabulary.classes], pa.int32()),
            "class_name": pa.array([item.name for item in vocabulary.classes], pa.string()),
            "queries": pa.array([list(item.queries) for item in vocabulary.classes], pa.list_(pa.string())),
            "color": pa.array(["#" + bytes(item.color).hex() for item in vocabulary.classes], pa.string()),
        }
    )
    connection.register("vocabulary_table", classes)
    connection.execute("CREATE TABLE classes AS SELECT * FROM vocabulary_table")
    connection.unregister("vocabulary_table")


def _create_segments() -> str:
    statistics = [field.name for field in load_schema("shard").field("segments").type.value_type]
    own = ", ".join(f"segment.{name} AS {name}" for name in statistics if name != "class_id")
    return f"""
        CREATE VIEW segments AS
        SELECT image_id, uri, segment.class_id AS class_id, class_name, {own}
        FROM (SELECT image_id, uri, unnest(segments) AS segment FROM shard_rows)
        LEFT JOIN classes ON classes.class_id = segment.class_id
    """


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
