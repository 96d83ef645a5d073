"""Single rows of a run's shards: where the row of an image lies, and reading it without the rest of the file."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from ovss_ray.errors import DamagedRunError, OvssError, SettingError
from ovss_ray.images.stores import store_failure
from ovss_ray.labels.layout import SHARDS_FOLDER, Manifest, shard_name
from ovss_ray.labels.schema import check_schema
from ovss_ray.labels.shard import MAPS, list_shards


class NotWrittenError(OvssError):
    """A shard that has no file yet."""


class RowReader:
    """Reads rows of the shards of one run.

    Args:
        fs: where the run lies.
        root: the run directory on `fs`.
        uri: the run directory as users write it, for messages.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, root: str, uri: str) -> None:
        self._fs = fs
        self._root = root
        self.uri = uri
        self._retry_parts: dict[str, list[int]] = {}

    def row_of(self, image_id: int, manifest: Manifest, columns: list[str]) -> dict[str, Any]:
        """The row that counts for an image, by the rule of `ShardViews`; columns that its file lacks are left out.

        Reads the footer and one row group of one file; of an image that was labelled again, of one file per attempt.

        Args:
            columns: those to read, image_id and status among them.

        Raises:
            NotWrittenError: no shard with the image is written yet.
            DamagedRunError: its file is damaged, or lacks the image.
        """
        latest_failed: dict[str, Any] | None = None
        for shard in self.retries_of(image_id, manifest):
            try:
                with self.open(shard, manifest) as parquet:
                    row = _read_image(parquet, image_id, columns)
            except NotWrittenError:
                continue
            if row is not None and row["status"] == "ok":
                return row
            latest_failed = latest_failed or row
        try:
            home = self._read_home(image_id, manifest, columns)
        except NotWrittenError:
            if latest_failed is None:
                raise
            return latest_failed
        return home if home["status"] == "ok" or latest_failed is None else latest_failed

    def _read_home(self, image_id: int, manifest: Manifest, columns: list[str]) -> dict[str, Any]:
        shard, position = manifest.home_of(image_id)
        with self.open(shard, manifest) as parquet:
            row = _read_row(parquet, position, columns)
        if row is None or row["image_id"] != image_id:
            raise DamagedRunError(f"{self.uri_of(shard)} lacks image {image_id}; remove the file and continue the run")
        return row

    def retries_of(self, image_id: int, manifest: Manifest) -> Iterator[int]:
        """The shards that may hold the image once more, latest first."""
        for part in reversed(range(len(manifest.parts))):
            if manifest.parts[part].retry:
                firsts = self._first_ids(manifest.parts[part].name)
                group = bisect_right(firsts, image_id) - 1
                if group >= 0:
                    yield manifest.shards_of(part)[group]

    def _first_ids(self, part: str) -> list[int]:
        """The first image of each shard of a part whose images are labelled again; they ascend."""
        if part not in self._retry_parts:
            with self._fs.open(f"{self._root}/{part}", "rb") as file:
                footer = pq.read_metadata(file)
            groups = range(footer.num_row_groups)
            column = footer.schema.names.index("image_id")
            self._retry_parts[part] = [footer.row_group(group).column(column).statistics.min for group in groups]
        return self._retry_parts[part]

    @contextmanager
    def open(self, shard: int, manifest: Manifest) -> Iterator[pq.ParquetFile]:
        """A shard's file, of which is read what is asked for and no more.

        Raises:
            NotWrittenError: there is no file.
            DamagedRunError: it cannot be read.
            OvssError: a newer version of the package wrote it.
        """
        try:
            # Without read-ahead: fetch the footer and the columns that are asked for, not the rest of the file.
            file = self._fs.open(f"{self._root}/{shard_name(shard)}", "rb", cache_type="none")
        except FileNotFoundError:
            raise self._not_written(shard, manifest) from None
        with file:
            try:
                parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
                check_schema(parquet.schema_arrow, "shard", self.uri_of(shard))
                yield parquet
            except (pa.ArrowInvalid, OSError, UnicodeDecodeError) as error:
                if not _tells_damage(error):
                    raise
                raise self.damaged(shard, error) from error

    def _not_written(self, shard: int, manifest: Manifest) -> NotWrittenError:
        done = list_shards(self._fs, f"{self._root}/{SHARDS_FOLDER}")
        if not done:
            return NotWrittenError(nothing_written(self.uri))
        return NotWrittenError(
            f"shard {shard} of {self.uri} is not written yet ({len(done)} of {manifest.shards} are); "
            "continue the run to label its images"
        )

    def damaged(self, shard: int, error: Exception) -> DamagedRunError:
        """What to raise for the file of a shard that cannot be read."""
        return DamagedRunError(f"{self.uri_of(shard)} is damaged ({first_line(error)}); remove it and continue the run")

    def uri_of(self, shard: int) -> str:
        """The file of a shard as users write it."""
        return f"{self.uri}/{shard_name(shard)}"


