"""The layout of a run: shards, images and parts agree, however a manifest has grown."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st

from ovss_ray.errors import OvssError
from ovss_ray.images.limits import Limits
from ovss_ray.labels.additions import Addition, grown, read_additions
from ovss_ray.labels.layout import Manifest, Part, addition_name

LATER_PARTS = st.builds(
    Part, st.just("p"), st.integers(1, 40), st.booleans(), st.sampled_from([Limits(), Limits(9), Limits(9, 5)])
)
PARTS = st.lists(LATER_PARTS, min_size=1, max_size=6).map(lambda parts: (Part("p", 7), *parts))


def enumerated(manifest: Manifest) -> list[list[tuple[int, int | None]]]:
    """Shard by shard the (part, image id) of each row, counted one by one; the id is None where images come again."""
    shards: list[list[tuple[int, int | None]]] = []
    next_id = 0
    for index, part in enumerate(manifest.parts):
        for row in range(part.rows):
            if row % manifest.shard_size == 0:
                shards.append([])
            shards[-1].append((index, None if part.retry else next_id))
            next_id += not part.retry
    return shards


@given(parts=PARTS, shard_size=st.integers(1, 12))
def test_shards_images_and_parts_agree_with_counting_them_one_by_one(parts: tuple[Part, ...], shard_size: int) -> None:
    manifest = Manifest(shard_size, "d", parts)
    shards = enumerated(manifest)
    assert manifest.shards == len(shards)
    assert manifest.rows == sum(map(len, shards))
    ids = [image_id for shard in shards for _, image_id in shard if image_id is not None]
    assert ids == list(range(manifest.images))
    retries = {shard for shards_of in manifest.retry_shards for shard in shards_of}
    for number, rows in enumerate(shards):
        part, group = manifest.place_of(number)
        assert {row[0] for row in rows} == {part}
        assert manifest.shards_of(part)[group] == number
        assert manifest.images_in(number) == len(rows)
        assert manifest.first_id(number) == rows[0][1]
        assert (number in retries) == parts[part].retry
        assert manifest.is_retry(number) == parts[part].retry
        for position, (_, image_id) in enumerate(rows):
            if image_id is not None:
                assert manifest.home_of(image_id) == (number, position)


def test_a_manifest_survives_its_record() -> None:
    manifest = Manifest(5, "d", (Part("manifest/00000.parquet", 10), Part("manifest/00001.parquet", 3)))
    assert Manifest.from_json(json.loads(json.dumps(manifest.to_json()))) == manifest


def write_additions(root: Path, *numbers: int) -> None:
    (root / "additions").mkdir(parents=True, exist_ok=True)
    for number in numbers:
        parts = (Part(f"manifest/{number:05d}-x-00000.parquet", number),)
        addition = Addition(
            kind="retry" if number % 2 else "extend", created_at="2026-01-01T00:00:00+00:00", package_version="0",
            settings={}, images=number, digest="d", parts=parts, max_pixels=100 * number,
        )  # fmt: skip
        (root / addition_name(number)).write_text(addition.model_dump_json())


def test_additions_come_in_their_order(tmp_path: Path) -> None:
    fs = LocalFileSystem()
    assert read_additions(fs, str(tmp_path), "run") == []
    write_additions(tmp_path, *range(1, 12))
    (tmp_path / "additions" / "notes.txt").write_text("not a record")
    additions = read_additions(fs, str(tmp_path), "run")
    assert [addition.images for addition in additions] == list(range(1, 12))
    manifest = grown(Manifest(4, "d", (Part("manifest/00000.parquet", 9),)), additions)
    assert manifest.images == 9 + sum(range(2, 12, 2))
    assert [part.retry for part in manifest.parts] == [False, *(number % 2 == 1 for number in range(1, 12))]
    assert manifest.parts[3].limits == Limits(300)


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ({"remove": 1}, r"run/additions/00001.json is missing; restore it"),
        ({"write": "{"}, r"run/additions/00002.json is damaged"),
        ({"write": "{}"}, r"run/additions/00002.json is damaged \(Field required\)"),
        ({"format_version": 2}, "has format 2 and this ovss-ray reads 1; upgrade"),
    ],
)
def test_records_that_cannot_be_trusted_are_refused(tmp_path: Path, broken: dict[str, object], said: str) -> None:
    write_additions(tmp_path, 1, 2, 3)
    record = tmp_path / addition_name(2)
    if "remove" in broken:
        (tmp_path / addition_name(1)).unlink()
    elif "write" in broken:
        record.write_text(str(broken["write"]))
    else:
        record.write_text(json.dumps({**json.loads(record.read_text()), **broken}))
    with pytest.raises(OvssError, match=said):
        read_additions(LocalFileSystem(), str(tmp_path), "run")
