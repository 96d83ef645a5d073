"""Reading runs: what was written comes back, from a disk and from an object store, through Arrow and SQL."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from ovss_ray.errors import DamagedRunError, OvssError, SettingError
from ovss_ray.labels import encode_shard, load_schema, summarise
from ovss_ray.labels.reading import Run, open_run

NO_RETRIES = {"retries": {"total_max_attempts": 1}}
SHARD_SIZE = 8  # of the runs that `write` writes

Write = Callable[..., Any]


def test_all_of_a_finished_run_comes_back(place: str, write: Write) -> None:
    written = write(place)
    with open_run(place) as run:
        assert (run.num_images, run.num_shards, run.shards_done()) == (21, 3, [0, 1, 2])
        assert run.vocabulary == written.vocabulary
        assert run.job["method"] == "maskclip"
        assert run.fingerprint == "f" * 64
        assert run.status_counts() == {"ok": 18, "corrupt": 3}

        images = run.images()
        assert images["image_id"].to_pylist() == list(range(21))
        for column in images.column_names:
            stored = [getattr(written.rows[image_id], column) for image_id in range(21)]
            assert images[column].to_pylist() == [_as_float32(value) for value in stored]

        maps = dict(run.label_maps())
        assert list(maps) == list(written.labels)
        for image_id, labels in written.labels.items():
            np.testing.assert_array_equal(maps[image_id], labels)
            np.testing.assert_array_equal(run.label_map(image_id), labels)


def test_the_rows_of_a_shard_are_its_images_with_and_without_labels(place: str, write: Write) -> None:
    written = write(place, done=(1,))
    with open_run(place) as run:
        rows = list(run.rows_of(1))
        assert [row.image_id for row in rows] == list(range(8, 16))
        for row in rows:
            stored = written.rows[row.image_id]
            assert (row.uri, row.status, row.error) == (stored.uri, stored.status, stored.error)
            assert (row.labels is None) == (row.image_id == 10)
            np.testing.assert_array_equal(row.labels, written.labels.get(row.image_id))
        assert [row.image_id for row in run.rows_of(1, without={8, 10, 15})] == [9, 11, 12, 13, 14]
        with pytest.raises(OvssError, match="shard 2 of .* is not written yet"):
            list(run.rows_of(2))


@pytest.mark.parametrize("codec", ["png", "zstd"])
def test_no_flipped_byte_changes_what_is_read(tmp_path: Path, write: Write, codec: str) -> None:
    write(str(tmp_path), images=6, codec=codec)
    run = open_run(tmp_path)
    sound = list(run.rows_of(0))
    shard = tmp_path / "shards" / "00000000.parquet"
    data = shard.read_bytes()
    footer = len(data) - 8 - int.from_bytes(data[-8:-4], "little")
    found = 0
    for place in range(0, footer, 3):
        shard.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            rows = list(run.rows_of(0))
        except DamagedRunError:
            found += 1
            continue
        for row, before in zip(rows, sound, strict=True):  # a byte of a column that is not needed
            assert (row.image_id, row.uri, row.status, row.error) == (
                before.image_id, before.uri, before.status, before.error,
            )  # fmt: skip
            np.testing.assert_array_equal(row.labels, before.labels)
    assert found > 50


def test_segments_are_one_row_per_image_and_class(place: str, write: Write) -> None:
    written = write(place)
    with open_run(place) as run:
        segments = run.segments()
    expected = [(image_id, segment) for image_id, row in written.rows.items() for segment in row.segments or ()]
    assert segments.num_rows == len(expected) > 20
    statistics = [field.name for field in load_schema("shard").field("segments").type.value_type]
    assert segments.column_names == ["image_id", "uri", "class_id", "class_name", *statistics[1:]]
    for found, (image_id, segment) in zip(segments.to_pylist(), expected, strict=True):
        assert (found["image_id"], found["uri"]) == (image_id, f"s3://images/{image_id:04d}.jpg")
        assert found["class_name"] == f"class'{segment.class_id}"
        assert all(found[name] == _as_float32(getattr(segment, name)) for name in statistics)


def _as_float32(value: object) -> object:
    return float(np.float32(value)) if isinstance(value, float) else value


def test_sql_sees_images_segments_and_classes(place: str, write: Write) -> None:
    written = write(place)
    with open_run(place) as run:
        pixels = run.sql("SELECT class_name, sum(pixels) FROM segments GROUP BY 1 ORDER BY 1").fetchall()
        for class_id, (name, total) in enumerate(pixels):
            assert name == f"class'{class_id}"
            assert total == sum(int((labels == class_id).sum()) for labels in written.labels.values())
        assert run.sql("SELECT class_id, class_name FROM classes ORDER BY 1").fetchall()[2] == (2, "class'2")
        joined = (
            "SELECT count(*) FROM images LEFT JOIN segments USING (image_id) WHERE status = 'ok' AND pixels IS NULL"
        )
        assert run.sql(joined).fetchall() == [(3,)]  # all of them unlabelled
        assert "label_map" not in run.sql("SELECT * FROM images").columns
        stored = run.sql("SELECT label_map FROM shard_rows WHERE image_id = 4").fetchall()[0][0]
        assert stored == written.rows[4].label_map


@pytest.mark.parametrize("codec", ["png", "zstd"])
def test_sixteen_bit_label_maps_of_either_codec_are_read(tmp_path: Path, write: Write, codec: str) -> None:
    written = write(str(tmp_path), images=3, classes=300, codec=codec)
    run = open_run(tmp_path)
    for image_id, labels in written.labels.items():
        assert run.label_map(image_id).dtype == np.uint16
        np.testing.assert_array_equal(run.label_map(image_id), labels)


def test_a_run_that_goes_on_shows_each_new_shard_at_once(place: str, write: Write) -> None:
    write(place, done=(1,))
    with open_run(place) as run:
        assert run.shards_done() == [1]
        assert run.images()["image_id"].to_pylist() == list(range(8, 16))
        assert run.label_map(8).shape == (5, 8)
        write(place, done=(0,))
        assert run.shards_done() == [0, 1]
        assert run.images()["image_id"].to_pylist() == list(range(16))
        assert [image_id for image_id, _ in run.label_maps()][:3] == [0, 1, 2]
        assert sum(run.status_counts().values()) == 16


def test_columns_and_statuses_can_be_chosen(tmp_path: Path, write: Write) -> None:
    written = write(str(tmp_path))
    run = open_run(tmp_path)
    schema = load_schema("shard")
    failed = run.images(["status", "image_id"], status="corrupt")
    assert failed.to_pylist() == [{"status": "corrupt", "image_id": image_id} for image_id in (3, 10, 17)]
    assert run.images(status=["ok", "corrupt"]).num_rows == 21
    assert run.images(status=[]).num_rows == 0
    for wrong, hint in (
        ("OK", "did you mean 'ok'"),
        ("fetch_fialed", "did you mean 'fetch_failed'"),
        ("o'", "there are ok, "),
    ):
        with pytest.raises(SettingError, match=f"images have no status .*{hint}"):
            run.images(status=["ok", wrong])
    everything = run.images(schema.names)
    assert everything.column_names == schema.names
    flat = [name for name in schema.names if not pa.types.is_list(schema.field(name).type)]
    assert [everything.schema.field(name).type for name in flat] == [schema.field(name).type for name in flat]
    assert everything["label_map"].to_pylist() == [row.label_map for row in written.rows.values()]


def test_a_result_larger_than_memory_can_be_streamed(tmp_path: Path, write: Write) -> None:
    write(str(tmp_path))
    with open_run(tmp_path) as run:
        batches = pa.RecordBatchReader.from_stream(run.sql("SELECT * FROM segments"))
        assert sum(batch.num_rows for batch in batches) == run.segments().num_rows


def test_duckdb_reads_a_run_without_this_package(tmp_path: Path, write: Write) -> None:
    written = write(str(tmp_path))
    rows = duckdb.sql(
        f"SELECT class_id, sum(pixels) FROM (SELECT unnest(segments, recursive := true) "
        f"FROM read_parquet('{tmp_path}/shards/*.parquet')) GROUP BY class_id ORDER BY class_id"
    ).fetchall()
    labels = np.concatenate([labels.ravel() for labels in written.labels.values()])
    assert rows == [(class_id, int((labels == class_id).sum())) for class_id in range(3)]


def test_only_what_a_query_needs_is_fetched_from_the_store(
    s3: str, write: Write, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    write(f"{s3}/run", images=SHARD_SIZE)
    labels = rng.integers(0, 3, (200, 200)).astype(np.uint8)
    confidence = np.ones(labels.shape, np.float32)
    row = summarise(0, "x", labels, confidence, confidence, ignore_index=255)
    shard = encode_shard([replace(row, image_id=image_id) for image_id in range(1000)], {})
    fs, path = fsspec.core.url_to_fs(f"{s3}/run/shards/00000000.parquet")
    fs.pipe_file(path, shard)
    fetched: list[int] = []
    fetch = s3fs.S3File._fetch_range

    def count(self: s3fs.S3File, start: int, end: int) -> bytes:
        data: bytes = fetch(self, start, end)
        fetched.append(len(data))
        return data

    monkeypatch.setattr(s3fs.S3File, "_fetch_range", count)
    with open_run(f"{s3}/run") as run:
        run.label_map(0)
        assert 0 < sum(fetched) < len(shard) / 3
        fetched.clear()
        assert run.images().num_rows == 1000
        assert 0 < sum(fetched) < len(shard) / 20
        fetched.clear()
        assert run.segments().num_rows == 3000
        assert 0 < sum(fetched) < len(shard) / 2  # DuckDB reads ahead a little in nested columns


class TestErrors:
    """Each is one sentence that says what to do."""

    def test_nothing_there(self, place: str) -> None:
        with pytest.raises(SettingError, match="there is no run directory"):
            open_run(place)

    def test_a_folder_that_is_no_run(self, tmp_path: Path) -> None:
        (tmp_path / "cat.jpg").write_bytes(b"")
        with pytest.raises(SettingError, match="is not a run directory: it has no run.json"):
            open_run(tmp_path)

    def test_the_shards_folder_or_a_file_of_a_run(self, place: str, write: Write) -> None:
        write(place)
        for inside in ("shards", "run.json"):
            with pytest.raises(SettingError, match="lies inside a run directory; open .*run") as caught:
                open_run(f"{place}/{inside}")
            assert str(caught.value).endswith(place)

    def test_a_folder_of_runs(self, tmp_path: Path, write: Write) -> None:
        write(str(tmp_path / "monday"))
        with pytest.raises(SettingError, match=r"holds some; open .*/monday"):
            open_run(tmp_path)

    def test_an_unfinished_planning(self, tmp_path: Path) -> None:
        (tmp_path / "manifest").mkdir()
        with pytest.raises(SettingError, match="its planning was not finished"):
            open_run(tmp_path)

    @pytest.mark.parametrize("content", ["", "[]", "{}", '{"format_version": 1, "job": {}}', "\x00"])
    def test_a_damaged_record(self, tmp_path: Path, content: str) -> None:
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(OvssError, match=r"run.json is damaged"):
            open_run(tmp_path)

    def test_a_newer_run_format(self, tmp_path: Path) -> None:
        (tmp_path / "run.json").write_text(json.dumps({"format_version": 2}))
        with pytest.raises(OvssError, match="run format 2 and this ovss-ray reads 1; upgrade"):
            open_run(tmp_path)

    def test_a_newer_table(self, tmp_path: Path, write: Write) -> None:
        write(str(tmp_path))
        path = tmp_path / "shards" / "00000000.parquet"
        table = pq.read_table(path)
        table = table.replace_schema_metadata({**table.schema.metadata, b"ovss_ray:schema_version": b"2.0"})
        pq.write_table(table, path)
        for read in (Run.images, Run.segments, lambda run: run.label_map(0), lambda run: list(run.label_maps())):
            with pytest.raises(OvssError, match=r"version 2.0 of the shard table .* upgrade ovss-ray"):
                read(open_run(tmp_path))

    def test_an_image_that_is_not_in_the_run(self, tmp_path: Path, write: Write) -> None:
        write(str(tmp_path))
        for image_id in (-1, 21):
            with pytest.raises(SettingError, match=f"no image {image_id}: its image ids are 0 to 20"):
                open_run(tmp_path).label_map(image_id)

    def test_an_image_that_failed(self, tmp_path: Path, write: Write) -> None:
        write(str(tmp_path))
        with pytest.raises(OvssError, match=r"image 3 \(s3://images/0003.jpg\) .*: corrupt, the file ends too early"):
            open_run(tmp_path).label_map(3)

    def test_no_shard_yet(self, place: str, write: Write) -> None:
        write(place, done=())
        with open_run(place) as run:
            assert run.shards_done() == list(run.label_maps()) == []
            assert run.status_counts() == {}
            for read in (run.images, run.segments, lambda: run.sql("SELECT 1"), lambda: run.label_map(0)):
                with pytest.raises(OvssError, match="no shard of .* is written yet"):
                    read()

    def test_a_shard_that_is_not_written_yet(self, place: str, write: Write) -> None:
        write(place, done=(0,))
        with open_run(place) as run, pytest.raises(OvssError, match=r"shard 2 of .* is not written yet \(1 of 3 are\)"):
            run.label_map(20)

    def test_a_damaged_shard(self, tmp_path: Path, write: Write) -> None:
        write(str(tmp_path))
        shard = tmp_path / "shards" / "00000001.parquet"
        os.truncate(shard, shard.stat().st_size - 5)
        with pytest.raises(OvssError, match=r"00000001.parquet is damaged .*; remove it and continue"):
            open_run(tmp_path).label_map(9)

    def test_a_shard_with_the_images_of_another(self, tmp_path: Path, write: Write) -> None:
        write(str(tmp_path))
        shutil.copy(tmp_path / "shards" / "00000000.parquet", tmp_path / "shards" / "00000001.parquet")
        with pytest.raises(OvssError, match=r"00000001.parquet lacks image 9"):
            open_run(tmp_path).label_map(9)

    def test_a_wrong_query(self, tmp_path: Path, write: Write) -> None:
        write(str(tmp_path))
        run = open_run(tmp_path)
        for query in ("SELEC 1", "SELECT nothing FROM images", "SELECT * FROM masks"):
            with pytest.raises(SettingError, match="the query cannot be run") as caught:
                run.sql(query)
            assert "\n" not in str(caught.value)
        with pytest.raises(SettingError, match="write a SELECT statement"):
            run.sql("-- nothing")

    def test_a_wrong_column(self, tmp_path: Path, write: Write) -> None:
        write(str(tmp_path))
        with pytest.raises(SettingError, match="no column 'hieght'; did you mean 'height'"):
            open_run(tmp_path).images(["hieght"])

    def test_a_store_that_cannot_be_reached(self, s3: str) -> None:
        with pytest.raises(OvssError, match="cannot be read: the store cannot be reached"):
            open_run(f"{s3}/run", {"s3": {"endpoint_url": "http://127.0.0.1:9", "config_kwargs": NO_RETRIES}})
