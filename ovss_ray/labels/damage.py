"""What errors tell damage of a run's files, and the files of its manifest, opened so that they name the file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from ovss_ray.errors import DamagedRunError, OvssError
from ovss_ray.images.stores import store_failure

UNREADABLE = (pa.ArrowException, OSError, UnicodeDecodeError)
"""What PyArrow raises at damaged bytes; see `tells_damage`."""


def tells_damage(error: Exception) -> bool:
    """Whether one of `UNREADABLE` is about the bytes of a Parquet file: PyArrow says so by a plain `OSError` too."""
    if isinstance(error, pa.ArrowMemoryError | pa.ArrowCancelled | OvssError):
        return False
    if not isinstance(error, OSError) or isinstance(error, IsADirectoryError):
        return True
    return error.errno is None and store_failure(error) == "other"


def first_line(error: Exception) -> str:
    """The beginning of a message that may have many lines."""
    return str(error).partition("\n")[0] or repr(error)


def check_columns(parquet: pq.ParquetFile, names: Sequence[str]) -> None:
    """Raise `pa.ArrowInvalid` where a file lacks a column: a footer that was changed in one bit may still be read."""
    for name in names:
        if name not in parquet.schema_arrow.names:
            raise pa.ArrowInvalid(f"it has no column {name}")


def image_range(metadata: pq.FileMetaData, group: int) -> tuple[int, int]:
    """The lowest and the highest image_id of a row group, by its statistics; raises `pa.ArrowInvalid` without them."""
    column = metadata.row_group(group).column(metadata.schema.names.index("image_id"))
    statistics = column.statistics
    if statistics is None or not isinstance(statistics.min, int) or not isinstance(statistics.max, int):
        raise pa.ArrowInvalid("it does not say which images it holds")
    return statistics.min, statistics.max


@contextmanager
def open_part(fs: fsspec.AbstractFileSystem, root: str, uri: str, part: str) -> Iterator[pq.ParquetFile]:
    """One file of the manifest, of which is read what is asked for and no more.

    Args:
        fs: where the run lies.
        root: the run directory on `fs`.
        uri: the run directory as users write it, for messages.
        part: its name inside the run directory.

    Raises:
        DamagedRunError: it is missing or cannot be read, then or within the context.
    """
    try:
        with fs.open(f"{root}/{part}", "rb", cache_type="none") as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            check_columns(parquet, ["image_id", "uri"])
            yield parquet
    except FileNotFoundError:
        raise DamagedRunError(f"{uri}/{part} is missing; restore it to read the run") from None
    except UNREADABLE as error:
        if not tells_damage(error):
            raise
        raise DamagedRunError(f"{uri}/{part} is damaged ({first_line(error)}); restore it to read the run") from error
