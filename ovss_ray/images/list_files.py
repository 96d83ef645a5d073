"""Lists of images kept in a file: text, CSV, TSV, JSON lines and Parquet, read row by row."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, BinaryIO
from urllib.parse import urljoin, urlsplit

import fsspec

from ovss_ray.errors import InputError
from ovss_ray.images.stores import is_local, local_path, protocol_of

URI_COLUMNS = ("uri", "url", "path", "image", "file_name")

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_PARQUET_ROWS = 16_384


def list_format(path: str) -> str | None:
    """The format of a list by its name (".txt", ".csv", ...; `.csv.gz` is a ".csv"), or None if it is not a list."""
    stem, suffix = posixpath.splitext(path.lower())
    if suffix in _COMPRESSIONS:
        suffix = posixpath.splitext(stem)[1]
    return suffix if suffix in _READERS or suffix == ".parquet" else None


def read_list(fs: fsspec.AbstractFileSystem, path: str, source: str, uri_column: str | None = None) -> Iterator[str]:
    """Read the URIs of a list in its order, duplicates and all; memory does not grow with its length.

    Relative names are resolved against the folder of the list. A row without a name is kept as "", so that positions
    in the list stay the ids of the images.

    Args:
        fs: the store the list is in.
        path: its path inside that store.
        source: its URI.
        uri_column: the column that holds the names; otherwise the first of `URI_COLUMNS` that is there.

    Raises:
        InputError: the list cannot be read, or has no such column.
    """
    suffix = list_format(path if is_local(source) else urlsplit(path).path)
    resolve = _resolver(source)
    try:
        if suffix == ".parquet":
            values = _parquet_values(fs, path, source, uri_column)
        else:
            values = _text_values(fs, path, _READERS[suffix or ".txt"], _Column(source, uri_column))
        for value in values:
            yield resolve(value)
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text ({error.reason}); save the list as UTF-8") from error
    except (csv.Error, EOFError) as error:
        raise InputError(f"{source} cannot be read as a list: {error}") from error


def _resolver(source: str) -> Callable[[str], str]:
    """How names in a list become URIs: whole URIs stay, `/` and `~/` begin local paths, others are beside the list."""
    if protocol_of(source) in ("http", "https"):
        return lambda value: urljoin(source, value) if value else value
    local = is_local(source)
    folder = posixpath.dirname(local_path(source) if local else source)
    store, _, inner = folder.partition("://")[2].partition("/")

    def resolve(value: str) -> str:
        if not value:
            return value
        if "://" in value:
            return local_path(value) if is_local(value) else value
        if value.startswith(("/", "~/")):
            return local_path(value)
        if local:
            return local_path(f"{folder}/{value}")
        return f"{protocol_of(source)}://{store}/{posixpath.normpath(posixpath.join(inner, value))}"

    return resolve


class _Column:
    """Which column of a list holds the names; decided once, by the first row."""

    def __init__(self, source: str, wanted: str | None) -> None:
        self._source = source
        self._wanted = wanted

    def find(self, columns: Sequence[str]) -> str:
        if self._wanted is not None and self._wanted in columns:
            return self._wanted
        if self._wanted is None:
            by_lower_case = {column.strip().lower(): column for column in reversed(columns)}
            for name in URI_COLUMNS:
                if name in by_lower_case:
                    return by_lower_case[name]
        looked_for = repr(self._wanted) if self._wanted is not None else " or ".join(URI_COLUMNS)
        there = ", ".join(list(columns)[:20]) or "none"
        raise InputError(
            f"{self._source} has no column {looked_for}; its columns are: {there}; name the right one with uri_column"
        )


_Reader = Callable[[io.TextIOBase, _Column], Iterator[str]]


def _text_values(fs: Any, path: str, reader: _Reader, column: _Column) -> Iterator[str]:
    # Web servers often know no byte ranges: block_size=0 streams the body instead.
    streamed = {"block_size": 0} if protocol_of(path) in ("http", "https") else {}
    with (
        fs.open(path, "rb", compression="infer", **streamed) as file,
        io.TextIOWrapper(_buffered(file), encoding="utf-8-sig", newline="") as lines,
    ):
        yield from reader(lines, column)


def _buffered(file: Any) -> BinaryIO:
    """The streams of some drivers lack what a text wrapper asks of a file; all of them can read."""

    class Raw(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            data = file.read(len(buffer))
            buffer[: len(data)] = data
            return len(data)

    return io.BufferedReader(Raw(), 1 << 20)


def _plain_lines(lines: io.TextIOBase, _: _Column) -> Iterator[str]:
    for line in lines:
        value = line.strip()
        if value and not value.startswith("#"):
            yield value


def _delimited(delimiter: str) -> _Reader:
    def rows(lines: io.TextIOBase, column: _Column) -> Iterator[str]:
        reader = csv.DictReader(lines, delimiter=delimiter)
        name = column.find(reader.fieldnames or ())
        for row in reader:
            yield (row[name] or "").strip()

    return rows


def _json_lines(lines: io.TextIOBase, column: _Column) -> Iterator[str]:
    name: str | None = None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"line {number} of the list is not JSON ({error}); write one object a line") from error
        if not isinstance(row, Mapping):
            raise InputError(f"line {number} of the list is not a JSON object; write one object a line")
        name = name or column.find(list(row))
        value = row.get(name)
        yield value.strip() if isinstance(value, str) else ""


@contextmanager
def _seekable(fs: Any, path: str) -> Iterator[Any]:
    if protocol_of(path) not in ("http", "https"):
        with fs.open(path, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as copy:
        with fs.open(path, "rb", block_size=0) as file:
            shutil.copyfileobj(file, copy)
        yield copy


def _parquet_values(fs: Any, path: str, source: str, uri_column: str | None) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _seekable(fs, path) as file:
            table = pq.ParquetFile(file)
            schema = table.schema_arrow
            name = _Column(source, uri_column).find(schema.names)
            kind = schema.field(name).type
            kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise InputError(
                    f"column {name!r} of {source} holds {kind}, not text; name a column of URIs with uri_column"
                )
            for batch in table.iter_batches(_PARQUET_ROWS, columns=[name]):
                for value in batch.column(0).to_pylist():
                    yield (value or "").strip()
    except pa.ArrowException as error:
        raise InputError(f"{source} cannot be read as Parquet: {error}") from error


_READERS: dict[str, _Reader] = {
    ".txt": _plain_lines,
    ".csv": _delimited(","),
    ".tsv": _delimited("\t"),
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
}
