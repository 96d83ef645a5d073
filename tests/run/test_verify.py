"""Verification: a sound run is found sound, and whatever is done to its files is found and named."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovss_ray import open_run
from ovss_ray.errors import DamagedRunError, OvssError
from ovss_ray.images.stores import open_store
from ovss_ray.labels import encode_confidence_map
from ovss_ray.labels.classes import encode_classes
from ovss_ray.labels.schema import METADATA_PREFIX
from ovss_ray.run.additions import continue_run, extend_run, load_job, retry_run
from ovss_ray.run.driver import run_job
from ovss_ray.run.verify import Verification, verify_run
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import load_vocabulary
from tests.run.conftest import CLIP

SHARDS = 5


@pytest.fixture(scope="module")
def finished(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> JobSpec:
    """12 images, of which one failed, in shards of 4; 3 images more; the failed one once more."""
    folder = tmp_path_factory.mktemp("verify")
    listed = folder / "list.txt"
    paths = [str(path) for path in sorted(photos.rglob("*.jpg"))]
    listed.write_text("\n".join([*paths[:11], str(folder / "absent.jpg")]))
    values = {
        "input": str(listed), "run": str(folder / "run"), "classes": "cat,dog,grass,sky", "templates": "single",
        "clip": CLIP, "engine": "local", "shard_size": 4, "label_map": "zstd",
        "confidence_map": "uint8", "components": 5,
    }  # fmt: skip
    spec = JobSpec.build(values, source="test")
    run_job(spec)
    listed.write_text("\n".join(paths[:14]))
    extend_run(load_job(spec.run))
    retry_run(load_job(spec.run))
    assert continue_run(load_job(spec.run)).statuses == {"ok": 14, "not_found": 1}
    return spec


@pytest.fixture
def run(finished: JobSpec, tmp_path: Path) -> Path:
    """A copy of the finished run to spoil."""
    return shutil.copytree(finished.run, tmp_path / "run")


def shard(run: Path, number: int) -> Path:
    return run / "shards" / f"{number:08d}.parquet"


def rewrite(path: Path, change: Callable[[pa.Table], pa.Table], **footer: str) -> None:
    """Write a shard anew, sound as a file, with changed rows or footer."""
    table = change(pq.read_table(path))
    metadata = {**table.schema.metadata, **{(METADATA_PREFIX + key).encode(): value for key, value in footer.items()}}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def change_row(name: str, value: object, row: int = 0) -> Callable[[pa.Table], pa.Table]:
    def change(table: pa.Table) -> pa.Table:
        values = table[name].to_pylist()
        values[row] = value(values[row]) if callable(value) else value
        index = table.column_names.index(name)
        return table.set_column(index, table.schema.field(name), pa.array(values, table.schema.field(name).type))

    return change


def assert_one_damaged(found: Verification, number: int, said: str) -> None:
    assert [file.name for file in found.damaged] == [f"shards/{number:08d}.parquet"]
    assert said in found.damaged[0].reason
    assert found.exit_code == 6


@pytest.mark.parametrize("place", ["local", "s3"])
@pytest.mark.parametrize("footers_only", [False, True])
def test_a_sound_run(run: Path, place: str, footers_only: bool, request: pytest.FixtureRequest) -> None:
    where = str(run)
    if place == "s3":
        where = f"{request.getfixturevalue('s3')}/run"
        fs, root = open_store(where)
        fs.put(f"{run}/", f"{root}/", recursive=True)
    steps: list[tuple[int, int]] = []
    found = verify_run(where, footers_only=footers_only, watch=lambda *step: steps.append(step))
    assert found == Verification(
        run=where,
        shards=SHARDS,
        checked=SHARDS,
        images=16,
        footers_only=footers_only,
        continue_with=f"ovss-ray continue {where}",
    )
    assert found.exit_code == 0
    assert steps == [(done, SHARDS) for done in range(1, SHARDS + 1)]


def test_a_flipped_bit_is_found_wherever_it_changes_what_is_read(run: Path) -> None:
    chance = random.Random(3)
    path = shard(run, 0)
    whole = path.read_bytes()
    table, label_maps = pq.read_table(path), column_bytes(path, "label_map")
    found = 0
    for _ in range(60):
        at = chance.choice([chance.randrange(4, len(whole) - footer_bytes(whole)), chance.choice(label_maps)])
        spoilt = bytearray(whole)
        spoilt[at] ^= 1 << chance.randrange(8)
        path.write_bytes(spoilt)
        verified = verify_run(str(run))
        if verified.damaged:
            assert_one_damaged(verified, 0, "")
            found += 1
        else:  # a bit of a page's header that no reader looks at
            assert pq.read_table(path).equals(table)
    assert found > 45


def footer_bytes(whole: bytes) -> int:
    return int.from_bytes(whole[-8:-4], "little") + 8


def column_bytes(path: Path, name: str) -> range:
    """Where a column of the first row group lies in the file."""
    group = pq.read_metadata(path).row_group(0)
    columns = (group.column(index) for index in range(group.num_columns))
    column = next(column for column in columns if column.path_in_schema == name)
    return range(column.data_page_offset, column.data_page_offset + column.total_compressed_size)


def test_wrong_limits_in_the_footer_are_found(run: Path) -> None:
    path = shard(run, 0)
    whole = path.read_bytes()
    at = len(whole) - footer_bytes(whole)
    three, two = (3).to_bytes(8, "little"), (2).to_bytes(8, "little")
    path.write_bytes(whole[:at] + whole[at:].replace(three, two, 2))  # the largest image_id, which is stated twice
    assert_one_damaged(verify_run(str(run)), 0, "its footer has image_id from 0 to 2, its rows not")


@pytest.mark.parametrize("footers_only", [False, True])
def test_truncated_swapped_and_foreign_files(run: Path, footers_only: bool) -> None:
    whole = shard(run, 1).read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 1):
        shard(run, 1).write_bytes(whole[:size])
        assert_one_damaged(verify_run(str(run), footers_only=footers_only), 1, "cannot be read")
    shutil.copy(shard(run, 0), shard(run, 1))
    assert_one_damaged(verify_run(str(run), footers_only=footers_only), 1, "it is shard 0")
    shard(run, 1).write_bytes(whole)
    rewrite(shard(run, 1), lambda table: table, fingerprint="0123456789abcdef")
    assert_one_damaged(verify_run(str(run), footers_only=footers_only), 1, "another run (fingerprint 0123456789ab...)")
    shard(run, 1).write_bytes(whole)
    rewrite(shard(run, 1), lambda table: table.slice(1))
    assert_one_damaged(verify_run(str(run), footers_only=footers_only), 1, "it has 3 rows for 4 images")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("uri", "elsewhere.jpg", "it has image 0 (elsewhere.jpg) where the manifest has 0 ("),
        ("image_id", 9, "it has image 9 ("),
        ("status", "fine", "image 0: unknown status 'fine'"),
        ("status", "timeout", "image 0: timeout, with labels or without a reason"),
        ("label_map", None, "image 0: ok, but label_map is null"),
        ("error", "oh", "image 0: ok, but error is set"),
        ("height", lambda value: value + 1, "image 0: a label map is not a zstd frame of"),
        ("confidence_mean", 1.5, "confidence_mean is"),
        ("labelled_fraction", lambda value: value - 1e-3, "image 0: its fractions do not fit its pixels"),
        ("segments", lambda value: value[1:], "image 0: its segments do not count the pixels of its label map"),
        ("confidence_map", None, "image 0: ok, but confidence_map is null"),
        ("confidence_map", lambda value: value[:-9], "image 0: a confidence map is not a zstd frame of"),
        (
            "confidence_map",
            lambda _: encode_confidence_map(np.ones((120, 90), np.float32), "zstd"),
            "its confidence map does not fit its mean confidences",
        ),
        ("components", None, "image 0: ok, but components is null"),
        ("components", [], "image 0: its components are not those of its label map"),
        (
            "components",
            lambda value: [{**value[0], "rle": value[0]["rle"][:-1]}, *value[1:]],
            "image 0: its components are not those of its label map",
        ),
        (
            "segments",
            lambda value: [{**value[0], "pixels": value[0]["pixels"] + 1}, *value[1:]],
            "its segments do not count",
        ),
    ],
)
def test_rows_that_contradict_manifest_contract_or_label_map(run: Path, name: str, value: object, said: str) -> None:
    rewrite(shard(run, 0), change_row(name, value))
    found = verify_run(str(run))
    assert [file.name for file in found.damaged] == ["shards/00000000.parquet"]
    assert any(said in problem for problem in found.damaged[0].problems), found.damaged
    assert verify_run(str(run), footers_only=True).exit_code == 0


def test_what_the_run_does_not_keep_does_not_belong_in_a_shard(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["job"].update(confidence_map="none", components=None)
    (run / "run.json").write_text(json.dumps(record))
    problems = verify_run(str(run)).damaged[0].problems
    assert "image 0: ok, but it has confidence_map, components, which the run has not" in problems


def test_a_class_that_the_vocabulary_does_not_have(run: Path) -> None:
    record = json.loads((run / "run.json").read_text())
    record["vocabulary"]["classes"] = record["vocabulary"]["classes"][:1]
    (run / "run.json").write_text(json.dumps(record))
    assert any(
        "has class" in problem and "of 1" in problem
        for file in verify_run(str(run)).damaged
        for problem in file.problems
    )


def test_the_shard_of_a_retry_is_checked_by_its_own_list(run: Path) -> None:
    rewrite(shard(run, 4), change_row("image_id", 3))
    assert_one_damaged(verify_run(str(run)), 4, "it has image 3 (")


def test_missing_shards_are_not_damaged_ones(run: Path) -> None:
    shard(run, 1).unlink()
    shard(run, 3).unlink()
    found = verify_run(str(run))
    assert (found.checked, found.missing, found.damaged, found.exit_code) == (3, [1, 3], [], 5)
    assert list(found.advice()) == [f"Label the missing shards: ovss-ray continue {run}"]


def test_stray_files_are_named(run: Path) -> None:
    strays = ["additions/note.txt", "manifest/00003-0123abcd-00000.parquet", "shards/00000000 (copy).parquet",
              "shards/00000009.parquet"]  # fmt: skip
    for name in strays:
        shutil.copy(shard(run, 0), run / name)
    found = verify_run(str(run))
    assert (found.stray, found.damaged, found.exit_code) == (strays, [], 0)
    assert "Remove the stray files" in " ".join(found.advice())
    with open_run(run) as opened, pytest.raises(DamagedRunError, match=r"00000009.parquet is no part of the run"):
        opened.status_counts()
    (run / "shards" / "00000009.parquet").unlink()
    with open_run(run) as opened:
        (counted,) = opened.sql("SELECT count(*) FROM images").fetchall()
        assert counted == (opened.num_images,)


def test_a_damaged_manifest(run: Path) -> None:
    part = run / "manifest" / "00000.parquet"
    whole = part.read_bytes()
    part.write_bytes(whole[:50])
    found = verify_run(str(run))
    assert [file.name for file in found.damaged_manifest] == ["manifest/00000.parquet"]
    assert (found.damaged, found.exit_code) == ([], 6)
    group = pq.read_metadata(pa.BufferReader(whole)).row_group(1).column(1)
    middle = group.data_page_offset + group.total_compressed_size - 5
    part.write_bytes(whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :])
    assert "it cannot be read" in verify_run(str(run)).damaged_manifest[0].reason
    table = pq.read_table(pa.BufferReader(whole))
    pq.write_table(change_row("uri", "elsewhere.jpg")(table), part, row_group_size=4)
    (damaged,) = verify_run(str(run)).damaged_manifest
    assert "the digest differs" in damaged.reason
    pq.write_table(table, part, row_group_size=5)
    assert "are not shards of 4 images" in verify_run(str(run)).damaged_manifest[0].reason
    pq.write_table(table.slice(1), part, row_group_size=4)
    assert "it has 11 rows, its record says 12" in verify_run(str(run), footers_only=True).damaged_manifest[0].reason
    part.unlink()
    assert verify_run(str(run)).damaged_manifest[0].reason == "it is missing"


def test_a_damaged_table_of_classes_is_named_and_made_again(run: Path) -> None:
    path = run / "classes.parquet"
    sound = path.read_bytes()
    path.write_bytes(encode_classes(load_vocabulary("cat,dog,sky,grass")))
    found = verify_run(str(run), remove_damaged=True)
    assert [(file.name, file.reason) for file in found.damaged] == [
        ("classes.parquet", "its classes are not those of run.json")
    ]
    assert (found.removed, found.exit_code) == (["classes.parquet"], 5)
    continue_run(load_job(str(run)))
    assert path.read_bytes() == sound
    path.write_bytes(sound[:-5])
    assert verify_run(str(run), footers_only=True).exit_code == 6


def test_a_missing_record_of_an_addition_is_refused(run: Path) -> None:
    (run / "additions" / "00001.json").unlink()
    with pytest.raises(OvssError, match="additions/00001.json is missing"):
        verify_run(str(run))
    (run / "additions" / "00002.json").unlink()
    found = verify_run(str(run))
    assert found.stray[-2:] == ["shards/00000003.parquet", "shards/00000004.parquet"]


def test_damaged_shards_that_are_removed_are_labelled_again(finished: JobSpec, run: Path) -> None:
    for number in (0, 4):
        content = bytearray(shard(run, number).read_bytes())
        content[column_bytes(shard(run, number), "label_map")[-1]] ^= 1
        shard(run, number).write_bytes(content)
    found = verify_run(str(run), remove_damaged=True)
    assert found.removed == ["shards/00000000.parquet", "shards/00000004.parquet"]
    assert found.exit_code == 5
    assert not shard(run, 0).exists()
    continue_run(load_job(str(run)))
    again = verify_run(str(run))
    assert (again, again.exit_code) == (replace(found, checked=SHARDS, images=16, damaged=[], removed=[]), 0)
