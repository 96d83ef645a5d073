"""Shard files: rows come back, the file is what the contract says, provenance is in the footer."""

from __future__ import annotations

import io
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ovss_ray.errors import IMAGE_FAILURES, ImageError, OvssError, SettingError
from ovss_ray.labels import (
    ImageRow,
    decode_confidence_map,
    decode_label_map,
    encode_shard,
    failed_row,
    load_contract,
    load_schema,
    read_shard_metadata,
    summarise,
)

Contract = dict[str, object]


@st.composite
def image_rows(draw: st.DrawFn) -> ImageRow:
    image_id, uri = draw(st.integers(0, 2**40)), draw(st.text(st.characters(codec="utf-8"), max_size=20))
    if draw(st.booleans()):
        return failed_row(image_id, uri, ImageError(draw(st.sampled_from(IMAGE_FAILURES)), draw(st.text(max_size=9))))
    shape = draw(hnp.array_shapes(min_dims=2, max_dims=2, max_side=9))
    labels = draw(hnp.arrays(np.uint8, shape, elements=st.sampled_from([0, 3, 254, 255])))
    confidence = draw(hnp.arrays(np.float32, shape, elements=st.floats(0, 1, width=32)))
    codec = draw(st.sampled_from(["png", "zstd"]))
    return summarise(image_id, uri, labels, confidence, confidence / 2, ignore_index=255, codec=codec)


SHARDS = st.lists(image_rows(), max_size=6, unique_by=lambda row: row.image_id)


def read_back(data: bytes) -> pa.Table:
    return pq.read_table(io.BytesIO(data))


def as_stored(row: ImageRow) -> dict[str, object]:
    """The row as a dictionary, its floats rounded to the float32 of the file."""

    def value(item: object) -> object:
        if isinstance(item, tuple):
            return [{name: value(getattr(segment, name)) for name in segment.__slots__} for segment in item]
        return float(np.float32(item)) if isinstance(item, float) else item

    return {field.name: value(getattr(row, field.name)) for field in fields(row)}


@settings(deadline=None)
@given(rows=SHARDS)
def test_rows_come_back_sorted_by_image_id(rows: list[ImageRow]) -> None:
    table = read_back(encode_shard(rows, {}))
    assert table.to_pylist() == [as_stored(row) for row in sorted(rows, key=lambda row: row.image_id)]


@settings(deadline=None)
@given(rows=SHARDS, seed=st.randoms())
def test_equal_input_gives_equal_bytes(rows: list[ImageRow], seed: object) -> None:
    metadata = {"fingerprint": "abc", "shard_id": "7"}
    shuffled = list(rows)
    seed.shuffle(shuffled)  # type: ignore[attr-defined]
    assert encode_shard(shuffled, dict(reversed(metadata.items()))) == encode_shard(rows, metadata)


@settings(deadline=None)
@given(rows=SHARDS)
def test_every_value_is_within_the_contract(rows: list[ImageRow]) -> None:
    columns = load_contract("shard")["columns"]
    for row in read_back(encode_shard(rows, {})).to_pylist():
        for column in columns:
            assert_within(row[column["name"]], column)
        is_null = {name: row[name] is None for name in row if name not in ("image_id", "uri", "status", "extra")}
        assert is_null.pop("error") == (row["status"] == "ok")
        assert is_null.pop("confidence_map")
        assert is_null.pop("components")
        assert set(is_null.values()) == {row["status"] != "ok"}


def assert_within(value: object, column: dict[str, object]) -> None:
    if value is None:
        assert column["nullable"]
        return
    if isinstance(value, list):
        for item in value:
            for field in column["items"]["fields"]:  # type: ignore[index]
                assert_within(item[field["name"]], field)
    if "minimum" in column:
        assert column["minimum"] <= value, column["name"]  # type: ignore[operator]
    if "maximum" in column:
        assert value <= column["maximum"], column["name"]  # type: ignore[operator]
    if "values" in column:
        assert value in column["values"]  # type: ignore[operator]


def one_row(image_id: int = 0, shape: tuple[int, int] = (4, 6), codec: str = "png") -> ImageRow:
    labels: npt.NDArray[np.uint8] = np.zeros(shape, np.uint8)
    labels[0] = 255
    confidence = np.full(shape, 0.5, np.float32)
    return summarise(image_id, "x", labels, confidence, confidence / 2, ignore_index=255, codec=codec)


def test_a_labelled_image_is_summarised() -> None:
    row = one_row()
    assert (row.status, row.error, row.height, row.width) == ("ok", None, 4, 6)
    assert (row.labelled_fraction, row.confidence_mean, row.margin_mean) == (0.75, 0.5, 0.25)
    assert row.segments is not None
    assert [segment.pixels for segment in row.segments] == [18]
    assert row.label_map is not None
    decoded = decode_label_map(row.label_map, 4, 6, np.uint8)
    assert decoded.tolist() == [[255] * 6, *[[0] * 6] * 3]


def test_an_unknown_codec_is_refused() -> None:
    with pytest.raises(SettingError, match="webp"):
        one_row(codec="webp")


