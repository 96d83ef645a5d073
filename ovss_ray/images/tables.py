"""Files with one row per image, read row by row: text, CSV, TSV, JSON lines and Parquet."""

from __future__ import annotations

import csv
import io
import json
import posixpath
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, count, islice
from typing import Any, Protocol

import fsspec

from ovss_ray.errors import InputError
from ovss_ray.images.stores import is_local, protocol_of

Row = tuple[Any, ...]

_COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
_PARQUET_ROWS, _FEWEST_PARQUET_ROWS = 16_384, 16
_DICTIONARY_PAGE = 2  # a type of page
_PARQUET_BYTES = 128 << 20  # that the rows read together may repeat out of their dictionaries
LONGEST_LINE = 16 << 20
"""Characters of one line of a list, bytes of one row of a Parquet file; a small file may hide a line without end."""

LARGEST_COPY = 16 << 30
"""Bytes of a Parquet file that a web server gives only whole, as a temporary file."""

_ROWS_LOOKED_AT = 1000  # rows of JSON lines that tell which fields there are


class Table(Protocol):
    """Rows of named columns; `rows` may be called once."""

    @property
    def columns(self) -> Sequence[str]:
        """The names, as the file spells them."""

    def rows(self, names: Sequence[str]) -> Iterator[Row]:
        """The values of these columns, row by row; None where a row has none."""

    def other_kind(self, name: str) -> str | None:
        """What a column holds if it is known to be something else than text, else None."""


class _UntypedTable:
    def other_kind(self, _name: str) -> str | None:
        return None


def list_format(path: str) -> str | None:
    """The format of a list by its name (".txt", ".csv", ...; `.csv.gz` is a ".csv"), or None if it is not a list."""
    stem, suffix = posixpath.splitext(path.lower())
    if suffix in _COMPRESSIONS:
        suffix = posixpath.splitext(stem)[1]
    return suffix if suffix in _TEXT_TABLES or suffix == ".parquet" else None


@contextmanager
def open_text_table(
    fs: fsspec.AbstractFileSystem, path: str, source: str, *, kind: str, columns: Sequence[str] | None = None
) -> Iterator[Table]:
    """Open a text, CSV, TSV or JSON lines file, compressed or not, as a table.

    Args:
        fs: the store the file is in.
        path: its path inside that store.
        source: its address, for messages.
        kind: its format, as `list_format` gives it.
        columns: the names of the columns of a CSV file without a header.

    Raises:
        InputError: inside the context: not UTF-8, not of this format.
    """
    # Web servers often know no byte ranges: block_size=0 streams the body instead.
    streamed = {"block_size": 0} if protocol_of(source) in ("http", "https") else {}
    try:
        with (
            fs.open(path, "rb", compression="infer", **streamed) as file,
            _text(_buffered(file), source) as text,
        ):
            lines = _lines(text, source)
            yield _Delimited(lines, ",", columns) if columns is not None else _TEXT_TABLES[kind](lines)
    except (csv.Error, EOFError) as error:
        raise InputError(f"{source} cannot be read as a list: {error}") from error


