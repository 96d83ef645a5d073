"""The table contracts in `schemas/*.yaml` as Arrow schemas: the only place where a column gets its name and type."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import yaml

from ovss_ray.errors import OvssError

METADATA_PREFIX = "ovss_ray:"
SCHEMA_KEY = METADATA_PREFIX + "schema"
SCHEMA_VERSION_KEY = METADATA_PREFIX + "schema_version"

_SCALAR_TYPES = {
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "string": pa.string(),
    "binary": pa.binary(),
    "bool": pa.bool_(),
}


@cache
def load_contract(name: str) -> dict[str, Any]:
    """The contract `schemas/<name>.yaml` as read: name, version, description and columns (treat as read-only).

    Each column has a name, a type, nullable and a description, and where it applies a unit, a minimum, a maximum
    or the list of allowed values.
    """
    contract: dict[str, Any] = yaml.safe_load(_contract_text(name))
    return contract


@cache
def load_schema(name: str) -> pa.Schema:
    """The Arrow schema of the table `name` ("shard" or "manifest"), its name and version in the metadata."""
    contract = load_contract(name)
    metadata = {SCHEMA_KEY: contract["name"], SCHEMA_VERSION_KEY: contract["version"]}
    return pa.schema([_field(column) for column in contract["columns"]], metadata=metadata)


def check_schema(found: pa.Schema, name: str, where: str) -> None:
    """Refuse a table that is not a `name` table, or one of a newer major version than this package can read.

    Args:
        found: schema of the file, with the metadata of its footer.
        where: the file, for the message.

    Raises:
        OvssError: with one sentence that says what to do.
    """
    metadata = found.metadata or {}
    found_name = metadata.get(SCHEMA_KEY.encode(), b"").decode()
    if found_name != name:
        what = f"a {found_name} table" if found_name else "not written by ovss-ray"
        article = "an" if name[0] in "aeiou" else "a"
        raise OvssError(f"{where} is {what}, where {article} {name} table is expected")
    version = metadata.get(SCHEMA_VERSION_KEY.encode(), b"").decode()
    known: str = load_contract(name)["version"]
    if _major(version, where) > _major(known, name):
        raise OvssError(
            f"{where} has version {version} of the {name} table and this ovss-ray reads version {known}; "
            "upgrade ovss-ray to read it"
        )


def _major(version: str, where: str) -> int:
    try:
        return int(version.split(".")[0])
    except ValueError:
        raise OvssError(f"{where} has no table version that can be read: {version!r}") from None


def _contract_text(name: str) -> str:
    """A wheel holds the contracts inside the package, a source checkout beside it."""
    packaged = files("ovss_ray") / "schemas" / f"{name}.yaml"
    if packaged.is_file():
        return packaged.read_text(encoding="utf-8")
    checkout = Path(__file__).parents[2] / "schemas" / f"{name}.yaml"
    return checkout.read_text(encoding="utf-8")


def _field(column: dict[str, Any]) -> pa.Field:
    return pa.field(column["name"], _type(column), nullable=column["nullable"])


def _type(column: dict[str, Any]) -> pa.DataType:
    if column["type"] == "list":
        # "element" is the name that Parquet gives the items, so a file reads back as exactly this type.
        items = column["items"]
        return pa.list_(pa.field("element", _type(items), nullable=items["nullable"]))
    if column["type"] == "struct":
        return pa.struct([_field(field) for field in column["fields"]])
    return _SCALAR_TYPES[column["type"]]
