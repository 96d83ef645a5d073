"""Runs that were extended or labelled again: every way of reading shows exactly one row per image."""

from __future__ import annotations

import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import duckdb
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovss_ray.errors import DamagedRunError, ImageError, OvssError
from ovss_ray.labels import ImageRow, encode_shard, failed_row, load_schema, summarise
from ovss_ray.labels.additions import Addition
from ovss_ray.labels.layout import Manifest, Part, addition_name
from ovss_ray.labels.reading import Run, open_run
from ovss_ray.vocabulary import load_vocabulary


@dataclass(frozen=True)
class Growth:
    """A run of 9 images in shards of 4, then additions: a tuple of image ids is a retry, a number adds so many.

    `outcomes` gives the status of each row of each shard, and None instead of a shard that is not written.
    """

    additions: tuple[tuple[int, ...] | int, ...]
    outcomes: tuple[tuple[bool, ...] | None, ...]

    def shards(self) -> list[list[int]]:
        lists: list[list[int]] = [list(range(9))]
        images = 9
        for addition in self.additions:
            if isinstance(addition, int):
                lists.append(list(range(images, images + addition)))
                images += addition
            else:
                lists.append(sorted(addition))
        return [ids[start : start + 4] for ids in lists for start in range(0, len(ids), 4)]


@st.composite
def growths(draw: st.DrawFn) -> Growth:
    additions: list[tuple[int, ...] | int] = []
    images = 9
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.integers(0, 3)) == 0:
            additions.append(draw(st.integers(1, 5)))
            images += additions[-1]  # type: ignore[operator]
        else:
            additions.append(tuple(draw(st.sets(st.integers(0, images - 1), min_size=1, max_size=6))))
    bare = Growth(tuple(additions), ())
    outcomes = [
        draw(st.one_of(st.none(), st.tuples(*[st.booleans()] * len(ids)), st.tuples(*[st.booleans()] * len(ids))))
        for ids in bare.shards()
    ]
    return Growth(bare.additions, tuple(outcomes))


def write_grown(root: str, growth: Growth) -> dict[int, tuple[bool, int]]:
    """Write the run; returns for each image with a row the one that counts: whether it has labels, and its shard."""
    fs, path = fsspec.core.url_to_fs(root)
    vocabulary = load_vocabulary(["a", "b"])
    parts = [Part("manifest/00000.parquet", 9)]
    record = {"format_version": 1, "fingerprint": "f", "job": {}, "vocabulary": json.loads(vocabulary.to_json())}
    record["manifest"] = Manifest(4, "d", tuple(parts)).to_json()
    for folder in ("manifest", "additions", "shards"):
        fs.makedirs(f"{path}/{folder}", exist_ok=True)
    fs.pipe_file(f"{path}/run.json", json.dumps(record).encode())
    images = 9
    for number, addition in enumerate(growth.additions, 1):
        retry = not isinstance(addition, int)
        ids = sorted(addition) if retry else list(range(images, images + addition))  # type: ignore[arg-type, operator]
        images += 0 if retry else len(ids)
        part = Part(f"manifest/{number:05d}-x-00000.parquet", len(ids))
        schema = load_schema("manifest")
        rows = [{"image_id": image_id, "uri": f"{image_id}.jpg"} for image_id in ids]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema), sink, row_group_size=4)
        fs.pipe_file(f"{path}/{part.name}", sink.getvalue())
        added = Addition(
            kind="retry" if retry else "extend", created_at="", package_version="0", settings={}, images=len(ids),
            digest="", parts=(part,),
        )  # fmt: skip
        fs.pipe_file(f"{path}/{addition_name(number)}", added.model_dump_json().encode())
    best: dict[int, tuple[bool, int]] = {}
    for shard, (ids, outcome) in enumerate(zip(growth.shards(), growth.outcomes, strict=True)):
        if outcome is None:
            continue
        results = []
        for image_id, ok in zip(ids, outcome, strict=True):
            results.append(tell_shard(image_id, shard) if ok else fail(image_id, shard))
            best[image_id] = max(best.get(image_id, (False, -1)), (ok, shard))
        fs.pipe_file(f"{path}/shards/{shard:08d}.parquet", encode_shard(results, {}))
    return best


def tell_shard(image_id: int, shard: int) -> ImageRow:
    """A row whose label map is as wide as its shard's number tells."""
    labels = np.zeros((2, 3 + shard), np.uint8)
    confidence = np.ones(labels.shape, np.float32)
    return summarise(image_id, f"{image_id}.jpg", labels, confidence, confidence, ignore_index=255)


def fail(image_id: int, shard: int) -> ImageRow:
    return failed_row(image_id, f"{image_id}.jpg", ImageError("corrupt", f"shard {shard}"))