@pytest.mark.parametrize("rows", [[], [one_row()], [failed_row(0, "x", ImageError("timeout", "late"))]])
def test_a_file_has_exactly_the_columns_of_the_contract(rows: list[ImageRow]) -> None:
    file = pq.ParquetFile(io.BytesIO(encode_shard(rows, {})))
    assert file.schema_arrow.equals(load_schema("shard"), check_metadata=True)
    leaves = [file.schema.column(index) for index in range(len(file.schema))]
    required = {leaf.path for leaf in leaves if leaf.max_definition_level == 0}
    assert required == {"image_id", "uri", "status"}  # what is required in Parquet itself, whoever reads it


def test_the_file_is_laid_out_for_cheap_look_ups() -> None:
    file = pq.ParquetFile(io.BytesIO(encode_shard([one_row(image_id) for image_id in range(100)], {})))
    group = file.metadata.row_group(0)
    columns = {group.column(index).path_in_schema: group.column(index) for index in range(group.num_columns)}
    label_map = columns.pop("label_map")
    assert label_map.compression == "UNCOMPRESSED"
    assert not label_map.has_dictionary_page
    assert not label_map.is_stats_set
    confidence_map = columns.pop("confidence_map")
    assert (confidence_map.compression, confidence_map.has_dictionary_page) == ("UNCOMPRESSED", False)
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert columns["image_id"].statistics.max == 99


def test_a_row_group_holds_about_two_mebibytes_of_label_maps() -> None:
    row = replace(one_row(), label_map=b"\x89PNG" + bytes(20_000))
    rows = [replace(row, image_id=image_id) for image_id in range(500)]
    metadata = pq.read_metadata(io.BytesIO(encode_shard(rows, {})))
    sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    assert sizes == [104, 104, 104, 104, 84]
    small = pq.read_metadata(io.BytesIO(encode_shard([one_row(image_id) for image_id in range(500)], {})))
    assert small.num_row_groups == 1
    huge = replace(row, label_map=bytes(400_000))
    large = encode_shard([replace(huge, image_id=image_id) for image_id in range(70)], {})
    assert pq.read_metadata(io.BytesIO(large)).row_group(0).num_rows == 64


def test_two_rows_of_one_image_are_refused() -> None:
    with pytest.raises(ValueError, match="same image_id"):
        encode_shard([one_row(3), one_row(3)], {})


def test_the_footer_says_where_the_shard_comes_from(tmp_path: Path) -> None:
    data = encode_shard([one_row()], {"fingerprint": "abc", "vocabulary": '{"name":"žluť"}'})
    expected = {"fingerprint": "abc", "vocabulary": '{"name":"žluť"}', "schema": "shard", "schema_version": "1.1"}
    assert read_shard_metadata(io.BytesIO(data)) == expected
    path = tmp_path / "shard.parquet"
    path.write_bytes(data)
    assert read_shard_metadata(str(path)) == read_shard_metadata(path) == expected
    with path.open("rb") as file:
        assert read_shard_metadata(file) == expected
    assert b"ovss_ray:fingerprint" in pq.read_metadata(path).metadata  # under a prefix, beside the keys of others


def test_only_shards_are_read_as_shards(tmp_path: Path) -> None:
    path = tmp_path / "other.parquet"
    path.write_bytes(encode_shard([one_row()], {})[:-1])
    with pytest.raises(OvssError, match=r"other.parquet is not a whole Parquet file"):
        read_shard_metadata(path)
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(OvssError, match=r"other.parquet is not written by ovss-ray"):
        read_shard_metadata(str(path))
    pq.write_table(load_schema("manifest").empty_table(), path)
    with pytest.raises(OvssError, match="is a manifest table, where a shard table is expected"):
        read_shard_metadata(str(path))


@pytest.mark.parametrize("codec", ["png", "zstd"])
def test_confidence_maps_and_components_are_kept_if_asked_for(codec: str) -> None:
    labels = np.zeros((6, 8), np.uint8)
    labels[1:3, 2:5] = 1
    labels[5, 7] = 1
    confidence = np.linspace(0, 1, labels.size, dtype=np.float32).reshape(labels.shape)
    row = summarise(
        4,
        "x",
        labels,
        confidence,
        confidence,
        ignore_index=255,
        codec=codec,
        keep_confidence=True,
        smallest_component=2,
    )
    failed = failed_row(5, "y", ImageError("timeout", "late"))
    data = encode_shard([failed, row], {})
    stored = read_back(data).to_pylist()
    kept = decode_confidence_map(stored[0]["confidence_map"], 6, 8)
    np.testing.assert_array_equal(kept, np.rint(255 * confidence))
    assert [(item["class_id"], item["pixels"], item["bbox_x"]) for item in stored[0]["components"]] == [
        (0, 41, 0),
        (1, 6, 2),
    ]
    assert stored[0]["components"][1]["rle"] == row.components[1].rle
    assert (stored[1]["confidence_map"], stored[1]["components"]) == (None, None)
    nothing = replace(row, components=())
    assert read_back(encode_shard([nothing], {})).to_pylist()[0]["components"] == []
