"""The table contracts in `schemas/`: well formed, and the only source of the Arrow schemas."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

from ovss_ray.errors import IMAGE_FAILURES, OvssError
from ovss_ray.labels import ComponentStatistics, ImageRow, SegmentStatistics, check_schema, load_contract, load_schema

CONTRACTS = Path(__file__).parents[1] / "schemas"
NAMES = sorted(path.stem for path in CONTRACTS.glob("*.yaml"))
KEYS = {"name", "type", "nullable", "unit", "minimum", "maximum", "values", "items", "description"}


@pytest.mark.parametrize("name", NAMES)
def test_a_contract_describes_every_column(name: str) -> None:
    contract = yaml.safe_load((CONTRACTS / f"{name}.yaml").read_text())
    assert load_contract(name) == contract
    assert list(contract) == ["name", "version", "description", "columns"]
    assert contract["name"] == name
    major, minor = contract["version"].split(".")
    assert int(major) >= 1
    assert int(minor) >= 0
    for column in [*contract["columns"], *segment_fields(contract)]:
        assert column.keys() <= KEYS
        assert isinstance(column["nullable"], bool)
        assert column["description"].endswith("."), column["name"]


def segment_fields(contract: dict[str, Any]) -> list[dict[str, Any]]:
    return [field for column in contract["columns"] for field in column.get("items", {}).get("fields", [])]


@pytest.mark.parametrize("name", NAMES)
def test_the_arrow_schema_is_the_contract(name: str) -> None:
    contract, schema = load_contract(name), load_schema(name)
    assert schema.names == [column["name"] for column in contract["columns"]]
    for column in contract["columns"]:
        assert_same(schema.field(column["name"]), column)
    assert schema.metadata == {
        b"ovss_ray:schema": name.encode(),
        b"ovss_ray:schema_version": contract["version"].encode(),
    }


def assert_same(field: pa.Field, column: dict[str, Any]) -> None:
    assert field.nullable == column["nullable"]
    if column["type"] != "list":
        assert str(field.type) == column["type"].replace("float32", "float")
        return
    items = field.type.value_field
    assert items.nullable == column["items"]["nullable"]
    if column["items"]["type"] != "struct":
        assert str(items.type) == column["items"]["type"]
        return
    assert [child.name for child in items.type] == [child["name"] for child in column["items"]["fields"]]
    for child, child_column in zip(items.type, column["items"]["fields"], strict=True):
        assert_same(child, child_column)


def test_the_records_of_the_code_have_the_columns_of_the_contract() -> None:
    contract = load_contract("shard")
    assert [field.name for field in fields(ImageRow)] == [column["name"] for column in contract["columns"]]
    for name, record in (("segments", SegmentStatistics), ("components", ComponentStatistics)):
        (items,) = (column["items"] for column in contract["columns"] if column["name"] == name)
        assert [field.name for field in fields(record)] == [field["name"] for field in items["fields"]]


def test_the_statuses_are_ok_and_the_failures_of_an_image() -> None:
    (status,) = [column for column in load_contract("shard")["columns"] if column["name"] == "status"]
    assert status["values"] == ["ok", *IMAGE_FAILURES]


def test_the_manifest_numbers_images_and_allows_unknown_sizes() -> None:
    schema = load_schema("manifest")
    assert schema.field("image_id") == pa.field("image_id", pa.int64(), nullable=False)
    assert schema.field("uri") == pa.field("uri", pa.string(), nullable=False)
    assert schema.field("size_bytes") == pa.field("size_bytes", pa.int64())
    assert schema.field("etag") == pa.field("etag", pa.string())


@pytest.mark.parametrize("version", ["1.0", "1.7", "0.9"])
def test_a_table_of_this_major_version_or_an_older_one_is_read(version: str) -> None:
    check_schema(versioned(version), "shard", "RUN/shards/0.parquet")


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("2.0", r"RUN/0.parquet has version 2.0 of the shard table .* reads version 1.1; upgrade ovss-ray"),
        ("10.1", "upgrade ovss-ray"),
        ("x", "no table version that can be read: 'x'"),
        ("", "no table version that can be read: ''"),
    ],
)
def test_a_table_of_a_newer_major_version_is_refused(version: str, message: str) -> None:
    with pytest.raises(OvssError, match=message):
        check_schema(versioned(version), "shard", "RUN/0.parquet")


def versioned(version: str) -> pa.Schema:
    return load_schema("shard").with_metadata({"ovss_ray:schema": "shard", "ovss_ray:schema_version": version})


def test_the_contracts_are_found_where_a_wheel_puts_them(tmp_path: Path) -> None:
    package = CONTRACTS.parent / "ovss_ray"
    if not package.is_dir():
        pytest.skip("not a source checkout")
    assert 'schemas = "ovss_ray/schemas"' in (CONTRACTS.parent / "pyproject.toml").read_text()
    installed = tmp_path / "ovss_ray"
    shutil.copytree(package, installed, ignore=shutil.ignore_patterns("demo", "__pycache__"))
    shutil.copytree(CONTRACTS, installed / "schemas")
    code = "import ovss_ray.labels as labels; print(labels.__file__, *labels.load_schema('shard').names)"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout
    where, *names = output.split()
    assert where.startswith(str(tmp_path))
    assert names == load_schema("shard").names


def test_importing_labels_loads_neither_torch_nor_ray() -> None:
    code = "import sys, ovss_ray.labels.reading; print(sorted({'torch', 'ray', 'pandas'} & set(sys.modules)))"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
