"""Images whose bytes are cells of a Parquet file: the layout of Hugging Face datasets, and plain binary columns."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ovss_ray.errors import InputError, nearest
from ovss_ray.images.kept_columns import check_columns, to_json
from ovss_ray.images.members import parquet_uri
from ovss_ray.images.references import ImageRef, Wanted
from ovss_ray.images.tables import ParquetTable
from ovss_ray.naming import setting_name

# Names that binary columns with images have, the likeliest first.
IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "img", "bytes", "image_bytes")


def find_image_column(schema: Any, source: str, wanted: Wanted) -> str | None:
    """The column of a Parquet file that holds the bytes of images; None if it is a list of addresses or holds no image.

    Without `image_column`, it is a binary or struct<bytes, path> column of a usual name, else the only column of
    that struct. Bytes go before addresses: many data sets keep the URL that an image once came from. `uri_column`
    asks for the addresses.

    Args:
        schema: its Arrow schema.
        source: its address, for messages.

    Raises:
        InputError: `image_column` is missing or holds something else, or several columns hold images.
    """
    if wanted.image_column is not None:
        return _checked(wanted.image_column, schema, source)
    if wanted.uri_column is not None:
        return None
    by_lower_case: dict[str, str] = {name.lower(): name for name in reversed(schema.names)}
    for usual in IMAGE_COLUMNS:
        name = by_lower_case.get(usual)
        if name is not None and _holds_images(schema.field(name).type):
            return name
    structs: list[str] = [field.name for field in schema if _is_image_struct(field.type)]
    if len(structs) > 1:
        raise InputError(
            f"{source} has several columns of images: {', '.join(structs)}; name one with "
            f"{setting_name('image_column')}"
        )
    return structs[0] if structs else None


def row_images(table: ParquetTable, column: str, source: str, etag: str | None, wanted: Wanted) -> Iterator[ImageRef]:
    """One image per row, in the order of the file; no image is read.

    Args:
        column: as `find_image_column` gives it.
        source: the address of the file.
        etag: the store's mark of the file's content.
    """
    names = wanted.keep_columns
    rows = range(table.file.metadata.num_rows)
    if not names:
        yield from (ImageRef(parquet_uri(column, row, source), None, etag, row) for row in rows)
        return
    check_columns(names, [name for name in table.columns if name != column], source)
    for row, values in zip(rows, table.rows(names), strict=True):
        yield ImageRef(parquet_uri(column, row, source), None, etag, row, to_json(names, values, source))


def _checked(name: str, schema: Any, source: str) -> str:
    if name not in schema.names:
        hint = nearest(name, schema.names) or f"; its columns are: {', '.join(schema.names[:20])}"
        raise InputError(f"{source} has no column {name!r}{hint}")
    kind = schema.field(name).type
    if not _holds_images(kind):
        raise InputError(
            f"column {name!r} of {source} holds {kind}, not the bytes of images (binary, or struct<bytes, path>); "
            f"name another with {setting_name('image_column')}, or a column of addresses with "
            f"{setting_name('uri_column')}"
        )
    return name


def _holds_images(kind: Any) -> bool:
    return _is_binary(kind) or _is_image_struct(kind)


def _is_image_struct(kind: Any) -> bool:
    import pyarrow as pa

    if not pa.types.is_struct(kind):
        return False
    names = [kind.field(index).name for index in range(kind.num_fields)]
    return set(names) in ({"bytes"}, {"bytes", "path"}) and _is_binary(kind.field("bytes").type)


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))
