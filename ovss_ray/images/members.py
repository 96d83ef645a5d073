"""Addresses of images that lie inside a file with others: members of tars, rows of Parquet files.

`tar://000123.jpg::s3://bucket/train-00007.tar` is the chained address that fsspec opens too;
`parquet://image/17::s3://bucket/train-00007.parquet` is the image in column `image` of row 17, counted from 0.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from ovss_ray.errors import InputError
from ovss_ray.images.addresses import CHAIN, ESCAPED_TAR, TAR, unescaped


class Member(NamedTuple):
    """An image inside a file: `name` is the member of the tar, or the column of the Parquet file."""

    kind: Literal["tar", "parquet"]
    name: str
    file: str


def tar_uri(name: str, file: str) -> str:
    """The address of a member of a tar."""
    return f"{TAR}{name}{CHAIN}{file}"


def parquet_uri(column: str, row: int, file: str) -> str:
    """The address of the image in a row of a Parquet file."""
    return f"parquet://{column}/{row}{CHAIN}{file}"


def split_member(uri: str) -> Member | None:
    """The file that holds an image, and which of its images it is; None for an image that is a file of its own."""
    if uri.startswith(TAR) and CHAIN in uri:
        name, _, file = uri.removeprefix(TAR).rpartition(CHAIN)
        return Member("tar", name, file)
    if uri.startswith(ESCAPED_TAR) and CHAIN in uri:
        name, _, file = uri.removeprefix(ESCAPED_TAR).rpartition(CHAIN)
        return Member("tar", unescaped(name), file)
    if uri.startswith("parquet://") and CHAIN in uri:
        cell, _, file = uri.removeprefix("parquet://").rpartition(CHAIN)
        return Member("parquet", cell.rpartition("/")[0], file)
    return None


def file_of(uri: str) -> str:
    """The file that has to be opened for an image: the one that holds it, or its own."""
    member = split_member(uri)
    return uri if member is None else member.file


def check_container(file: str) -> None:
    """Refuse a file whose address would be ambiguous at the end of a chained one.

    Raises:
        InputError: the address holds "::".
    """
    if CHAIN in file:
        raise InputError(f"{file} has '{CHAIN}' in its name, which separates a member from its file; rename it")