def assert_one_row_per_image(run: Run, best: dict[int, tuple[bool, int]]) -> None:
    """Every way of reading tells the same, and what the reference expects."""
    if not best:
        assert run.status_counts() == {}
        return
    rows = run.images(["image_id", "status", "error", "width"]).to_pylist()
    assert [
        (row["image_id"], row["status"] == "ok", row["width"] - 3 if row["width"] else int(row["error"].split()[1]))
        for row in rows
    ] == [(image_id, *best[image_id]) for image_id in sorted(best)]
    labelled = {image_id: shard for image_id, (ok, shard) in best.items() if ok}
    assert run.segments()["image_id"].to_pylist() == sorted(labelled)
    assert {image_id: labels.shape[1] - 3 for image_id, labels in run.label_maps()} == labelled
    superseded = run.superseded(run.shards_done())
    kept = [(row.image_id, row.status == "ok", shard) for shard in run.shards_done()
            for row in run.rows_of(shard, without=superseded.get(shard, frozenset()))]  # fmt: skip
    assert sorted(kept) == [(image_id, *best[image_id]) for image_id in sorted(best)]
    counts = run.status_counts()
    assert (counts.get("ok", 0), counts.get("corrupt", 0)) == (len(labelled), len(best) - len(labelled))
    for image_id in range(run.num_images):
        if image_id in labelled:
            assert run.label_map(image_id).shape[1] - 3 == labelled[image_id]
        else:
            expected = f"corrupt, shard {best[image_id][1]}" if image_id in best else "is not written yet"
            with pytest.raises(OvssError, match=expected):
                run.label_map(image_id)


class TestImagesThatWereLabelledAgain:
    @settings(max_examples=60, deadline=None)
    @given(growth=growths())
    def test_exactly_one_row_counts_for_each(self, tmp_path_factory: pytest.TempPathFactory, growth: Growth) -> None:
        root = str(tmp_path_factory.mktemp("run"))
        best = write_grown(root, growth)
        with open_run(root) as run:
            assert run.num_shards == len(growth.shards())
            assert_one_row_per_image(run, best)
            # The rule as the README gives it to those who have nothing but the files.
            if best:
                rows = duckdb.sql(
                    f"SELECT image_id, status = 'ok' FROM read_parquet('{root}/shards/*.parquet', filename = true) "
                    "QUALIFY row_number() OVER (PARTITION BY image_id ORDER BY status = 'ok' DESC, filename DESC) = 1"
                ).fetchall()
                assert dict(rows) == {image_id: ok for image_id, (ok, _) in best.items()}

    def test_a_run_that_grows_while_it_is_open(self, place: str) -> None:
        write_grown(place, Growth((), ((True, True, False, True), (True,) * 4, (True,))))
        with open_run(place) as run:
            assert run.status_counts() == {"ok": 8, "corrupt": 1}
            failed_again = Growth(((2,), 2), ((True, True, False, True), (True,) * 4, (True,), (False,), None))
            assert_one_row_per_image(run, write_grown(place, failed_again))
            assert (run.num_images, run.shards_done()) == (11, [0, 1, 2, 3])
            once_more = Growth(((2,), 2, (2, 9)), (*failed_again.outcomes[:4], (True, True), (True, False)))
            assert_one_row_per_image(run, write_grown(place, once_more))

    def test_label_maps_of_others_are_not_read(self, tmp_path: Path) -> None:
        write_grown(str(tmp_path), Growth(((2,),), ((True, True, False, True), (True,) * 4, (True,), (True,))))
        with open_run(tmp_path) as run:
            plan = run.sql("SELECT sum(width) FROM shard_rows").explain()
            assert "label_map" not in plan
            assert "WINDOW" not in plan.upper()


@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "flipped", "a folder", "of other images"])
def test_a_damaged_list_of_images_to_label_again_is_named(tmp_path: Path, damage: str) -> None:
    write_grown(str(tmp_path), Growth(((2,),), ((True, True, False, True), (True,) * 4, (True,), (True,))))
    path = tmp_path / "manifest" / "00001-x-00000.parquet"
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "of other images":
        ids = pa.Table.from_pylist([{"image_id": i, "uri": "x"} for i in range(9)], load_schema("manifest"))
        pq.write_table(ids, path, row_group_size=4)
    elif damage != "missing":
        footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        flipped = whole[:footer] + bytes([whole[footer] ^ 0xFF]) + whole[footer + 1 :]
        path.write_bytes({"empty": b"", "cut off": whole[:-5], "flipped": flipped}[damage])
    said = "is missing" if damage == "missing" else "is damaged"
    with open_run(tmp_path) as run:
        for read in (run.label_map, run.image):
            with pytest.raises(DamagedRunError, match=rf"00001-x-00000\.parquet {said}.*; restore it to read"):
                read(2)
        assert run.label_map(1).shape == (2, 3)  # it has labels, so it was not labelled again


def test_a_grown_run_in_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    labelled = ((True, True, False, True), (True, False, True, True), (True,), (True, False), (True,))
    root = str(tmp_path / os.fsdecode(b"run \xff[1]"))
    best = write_grown(root, Growth(((2, 5), 1), labelled))
    with open_run(root) as run:
        assert_one_row_per_image(run, best)
