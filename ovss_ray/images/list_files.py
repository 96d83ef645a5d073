"""Lists of images kept in a file: which columns say where an image is, and what else is known about it."""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urljoin

from ovss_ray.errors import InputError
from ovss_ray.images.addresses import LONGEST_ADDRESS, storable
from ovss_ray.images.kept_columns import check_columns, to_json
from ovss_ray.images.references import ImageRef, Wanted
from ovss_ray.images.stores import is_local, local_path, protocol_of
from ovss_ray.images.tables import Table
from ovss_ray.images.versions import bare_etag
from ovss_ray.naming import setting_name

URI_COLUMNS = ("uri", "url", "path", "image", "file_name")
_SIZE_COLUMNS = ("size_bytes", "size")
_ETAG_COLUMNS = ("etag", "e_tag")


@dataclass(frozen=True)
class ListColumns:
    """The columns of a list that are read.

    Attributes:
        place: the column of URIs, or the columns of bucket and key.
        size: the column with the size in bytes, if there is one.
        etag: the column with the store's ETag, if there is one.
        keep: columns that go into `ImageRef.extra`.
    """

    place: tuple[str, ...]
    size: str | None
    etag: str | None
    keep: tuple[str, ...]

    @property
    def is_inventory(self) -> bool:
        """Whether the rows are all objects of a bucket and not images that somebody chose."""
        return len(self.place) == 2


def find_columns(columns: Sequence[str], source: str, wanted: Wanted) -> ListColumns:
    """Choose the columns of a list by their names, in any case of letters.

    Raises:
        InputError: no column of URIs, or a column to keep that is not there.
    """
    by_lower_case = {column.strip().lower(): column for column in reversed(columns)}

    def first(names: Sequence[str]) -> str | None:
        return next((by_lower_case[name] for name in names if name in by_lower_case), None)

    place: tuple[str | None, ...]
    if wanted.uri_column is not None:
        place = (wanted.uri_column if wanted.uri_column in columns else None,)
    elif (uri := first(URI_COLUMNS)) is not None or not {"bucket", "key"} <= by_lower_case.keys():
        place = (uri,)
    else:
        place = (by_lower_case["bucket"], by_lower_case["key"])
    if None in place:
        looked_for = repr(wanted.uri_column) if wanted.uri_column is not None else " or ".join(URI_COLUMNS)
        there = ", ".join(list(columns)[:20]) or "none"
        raise InputError(
            f"{source} has no column {looked_for}; its columns are: {there}; name the right one with "
            f"{setting_name('uri_column')}"
        )
    check_columns(wanted.keep_columns, columns, source)
    return ListColumns(tuple(map(str, place)), first(_SIZE_COLUMNS), first(_ETAG_COLUMNS), wanted.keep_columns)


def read_rows(table: Table, columns: ListColumns, source: str) -> Iterator[ImageRef]:
    """The images of a list in its order, duplicates and all; memory does not grow with its length.

    Relative names are resolved against the folder of the list. A row without a name is kept as "", so that positions
    in the list stay the ids of the images; of a name that no address could be made of, only the beginning is.

    Args:
        source: the URI of the list.

    Raises:
        InputError: the column of names is not text, or a value to keep that JSON does not hold.
    """
    for name in columns.place:
        if (kind := table.other_kind(name)) is not None:
            raise InputError(
                f"column {name!r} of {source} holds {kind}, not text; name a column of URIs with "
                f"{setting_name('uri_column')}"
            )
    resolve = _bucket_resolver(source) if columns.is_inventory else resolver(source)
    told = [name for name in (columns.size, columns.etag) if name is not None]
    places = len(columns.place)
    for row in table.rows([*columns.place, *told, *columns.keep]):
        place = [value.strip() if isinstance(value, str) else "" for value in row[:places]]
        facts: dict[str | None, Any] = dict(zip(told, row[places:], strict=False))
        extra = to_json(columns.keep, row[places + len(told) :], source) if columns.keep else None
        too_long = next((value[: LONGEST_ADDRESS + 1] for value in place if len(value) > LONGEST_ADDRESS), None)
        uri = resolve(*place) if too_long is None else too_long
        yield ImageRef(uri, _count(facts.get(columns.size)), _etag(facts.get(columns.etag)), None, extra)


def resolver(source: str) -> Callable[[str], str]:
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


def _bucket_resolver(source: str) -> Callable[[str, str], str]:
    protocol = "s3" if protocol_of(source) in ("file", "local", "http", "https") else protocol_of(source)
    return lambda bucket, key: f"{protocol}://{bucket}/{key}" if bucket and key else ""


def _count(value: Any) -> int | None:
    """A size as it stands in lists: a number, or its digits."""
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() else None
    return value if isinstance(value, int) and value >= 0 else None


def _etag(value: Any) -> str | None:
    return bare_etag(storable(value.strip())) if isinstance(value, str) else None