@contextmanager
def open_parquet(fs: fsspec.AbstractFileSystem, path: str, source: str) -> Iterator[ParquetTable]:
    """Open a Parquet file as a table; only its footer is read until rows are asked for.

    Raises:
        InputError: inside the context: damaged, or not Parquet.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with _seekable(fs, path, source) as (file, by_ranges):
            yield ParquetTable(pq.ParquetFile(file), by_ranges, source, file)
    except pa.ArrowException as error:
        raise InputError(f"{source} cannot be read as Parquet: {error}") from error


def _text(file: io.BufferedReader, source: str) -> io.TextIOWrapper:
    """The file as text; bytes that are not UTF-8 become lone surrogates, as in the names of files.

    Raises:
        InputError: it is no text, or in two bytes a character, as some programs save it.
    """
    start = file.peek(1024)[:1024]
    if start.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in start:
        raise InputError(f"{source} is not UTF-8 text; save the list as UTF-8")
    return io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _lines(text: io.TextIOBase, source: str) -> Iterator[str]:
    for number in count(1):
        line = text.readline(LONGEST_LINE)
        if not line:
            return
        if len(line) == LONGEST_LINE:
            raise InputError(
                f"line {number} of {source} is longer than {LONGEST_LINE} characters; a list has one image a line"
            )
        yield line


def _buffered(file: Any) -> io.BufferedReader:
    """The streams of some drivers lack what a text wrapper asks of a file; all of them can read."""

    class Raw(io.RawIOBase):
        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int:
            data = file.read(len(buffer))
            buffer[: len(data)] = data
            return len(data)

    return io.BufferedReader(Raw(), 1 << 20)


@contextmanager
def _seekable(fs: fsspec.AbstractFileSystem, path: str, source: str) -> Iterator[tuple[Any, bool]]:
    """The file open for random access, and whether that reads byte ranges of it; if not, it is a local copy."""
    if protocol_of(source) not in ("http", "https") or _knows_ranges(fs, path):
        uncached = {} if is_local(source) else {"cache_type": "none"}  # pyarrow asks for just what it needs
        with fs.open(path, "rb", **uncached) as file:
            yield file, True
        return
    with tempfile.TemporaryFile() as copy:
        with fs.open(path, "rb", block_size=0) as file:
            while piece := file.read(1 << 20):
                if copy.tell() + len(piece) > LARGEST_COPY:
                    raise InputError(
                        f"{source} has more than {LARGEST_COPY} bytes, and its server knows no byte ranges; download it"
                    )
                copy.write(piece)
        yield copy, False


def _knows_ranges(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    try:
        with fs.open(path, "rb", cache_type="none") as file:
            file.seek(-1, io.SEEK_END)
            return len(file.read(1)) == 1
    except ValueError:  # what the driver says of a server that answers with the whole file
        return False


class _PlainLines(_UntypedTable):
    columns = ("uri",)

    def __init__(self, lines: Iterator[str]) -> None:
        self._lines = lines

    def rows(self, names: Sequence[str]) -> Iterator[Row]:
        for line in self._lines:
            value = line.strip()
            if value and not value.startswith("#"):
                yield (value,) * len(names)


class _Delimited(_UntypedTable):
    def __init__(self, lines: Iterator[str], delimiter: str = ",", columns: Sequence[str] | None = None) -> None:
        self._reader = csv.reader(lines, delimiter=delimiter)
        self.columns = next(self._reader, []) if columns is None else columns

    def rows(self, names: Sequence[str]) -> Iterator[Row]:
        positions = [self.columns.index(name) for name in names]
        for row in self._reader:
            if row:  # not a blank line
                yield tuple(row[position] if position < len(row) else None for position in positions)


def _tab_separated(lines: Iterator[str]) -> _Delimited:
    return _Delimited(lines, "\t")


def _counted(lines: Iterator[str], table: _JsonLines) -> Iterator[str]:
    for line in lines:
        table.characters += len(line)
        yield line


class _JsonLines(_UntypedTable):
    def __init__(self, lines: Iterator[str]) -> None:
        objects = self._objects(_counted(lines, self))
        self.characters = 0
        first: list[Mapping[str, Any]] = []
        for row in islice(objects, _ROWS_LOOKED_AT):
            first.append(row)
            if self.characters > LONGEST_LINE:  # rows that long show in fewer which fields there are
                break
        self.columns = list(dict.fromkeys(name for row in first for name in row))
        self._rows = chain(first, objects)

    @staticmethod
    def _objects(lines: Iterable[str]) -> Iterator[Mapping[str, Any]]:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                raise InputError(f"line {number} of the list is not JSON ({error}); write one object a line") from error
            if not isinstance(row, Mapping):
                raise InputError(f"line {number} of the list is not a JSON object; write one object a line")
            yield row

    def rows(self, names: Sequence[str]) -> Iterator[Row]:
        return (tuple(map(row.get, names)) for row in self._rows)


class ParquetTable:
    """A Parquet file as a table.

    Attributes:
        file: the open `pyarrow.parquet.ParquetFile`.
        schema: its Arrow schema.
        by_ranges: whether the store gives parts of it; false for a copy of what a simple web server gave.
    """

    def __init__(self, file: Any, by_ranges: bool, source: str, stored: Any) -> None:
        self.file = file
        self.by_ranges = by_ranges
        self.schema = file.schema_arrow
        self._source = source
        self._stored = stored

    @property
    def columns(self) -> Sequence[str]:
        """The names of the top-level columns."""
        names: Sequence[str] = self.schema.names
        return names

    def other_kind(self, name: str) -> str | None:
        """The type of a column that is not text."""
        import pyarrow as pa

        kind = self.schema.field(name).type
        kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        return None if pa.types.is_string(kind) or pa.types.is_large_string(kind) else str(kind)

    def rows(self, names: Sequence[str]) -> Iterator[Row]:
        """The values of these columns as Python objects; nested ones as lists and dicts.

        Raises:
            InputError: a row of more than `LONGEST_LINE` bytes.
        """
        import pyarrow.parquet as pq

        texts = _texts(self.file.schema, names)
        packed = pq.ParquetFile(self._stored, metadata=self.file.metadata, read_dictionary=list(texts))
        for group in range(self.file.num_row_groups):  # over all of them at once, pyarrow keeps what it has read
            rows = self._rows_at_once(group, texts)
            file = self.file if rows else packed
            for batch in file.iter_batches(rows or _PARQUET_ROWS, row_groups=[group], columns=list(names)):
                for piece in self._pieces(batch):
                    by_name = dict(zip(piece.schema.names, piece.columns, strict=True))
                    yield from zip(*(_values(by_name[name]) for name in names), strict=True)

    def _rows_at_once(self, group: int, texts: Mapping[int, Any]) -> int:
        """How many rows of a group can be unpacked together; 0 where only their dictionaries can be.

        One value of a dictionary can stand for any number of rows. That pyarrow leaves the dictionaries as they are is
        the exception: it carries them over from batch to batch of a group, which takes ever longer.
        """
        rows = _PARQUET_ROWS
        chunks = self.file.metadata.row_group(group)
        for index, leaf in texts.items():
            chunk = chunks.column(index)
            if any("DELTA" in encoding for encoding in chunk.encodings):  # where a value may repeat the one before
                return _FEWEST_PARQUET_ROWS
            most_bytes = _dictionary_bytes(self._stored, chunk)
            rows = min(rows, _PARQUET_BYTES // max(most_bytes, 1))
            if most_bytes and (leaf.max_repetition_level or rows < _FEWEST_PARQUET_ROWS):
                return 0
        return rows

    def _pieces(self, batch: Any) -> Iterator[Any]:
        """The batch in parts that take `LONGEST_LINE` bytes at most when they are unpacked."""
        if sum(map(_unpacked_bytes, batch.columns)) <= LONGEST_LINE:
            yield batch
            return
        if batch.num_rows == 1:
            raise InputError(
                f"a row of {self._source} takes more than {LONGEST_LINE} bytes; a list has one image a row, and short "
                "values beside it"
            )
        half = batch.num_rows // 2
        yield from self._pieces(batch.slice(0, half))
        yield from self._pieces(batch.slice(half))


def _texts(schema: Any, names: Sequence[str]) -> dict[int, Any]:
    """The leaves of these columns, by number, whose values may have any length."""
    leaves = ((index, schema.column(index)) for index in range(len(schema)))
    return {
        index: leaf
        for index, leaf in leaves
        if leaf.physical_type == "BYTE_ARRAY"
        and leaf.logical_type.type != "DECIMAL"
        and any(f"{leaf.path}.".startswith(f"{name}.") for name in names)
    }


def _dictionary_bytes(file: Any, chunk: Any) -> int:
    """Bytes of the dictionary of a column chunk, unpacked: as its page says, which the footer does not; 0 without one.

    The header of a page begins with its type and this size, in Thrift's compact form.
    """
    places = [chunk.data_page_offset, chunk.dictionary_page_offset]
    file.seek(min(place for place in places if place))
    header = file.read(16)
    kind, rest = _thrift_number(header)
    return _thrift_number(rest)[0] if kind == _DICTIONARY_PAGE else 0


def _thrift_number(fields: bytes) -> tuple[int, bytes]:
    """The 32-bit number in the first field, and what follows it."""
    number = 0
    for position, byte in enumerate(fields[1:6]):
        number |= (byte & 0x7F) << 7 * position
        if byte < 0x80:
            break
    return number >> 1 ^ -(number & 1), fields[position + 2 :]


def _unpacked_bytes(column: Any) -> int:
    """Bytes of an Arrow array whose dictionaries were written out."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type
    if pa.types.is_dictionary(kind):
        lengths = pc.binary_length(column.dictionary).take(column.indices)
        return int(pc.sum(lengths).as_py() or 0) + int(column.indices.nbytes)
    if pa.types.is_struct(kind):
        return sum(map(_unpacked_bytes, column.flatten()))
    if pa.types.is_map(kind):
        column = column.cast(pa.list_(kind.field(0)))
    if pa.types.is_nested(kind):
        return _unpacked_bytes(column.flatten()) + 4 * len(column)
    return int(column.nbytes)


def _values(column: Any) -> list[Any]:
    """The values of an Arrow array; bytes in texts that are not UTF-8 become lone surrogates."""
    import pyarrow as pa

    column = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        stored = column.cast(pa.large_binary()).to_pylist()
        return [None if value is None else value.decode("utf-8", "surrogateescape") for value in stored]
    return values


_TEXT_TABLES: dict[str, Any] = {
    ".txt": _PlainLines,
    ".csv": _Delimited,
    ".tsv": _tab_separated,
    ".jsonl": _JsonLines,
    ".ndjson": _JsonLines,
}
