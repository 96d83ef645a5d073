"""What runs keep besides label maps, runs of older versions, damaged ones, and runs in other processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from ovss_ray.errors import DamagedRunError, ImageError, OvssError, SettingError
from ovss_ray.images.listing import list_images
from ovss_ray.labels import decode_confidence_map
from ovss_ray.labels.pictures import draw_labels
from ovss_ray.labels.reading import Run, open_run
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.manifest import write_manifest

Write = Callable[..., Any]


# -- confidence maps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("codec", ["png", "zstd"])
def test_labels_can_be_thresholded_later(place: str, write: Write, codec: str) -> None:
    written = write(place, confidence=True, codec=codec)
    with open_run(place) as run:
        thresholded = dict(run.label_maps(min_confidence=0.6))
        assert list(thresholded) == list(written.labels)
        for image_id, labels in written.labels.items():
            stored = written.rows[image_id].confidence_map
            confidence = run.confidence_map(image_id)
            assert confidence.dtype == np.uint8
            np.testing.assert_array_equal(confidence, decode_confidence_map(stored, *labels.shape))
            expected = np.where(confidence < 0.6 * 255, 255, labels)
            np.testing.assert_array_equal(run.label_map(image_id, min_confidence=0.6), expected)
            np.testing.assert_array_equal(thresholded[image_id], expected)
            np.testing.assert_array_equal(run.label_map(image_id, min_confidence=0), labels)
        assert "confidence_map" not in run.images().column_names
        with pytest.raises(OvssError, match="image 3 .* has no label map: corrupt"):
            run.confidence_map(3)
        with pytest.raises(SettingError, match="min_confidence is 60; give a probability from 0 to 1"):
            run.label_map(0, min_confidence=60)
        with pytest.raises(SettingError, match=r"min_confidence is '0\.5'; give a probability from 0 to 1"):
            run.label_map(0, min_confidence="0.5")  # type: ignore[arg-type]


def test_runs_without_confidence_maps_say_how_to_get_them(tmp_path: Path, write: Write) -> None:
    write(str(tmp_path))
    run = open_run(tmp_path)
    for ask in (
        lambda: run.confidence_map(0),
        lambda: run.label_map(0, min_confidence=0.5),
        lambda: next(run.label_maps(min_confidence=0.5)),
    ):
        with pytest.raises(SettingError, match="has no confidence maps; label with --confidence-map uint8"):
            ask()


# -- components --------------------------------------------------------------------------------------------------------


def test_components_are_one_row_each(place: str, write: Write) -> None:
    written = write(place, components=2)
    with open_run(place) as run:
        found = run.components().to_pylist()
        expected = [(number, item) for number, row in written.rows.items() for item in row.components or ()]
        assert len(found) == len(expected) > 50
        same = ("class_id", "pixels", "bbox_x", "bbox_h", "rle")
        for row, (image_id, item) in zip(found, expected, strict=True):
            assert (row["image_id"], row["uri"]) == (image_id, f"s3://images/{image_id:04d}.jpg")
            assert row["class_name"] == f"class'{item.class_id}"
            assert [row[name] for name in same] == [getattr(item, name) for name in same]
            mask = coco_mask.decode({"size": [row["height"], row["width"]], "counts": row["rle"]})
            assert mask.sum() == row["pixels"] >= 2
            assert (written.labels[image_id][mask.astype(bool)] == row["class_id"]).all()
        largest = run.sql("SELECT image_id, max(pixels) FROM components GROUP BY 1 ORDER BY 1").fetchall()
        assert largest[0] == (0, max(item.pixels for number, item in expected if number == 0))


def test_plain_duckdb_reads_components(tmp_path: Path, write: Write) -> None:
    written = write(str(tmp_path), components=3)
    rows = duckdb.sql(
        f"SELECT item.class_id, count(*) FROM (SELECT unnest(components) AS item FROM '{tmp_path}/shards/*.parquet') "
        "GROUP BY ALL ORDER BY ALL"
    ).fetchall()
    ids = [item.class_id for row in written.rows.values() for item in row.components or ()]
    assert rows == [(class_id, ids.count(class_id)) for class_id in sorted(set(ids))]


def test_runs_without_components_say_how_to_get_them(tmp_path: Path, write: Write) -> None:
    write(str(tmp_path))
    with open_run(tmp_path) as run:
        with pytest.raises(SettingError, match="has no components; label with --components 100"):
            run.components()
        assert run.sql("SELECT * FROM components").fetchall() == []


# -- older versions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [None, 0, 2])
def test_shards_of_the_first_version_are_read(tmp_path: Path, write: Write, again: int | None) -> None:
    """They have neither confidence maps nor components, nor do their settings; one was labelled again since."""
    written = write(str(tmp_path))
    for path in (tmp_path / "shards").iterdir():
        if again is not None and int(path.stem) == again:
            continue
        table = pq.read_table(path).drop_columns(["confidence_map", "components"])
        metadata = {**table.schema.metadata, b"ovss_ray:schema_version": b"1.0"}
        pq.write_table(table.replace_schema_metadata(metadata), path)
    record = tmp_path / "run.json"
    record.write_text(record.read_text().replace('"components": null, "confidence_map": "none"', '"x": 0'))
    with open_run(tmp_path) as run:
        assert "confidence_map" not in run.job
        assert run.images()["image_id"].to_pylist() == list(range(21))
        assert {image_id: labels.tolist() for image_id, labels in run.label_maps()} == {
            image_id: labels.tolist() for image_id, labels in written.labels.items()
        }
        assert run.segments().num_rows > 20
        assert run.sql("SELECT * FROM components").fetchall() == []
        assert run.images(["confidence_map", "components"]).num_rows == 21
        with pytest.raises(SettingError, match="has no confidence maps"):
            run.confidence_map(0)


# -- damaged runs ------------------------------------------------------------------------------------------------------

READS: dict[str, Callable[[Run], object]] = {
    "images": Run.images,
    "segments": Run.segments,
    "fetchall": lambda run: run.sql("SELECT * FROM shard_rows").fetchall(),
    "streamed": lambda run: run.sql("SELECT * FROM shard_rows").to_arrow_reader().read_all(),
    "derived": lambda run: run.sql("SELECT * FROM shard_rows").filter("image_id > 3").order("uri").to_arrow_table(),
    "printed": lambda run: str(run.sql("SELECT * FROM shard_rows")),
    "label_maps": lambda run: list(run.label_maps()),
    "len": len,
}


@pytest.mark.parametrize("damage", ["cut off", "empty", "something else", "zeros at the end", "zeros at the start"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_shard_is_named_by_every_way_of_reading(
    tmp_path: Path, write: Write, damage: str, number: int
) -> None:
    write(str(tmp_path))
    path = tmp_path / "shards" / f"{number:08d}.parquet"
    whole = path.read_bytes()
    half = len(whole) // 2
    path.write_bytes(
        {
            "cut off": whole[:-5],
            "empty": b"",
            "something else": b"<html>not found</html>" * 20,
            "zeros at the end": whole[:half] + bytes(len(whole) - half),
            "zeros at the start": bytes(half) + whole[half:],
        }[damage]
    )
    for name, read in READS.items():
        if damage == "zeros at the start" and name == "len":
            continue  # which looks at the footer only
        with pytest.raises(DamagedRunError, match=rf"{path.name} is damaged .*; remove it and continue") as caught:
            read(open_run(tmp_path))
        assert "\n" not in str(caught.value), name


@pytest.mark.parametrize("column", ["label_map", "confidence_map"])
def test_a_map_in_a_damaged_page_names_its_shard(tmp_path: Path, write: Write, column: str) -> None:
    write(str(tmp_path), confidence=True)
    path = tmp_path / "shards" / "00000001.parquet"
    group = pq.read_metadata(path).row_group(0)
    chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema == column)
    whole = bytearray(path.read_bytes())
    whole[chunk.data_page_offset + 3] ^= 1  # the size of the page, in its header
    path.write_bytes(whole)
    reads: list[Callable[[Run], object]] = [
        lambda run: run.images(["image_id", column]),
        lambda run: run.sql(f"SELECT {column} FROM shard_rows").fetchall(),
        lambda run: run.sql(f"SELECT {column} FROM shard_rows").to_arrow_reader().read_all(),
        lambda run: list(run.label_maps(min_confidence=0.5)),
    ]
    for read in reads:
        with pytest.raises(DamagedRunError, match=r"00000001\.parquet is damaged"):
            read(open_run(tmp_path))
    assert open_run(tmp_path).images(["image_id"]).num_rows == 21


def test_a_column_whose_name_is_damaged_is_damage(tmp_path: Path, write: Write) -> None:
    write(str(tmp_path), confidence=True)
    path = tmp_path / "shards" / "00000001.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"label_map", b"lab%l_map"))
    reads: list[Callable[[Run], object]] = [
        lambda run: run.images(["label_map"]),
        lambda run: run.label_map(8),
        lambda run: list(run.label_maps()),
    ]
    for read in reads:
        with pytest.raises(DamagedRunError, match=r"00000001\.parquet is damaged \(it has no column label_map\)"):
            read(open_run(tmp_path))
    path.write_bytes(whole.replace(b"confidence_map", b"confid%nce_map"))
    with pytest.raises(DamagedRunError, match="the shard of image 8 .* has no column confidence_map"):
        open_run(tmp_path).confidence_map(8)


@pytest.mark.parametrize(
    ("keys", "value", "said"),
    [
        (("vocabulary", "classes"), None, "vocabulary: .*classes"),
        (("vocabulary", "classes", 0, "color"), "red", r"classes\.0\.color"),
        (("vocabulary", "classes", 0, "queries"), "cat", r"classes\.0\.queries"),
        (("vocabulary", "classes", 1, "id"), 7, "contradict each other"),
        (("vocabulary", "background"), 3, "contradict each other"),
        (("manifest", "shard_size"), 0, "numbers above 0"),
        (("manifest", "shard_size"), "8", "numbers above 0"),
        (("manifest", "parts", 0, "rows"), "21", "numbers above 0"),
        (("manifest", "parts", 0, "rows"), 5, "21 images by its record, and 5 by its parts"),
        (("manifest", "parts"), [], "numbers above 0"),
        (("job", "max_pixels"), "many", r"job\.max_pixels"),
    ],
)
def test_a_wrong_value_in_run_json_is_damage(
    tmp_path: Path, write: Write, keys: tuple[Any, ...], value: object, said: str
) -> None:
    write(str(tmp_path))
    record = json.loads((tmp_path / "run.json").read_text())
    holder = record
    for key in keys[:-1]:
        holder = holder[key]
    holder[keys[-1]] = value
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(DamagedRunError, match=rf"run\.json is damaged \(.*{said}.*\); restore it to read the run"):
        open_run(tmp_path)


def test_no_flipped_byte_ends_in_an_error_of_another_kind(tmp_path: Path, write: Write) -> None:
    write(str(tmp_path), images=8, components=2)
    path = tmp_path / "shards" / "00000000.parquet"
    whole = path.read_bytes()
    chance = random.Random(1)
    found = 0
    for _ in range(60):
        place = chance.randrange(len(whole))
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            with open_run(tmp_path) as run:
                run.sql("SELECT * FROM shard_rows").fetchall()
        except DamagedRunError:
            found += 1
    assert found > 10


def test_a_mistake_in_a_query_is_no_damage_also_when_it_shows_late(tmp_path: Path, write: Write) -> None:
    write(str(tmp_path))
    with open_run(tmp_path) as run:
        late = run.sql("SELECT uri::INTEGER FROM images")
        with pytest.raises(SettingError, match=r"the query cannot be run on .*Could not convert"):
            late.fetchall()
        with pytest.raises(SettingError, match="the query cannot be run"):
            run.sql("SELECT * FROM images").filter("nothing > 3")


def test_what_sql_gives_is_used_like_a_relation_of_duckdb(tmp_path: Path, write: Write) -> None:
    write(str(tmp_path))
    with open_run(tmp_path) as run:
        relation = run.sql("SELECT image_id, uri FROM images ORDER BY 1")
        assert (relation.columns, len(relation), relation.shape) == (["image_id", "uri"], 21, (21, 2))
        assert relation.limit(2).fetchall() == [(0, "s3://images/0000.jpg"), (1, "s3://images/0001.jpg")]
        assert relation["uri"].fetchall()[0] == ("s3://images/0000.jpg",)
        assert "uri" in relation
        assert "s3://images/0001.jpg" in str(relation) == repr(relation)
        assert relation.to_arrow_table().num_rows == pa.table(relation).num_rows == 21
        with pytest.raises(AttributeError, match="nonsense"):
            relation.nonsense()


# -- iteration and other processes -------------------------------------------------------------------------------------


def test_a_run_is_its_images_with_labels(place: str, write: Write) -> None:
    written = write(place)
    with open_run(place) as run:
        assert len(run) == len(written.labels) == 18
        for image in run:
            assert (image.uri, image.status) == (f"s3://images/{image.image_id:04d}.jpg", "ok")
            np.testing.assert_array_equal(image.labels, written.labels[image.image_id])
        assert [image.image_id for image in run] == list(written.labels)
        assert bool(run)


def test_a_run_without_labels_is_empty_and_still_true(tmp_path: Path, write: Write) -> None:
    write(str(tmp_path), done=())
    run = open_run(tmp_path)
    assert (len(run), list(run), bool(run)) == (0, [], True)


def count_and_look(run: Run) -> tuple[int, list[tuple[int, int]]]:
    sums = [(image_id, int(run.label_map(image_id).sum())) for image_id in (0, 20)]
    return run.sql("SELECT count(*) FROM segments").fetchall()[0][0], sums


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_a_run_that_is_in_use_works_in_other_processes(place: str, write: Write, method: str) -> None:
    write(place)
    with open_run(place) as run:
        expected = count_and_look(run)
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(count_and_look, [run, run]) == [expected, expected]
        assert count_and_look(run) == expected


def test_a_forked_process_uses_the_run_that_it_inherits(place: str, write: Write) -> None:
    write(place)
    run = open_run(place)
    expected = count_and_look(run)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.write(writing, pickle.dumps(count_and_look(run)))
            code = 0
        finally:
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        assert pickle.loads(pipe.read()) == expected
    assert os.waitpid(child, 0)[1] == 0
    assert count_and_look(run) == expected


@pytest.mark.parametrize("use", ["pass", "run = None", "run.close()", "run.images()"])
def test_a_forked_process_leaves_by_its_own_exit_code(tmp_path: Path, write: Write, use: str) -> None:
    write(str(tmp_path))
    script = f"""if True:
        import os, sys
        from ovss_ray.labels.reading import open_run
        run = open_run({str(tmp_path)!r})
        run.images()
        child = os.fork()
        if child == 0:
            {use}
            sys.exit(3)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), run.images().num_rows)
    """
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stdout) == (0, "3 21\n"), result.stderr


def test_a_pickled_run_is_found_from_another_folder(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(str(tmp_path / "run"))
    monkeypatch.chdir(tmp_path)
    run = open_run("run", storage_options={"s3": {"anon": True}})
    stored = pickle.dumps(run)
    expected = count_and_look(run)
    monkeypatch.chdir("/")
    again = pickle.loads(stored)
    assert count_and_look(again) == expected
    assert (again.uri, again.manifest, again.vocabulary) == (run.uri, run.manifest, run.vocabulary)


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_a_plot_shows_the_image_and_its_labels(tmp_path: Path, write: Write) -> None:
    written = write(str(tmp_path / "run"))
    photos = []
    for image_id in range(21):
        height, width = written.labels[image_id].shape if image_id in written.labels else (5, 6)
        photos.append(np.random.default_rng(image_id).integers(0, 256, (height, width, 3), dtype=np.uint8))
        Image.fromarray(photos[-1]).save(tmp_path / f"{image_id:02d}.png")
    directory = RunDirectory(str(tmp_path / "run"))
    directory.prepare()
    write_manifest(list_images(str(tmp_path / "*.png")), directory, 8)
    with open_run(tmp_path / "run") as run:
        for image_id in (0, 20):
            expected = draw_labels(written.labels[image_id], run.vocabulary, photos[image_id])
            np.testing.assert_array_equal(np.asarray(run.plot(image_id)), np.asarray(expected))
        small = run.plot(0, legend=False, max_side=3)
        assert max(small.size) == 3
        with pytest.raises(OvssError, match="image 3 .* has no label map"):
            run.plot(3)
        Image.new("RGB", (50, 40)).save(tmp_path / "00.png")
        (tmp_path / "20.png").unlink()
        with pytest.raises((OvssError, ImageError), match=r"by now|changed since"):
            run.plot(0)
        with pytest.raises(ImageError, match=r"20\.png"):
            run.plot(20)
        alone = draw_labels(written.labels[20], run.vocabulary)
        np.testing.assert_array_equal(np.asarray(run.plot(20, photo=False)), np.asarray(alone))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("00001.json", "{", "additions/00001.json is damaged"),
        ("00002.json", "{}", "additions/00001.json is missing; restore it"),
    ],
)
def test_a_damaged_record_of_an_addition_is_damage(
    tmp_path: Path, write: Write, name: str, content: str, said: str
) -> None:
    write(str(tmp_path))
    (tmp_path / "additions").mkdir()
    (tmp_path / "additions" / name).write_text(content)
    with pytest.raises(DamagedRunError, match=said) as caught:
        open_run(tmp_path)
    assert caught.value.exit_code == 6
