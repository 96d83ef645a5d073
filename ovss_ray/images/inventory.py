"""S3 Inventory: the listing of a bucket that S3 itself writes, daily or weekly, as CSV or Parquet files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_plus

import fsspec

from ovss_ray.errors import InputError
from ovss_ray.images.stores import protocol_of
from ovss_ray.images.tables import Row, Table, open_parquet, open_text_table


@dataclass(frozen=True)
class Inventory:
    """The `manifest.json` of one inventory.

    Attributes:
        format: "CSV" or "Parquet".
        columns: of the CSV files, which have no header.
        files: their addresses, in the order of the manifest.
    """

    format: str
    columns: tuple[str, ...]
    files: tuple[str, ...]


LARGEST_MANIFEST = 64 << 20
"""Bytes of a manifest: of an inventory of a hundred billion objects it has about ten million."""


def read_inventory(fs: fsspec.AbstractFileSystem, path: str, source: str) -> Inventory:
    """Read the manifest of an inventory from a store; raises as `parse_inventory`, for one that is too long too."""
    streamed = {"block_size": 0} if protocol_of(source) in ("http", "https") else {}
    pieces: list[bytes] = []
    with fs.open(path, "rb", **streamed) as file:
        while piece := file.read(1 << 20):
            pieces.append(piece)
            if sum(map(len, pieces)) > LARGEST_MANIFEST:
                raise InputError(f"{source} has more than {LARGEST_MANIFEST} bytes and is no manifest of an inventory")
    return parse_inventory(b"".join(pieces), source)


def parse_inventory(data: bytes, source: str) -> Inventory:
    """Read the manifest of an inventory.

    Args:
        data: its content.
        source: its address, for messages.

    Raises:
        InputError: not such a manifest, or an inventory in ORC.
    """
    try:
        manifest = json.loads(data)
        kind = str(manifest["fileFormat"])
        bucket = str(manifest["destinationBucket"]).rpartition(":")[2]  # arn:aws:s3:::bucket
        files = tuple(f"s3://{bucket}/{file['key']}" for file in manifest["files"])
        columns = tuple(name.strip() for name in str(manifest["fileSchema"]).split(","))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
            raise InputError(f"{source} holds several JSON documents; name a list with one a line .jsonl") from None
        raise InputError(
            f"{source} is not the manifest.json of an S3 Inventory ({type(error).__name__}: {error}); "
            "lists of images are .txt, .csv, .tsv, .jsonl or .parquet files"
        ) from error
    if kind not in ("CSV", "Parquet"):
        raise InputError(f"{source} is an inventory in {kind}; configure the inventory as Parquet or CSV")
    return Inventory(kind, columns, files)


def open_inventory_file(
    fs: fsspec.AbstractFileSystem, path: str, source: str, inventory: Inventory
) -> AbstractContextManager[Table]:
    """Open one of the files of an inventory as a table of objects; see `current_objects`."""
    if inventory.format == "Parquet":
        return open_parquet(fs, path, source)
    return open_text_table(fs, path, source, kind=".csv", columns=inventory.columns)


class CurrentObjects:
    """The rows of an inventory that stand for objects: of versioned buckets, only the latest that is not deleted.

    Args:
        table: an open file of the inventory.
        inventory: what it belongs to.
    """

    def __init__(self, table: Table, inventory: Inventory) -> None:
        self._table = table
        self._encoded = inventory.format == "CSV"
        self.columns = table.columns

    def other_kind(self, name: str) -> str | None:
        """What a column holds if it is not text."""
        return self._table.other_kind(name)

    def rows(self, names: Sequence[str]) -> Iterator[Row]:
        """The values of these columns; keys as they are, not URL-encoded."""
        by_name = {_bare(column): column for column in self.columns}
        marks = [by_name.get("islatest"), by_name.get("isdeletemarker")]
        asked = [column for column in marks if column is not None]
        keys = [position for position, name in enumerate(names) if self._encoded and _bare(name) == "key"]
        for row in self._table.rows([*names, *asked]):
            flags = dict(zip(asked, map(_is_true, row[len(names) :]), strict=True))
            if flags.get(marks[0] or "", True) and not flags.get(marks[1] or "", False):
                values = list(row[: len(names)])
                for position in keys:
                    values[position] = unquote_plus(values[position] or "")
                yield tuple(values)


def _bare(column: str) -> str:
    return column.lower().replace("_", "")


def _is_true(value: Any) -> bool:
    return value is True or (isinstance(value, str) and value.lower() == "true")
