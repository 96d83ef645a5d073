"""Images out of Parquet files, a row group at a time: the group is read once and kept for its neighbours."""

from __future__ import annotations

import io
import threading
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from itertools import accumulate, islice
from typing import Any, NamedTuple

from ovss_ray.errors import ImageError

KEPT_BYTES = 512 << 20
_FOOTER_BYTES = 1 << 20  # what a footer in memory is reckoned at
_BUFFER_BYTES = 8 << 20  # read at a time of a group that is not read at once


class Cell(NamedTuple):
    """An image in a Parquet file: its bytes, or the path that the row names instead, or neither."""

    data: bytes | None
    path: str | None


class RowGroups:
    """Reads cells; one instance serves many threads, and threads that want the same rows wait for one read.

    What is read together is a row group, or of a group that would take more than `kept_bytes` a part of its rows: then
    the rows before are decoded and dropped.

    Args:
        open_file: how to open the planned version of a Parquet file for random access, by its address and mark.
        max_bytes: larger cells are `too_large`.
        kept_bytes: rows and footers that are kept, the latest used; what is read together is always allowed.
    """

    def __init__(
        self,
        open_file: Callable[[str, str | None], Callable[[], Any]],
        *,
        max_bytes: int,
        kept_bytes: int = KEPT_BYTES,
    ) -> None:
        self._open_file = open_file
        self._max_bytes = max_bytes
        self._kept_bytes = kept_bytes
        self._kept = _SharedReads(kept_bytes)

    def cell(self, file: str, column: str, row: int, etag: str | None = None) -> Cell:
        """The image in a row, counted from 0.

        Args:
            etag: the version of the file that was planned, see `Version.mark`.

        Raises:
            ImageError: `not_found`, if the file has no such row or column (any more); `corrupt`, if it is damaged;
                `too_large`; `fetch_failed`, if it is not what was planned.
            OSError: and whatever else the store raises.
        """
        import pyarrow as pa

        try:
            opened: _OpenedFile = self._kept.get(
                (file, etag), _FOOTER_BYTES, lambda: (_opened(self._open_file(file, etag)), _FOOTER_BYTES)
            )
            if not 0 <= row < opened.starts[-1] or column not in opened.columns:
                raise ImageError("not_found", f"the Parquet file has no row {row} in a column {column!r} (any more)")
            group = bisect_right(opened.starts, row) - 1
            rows = self._rows_together(opened, column, group)
            part, position = divmod(row - opened.starts[group], rows)
            cells = self._kept.get(
                (file, etag, column, group, part),
                _reading_bytes(opened, column, group, rows),
                lambda: self._read(opened, column, group, part * rows, rows),
            )
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ImageError("corrupt", f"the Parquet file cannot be read: {error}") from error
        cell: Cell | int = cells[position]
        if isinstance(cell, int):
            raise ImageError("too_large", f"{cell} bytes, over the limit of {self._max_bytes} bytes")
        return cell

    def _rows_together(self, opened: _OpenedFile, column: str, group: int) -> int:
        count: int = opened.footer.row_group(group).num_rows
        return max(-(-count // -(-_size_of(opened, column, group) // self._kept_bytes)), 1)

    def _read(self, opened: _OpenedFile, column: str, group: int, first: int, count: int) -> tuple[list[Any], int]:
        """So many cells from a row of a group on; those over the limit as their size. Also what they take together."""
        import pyarrow.parquet as pq

        cells: list[Cell | int] = []
        held = 0
        with opened.open() as source:
            at_once = _size_of(opened, column, group) <= self._kept_bytes
            table = pq.ParquetFile(
                source, metadata=opened.footer, pre_buffer=at_once, buffer_size=0 if at_once else _BUFFER_BYTES
            )
            # Row by row: a small dictionary page can stand for any number of large values.
            rows = table.iter_batches(1, row_groups=[group], columns=[column], use_threads=False)
            for row in islice(rows, first, first + count):
                size_bytes = row.nbytes
                if size_bytes > self._max_bytes:
                    cells.append(size_bytes)
                    continue
                value = row.column(0)[0].as_py()
                cells.append(Cell(value["bytes"], value.get("path")) if isinstance(value, dict) else Cell(value, None))
                held += size_bytes
                if held > 2 * self._kept_bytes + self._max_bytes:
                    raise ImageError(
                        "too_large", f"the row group of the Parquet file unpacks to more than {held} bytes"
                    )
        return cells, held


class _OpenedFile(NamedTuple):
    open: Callable[[], Any]
    footer: Any
    columns: frozenset[str]
    starts: list[int]  # the first row of each row group, and the number of rows


def _opened(open_file: Callable[[], Any]) -> _OpenedFile:
    import pyarrow.parquet as pq

    with open_file() as source:
        footer = pq.read_metadata(source)
    rows = (footer.row_group(group).num_rows for group in range(footer.num_row_groups))
    columns = frozenset(footer.schema.to_arrow_schema().names)
    return _OpenedFile(open_file, footer, columns, list(accumulate(rows, initial=0)))


def _size_of(opened: _OpenedFile, column: str, group: int) -> int:
    """Bytes of a column of a group, packed or not, whichever is more; 1 at least."""
    chunks = opened.footer.row_group(group)
    leaves = (chunks.column(index) for index in range(chunks.num_columns))
    own = [leaf for leaf in leaves if f"{leaf.path_in_schema}.".startswith(f"{column}.")]
    return sum(max(leaf.total_compressed_size, leaf.total_uncompressed_size) for leaf in own) or 1


def _reading_bytes(opened: _OpenedFile, column: str, group: int, rows: int) -> int:
    """What reading so many rows of a group takes, as far as the footer tells: the file's bytes, and those of cells."""
    count: int = opened.footer.row_group(group).num_rows
    return 2 * _size_of(opened, column, group) * min(rows, count) // max(count, 1)


class _SharedReads:
    """Values by key, each read once by the first thread that asks; the longest unused go when there are too many.

    Reads that would take more than `kept_bytes` together wait for each other.
    """

    def __init__(self, kept_bytes: int) -> None:
        self._kept_bytes = kept_bytes
        self._lock = threading.Lock()
        self._futures: OrderedDict[Hashable, Future[Any]] = OrderedDict()
        self._sizes: dict[Hashable, int] = {}
        self._read_ended = threading.Condition(self._lock)
        self._reading_bytes = 0

    def get(self, key: Hashable, takes_bytes: int, read: Callable[[], tuple[Any, int]]) -> Any:
        """The value of a key; a failed read is not remembered.

        Args:
            key: its name.
            takes_bytes: what reading it is estimated to take.
            read: returns the value with its size in bytes.
        """
        with self._lock:
            future = self._futures.get(key)
            reads = future is None
            if future is None:
                future = self._futures[key] = Future()
            self._futures.move_to_end(key)
        if reads:
            try:
                with self._admitted(takes_bytes):
                    value, size_bytes = read()
            except BaseException as error:
                with self._lock:
                    del self._futures[key]
                future.set_exception(error)
                raise
            future.set_result(value)
            with self._lock:
                self._sizes[key] = size_bytes
                self._forget_the_oldest(key)
        return future.result()

    @contextmanager
    def _admitted(self, takes_bytes: int) -> Iterator[None]:
        """Wait until there is room, or nothing else is being read."""
        with self._lock:
            while self._reading_bytes and self._reading_bytes + takes_bytes > self._kept_bytes:
                self._read_ended.wait()
            self._reading_bytes += takes_bytes
        try:
            yield
        finally:
            with self._lock:
                self._reading_bytes -= takes_bytes
                self._read_ended.notify_all()

    def _forget_the_oldest(self, latest: Hashable) -> None:
        total = sum(self._sizes.values())
        for key in [key for key in self._futures if key in self._sizes and key != latest]:
            if total <= self._kept_bytes:
                return
            total -= self._sizes.pop(key)
            del self._futures[key]


class RangeFile(io.RawIOBase):
    """A file that is read by byte ranges, each of them one call.

    Args:
        read_range: the bytes from a start up to an end, both inside the file.
        size_bytes: the length of the file.
    """

    def __init__(self, read_range: Callable[[int, int], bytes], size_bytes: int) -> None:
        self._read_range = read_range
        self._size_bytes = size_bytes
        self._position = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, as in any file."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size_bytes}[whence]
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        """The position."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """Read from the position on; fewer bytes only at the end."""
        end = self._size_bytes if size < 0 else min(self._position + size, self._size_bytes)
        if end <= self._position:
            return b""
        data = self._read_range(self._position, end)
        self._position += len(data)
        return data
