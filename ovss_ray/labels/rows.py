"""Single rows of a run's shards: where the row of an image lies, and reading it without the rest of the file."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import duckdb
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from ovss_ray.errors import DamagedRunError, OvssError, SettingError
from ovss_ray.labels.damage import UNREADABLE, check_columns, first_line, image_range, open_part, tells_damage
from ovss_ray.labels.layout import SHARDS_FOLDER, Manifest, shard_name
from ovss_ray.labels.schema import check_schema, load_schema
from ovss_ray.labels.shard import list_shards

FIRST_COLUMNS = [name for name in load_schema("shard").names if name not in ("confidence_map", "components")]
"""Those that shards of all versions have."""


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
            DamagedRunError: its file is damaged, or lacks the image; or a part of the manifest is damaged that may
                list the image once more.
        """
        latest_failed: dict[str, Any] | None = None
        try:
            retries = list(self.retries_of(image_id, manifest))
        except DamagedRunError:
            with suppress(NotWrittenError):
                home = self._read_home(image_id, manifest, columns)
                if home["status"] == "ok":  # only images without labels are labelled again
                    return home
            raise
        for shard in retries:
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
        """The shards that may hold the image once more, latest first.

        Raises:
            DamagedRunError: a part of the manifest that labels images again is missing or damaged.
        """
        for part in reversed(range(len(manifest.parts))):
            if manifest.parts[part].retry:
                firsts = self._first_ids(part, manifest)
                group = bisect_right(firsts, image_id) - 1
                if group >= 0:
                    yield manifest.shards_of(part)[group]

    def _first_ids(self, part: int, manifest: Manifest) -> list[int]:
        """The first image of each shard of a part whose images are labelled again; they ascend."""
        name = manifest.parts[part].name
        if name not in self._retry_parts:
            with open_part(self._fs, self._root, self.uri, name) as parquet:
                firsts = [image_range(parquet.metadata, group)[0] for group in range(parquet.num_row_groups)]
                if len(firsts) != len(manifest.shards_of(part)) or firsts != sorted(firsts):
                    raise pa.ArrowInvalid("it lists other images than were planned")
            self._retry_parts[name] = firsts
        return self._retry_parts[name]

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
        except IsADirectoryError as error:
            raise self.damaged(shard, error) from None
        with file:
            try:
                parquet = pq.ParquetFile(file, pre_buffer=True, page_checksum_verification=True)
                check_schema(parquet.schema_arrow, "shard", self.uri_of(shard))
                check_columns(parquet, FIRST_COLUMNS)
                yield parquet
            except UNREADABLE as error:
                if not tells_damage(error):
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
    for group in range(parquet.num_row_groups):
        lowest, highest = image_range(parquet.metadata, group)
        if lowest <= image_id <= highest:
            ids = parquet.read_row_group(group, columns=["image_id"])["image_id"]
            position = ids.index(image_id).as_py()
            if position >= 0:
                rows = parquet.read_row_group(group, columns=columns)
                row: dict[str, Any] = rows.slice(position, 1).to_pylist()[0]
                return row
    return None


_SHARD_IN_MESSAGE = re.compile(r"(\d{8})\.parquet")
_SUSPECTS = 1000


def explain_query(rows: RowReader, manifest: Manifest, done: Sequence[int], error: Exception) -> Exception:
    """What users should see of an error that DuckDB met in a query over these shards, at once or while it ran.

    Where the bytes of a shard may be at fault, that shard is looked for: the one that the message names, or, where it
    names none and is about bytes and nothing else, the first that cannot be read.
    """
    if isinstance(error, OvssError):
        return error
    # What DuckDB's own libraries throw at damaged bytes has no class of its own, and has none of DuckDB in a stream.
    of_bytes = type(error) is duckdb.Error or isinstance(error, OSError | pa.ArrowException)
    named = [int(number) for number in _SHARD_IN_MESSAGE.findall(str(error))]
    written = set(done)
    suspects = [shard for shard in named if shard in written] or (done[:_SUSPECTS] if of_bytes else [])
    if of_bytes or isinstance(error, duckdb.IOException | duckdb.InvalidInputException | duckdb.InternalException):
        try:
            for shard in suspects:
                _read_all(rows, shard, manifest)
        except (OvssError, OSError) as found:
            return found
    if type(error) is duckdb.Error:
        return DamagedRunError(
            f"a shard of {rows.uri} cannot be read ({first_line(error)}); ovss-ray verify {rows.uri} finds it"
        )
    if isinstance(error, duckdb.Error):
        return SettingError(f"the query cannot be run on {rows.uri}: {first_line(error)}")
    return error


def _read_all(rows: RowReader, shard: int, manifest: Manifest) -> None:
    """Read every byte of a shard, a row group at a time; raises what `RowReader.open` does."""
    with rows.open(shard, manifest) as parquet:
        for group in range(parquet.num_row_groups):
            parquet.read_row_group(group)