def nothing_written(uri: str) -> str:
    """What to say of a run without shards."""
    return f"no shard of {uri} is written yet; start or continue the run, or wait for the first"


def first_line(error: Exception) -> str:
    """The beginning of a message that may have many lines."""
    return str(error).partition("\n")[0] or repr(error)


def _read_row(parquet: pq.ParquetFile, position: int, columns: list[str]) -> dict[str, Any] | None:
    """The row at `position` of the file, or None beyond its end; reads its row group only."""
    for group in range(parquet.num_row_groups):
        rows = parquet.metadata.row_group(group).num_rows
        if position < rows:
            row: dict[str, Any] = parquet.read_row_group(group, columns=columns).slice(position, 1).to_pylist()[0]
            return row
        position -= rows
    return None


def _read_image(parquet: pq.ParquetFile, image_id: int, columns: list[str]) -> dict[str, Any] | None:
    """The row of an image in a file sorted by image_id, or None; reads the row groups that may hold it."""
    column = parquet.metadata.schema.names.index("image_id")
    for group in range(parquet.num_row_groups):
        statistics = parquet.metadata.row_group(group).column(column).statistics
        if statistics.min <= image_id <= statistics.max:
            ids = parquet.read_row_group(group, columns=["image_id"])["image_id"]
            position = ids.index(image_id).as_py()
            if position >= 0:
                rows = parquet.read_row_group(group, columns=columns)
                row: dict[str, Any] = rows.slice(position, 1).to_pylist()[0]
                return row
    return None


def _tells_damage(error: Exception) -> bool:
    """Whether it is about the bytes of a Parquet file: PyArrow says so by a plain `OSError` too."""
    if not isinstance(error, OSError):
        return True
    return error.errno is None and not isinstance(error, OvssError) and store_failure(error) == "other"


_SHARD_IN_MESSAGE = re.compile(r"(\d{8})\.parquet")
_SUSPECTS = 1000


def explain_query(rows: RowReader, manifest: Manifest, done: Sequence[int], error: Exception) -> Exception:
    """What users should see of an error that DuckDB met in a query over these shards, at once or while it ran.

    Where the bytes of a shard are at fault, that shard is looked for: the one that the message names, or the first
    that cannot be read.
    """
    if isinstance(error, OvssError):
        return error
    # What DuckDB's own libraries throw at damaged bytes has no class of its own.
    bytes_at_fault = type(error) is duckdb.Error or isinstance(
        error,
        duckdb.IOException | duckdb.InvalidInputException | duckdb.InternalException | pa.ArrowException | OSError,
    )
    if bytes_at_fault:
        named = [int(number) for number in _SHARD_IN_MESSAGE.findall(str(error)) if int(number) in set(done)]
        for shard in named or done[:_SUSPECTS]:
            try:
                with rows.open(shard, manifest) as parquet:
                    parquet.read([name for name in parquet.schema_arrow.names if name not in MAPS])
            except OvssError as damage:
                return damage
    if type(error) is duckdb.Error:
        return DamagedRunError(
            f"a shard of {rows.uri} cannot be read ({first_line(error)}); ovss-ray verify {rows.uri} finds it"
        )
    if isinstance(error, duckdb.Error):
        return SettingError(f"the query cannot be run on {rows.uri}: {first_line(error)}")
    return error
