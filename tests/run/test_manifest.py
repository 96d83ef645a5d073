"""The manifest: what is planned is what every shard reads, in order, whatever the sizes."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ovss_ray.errors import RunFailedError
from ovss_ray.images.listing import ImageRef
from ovss_ray.labels.layout import Manifest
from ovss_ray.run import manifest as manifest_module
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.manifest import (
    ManifestReader,
    choose_shard_size,
    digest_of,
    remove_stray_parts,
    stored_images,
    stored_uris,
    write_manifest,
)


def refs(count: int) -> list[ImageRef]:
    return [
        ImageRef(f"/photos/{n:06d}.jpg", None if n % 3 == 0 else n, None if n % 2 else f"tag{n}") for n in range(count)
    ]


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(str(tmp_path / "run"))
    made.prepare()
    return made


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 200), shard_size=st.integers(1, 50), rows_per_part=st.integers(1, 90))
def test_shards_partition_the_images_in_order(
    tmp_path_factory: pytest.TempPathFactory, count: int, shard_size: int, rows_per_part: int
) -> None:
    directory = RunDirectory(str(tmp_path_factory.mktemp("run")))
    directory.prepare()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_module, "ROWS_PER_PART", rows_per_part)
        manifest = write_manifest(iter(refs(count)), directory, shard_size)
        assert manifest.images == count
        reader = ManifestReader(Manifest.from_json(manifest.to_json()), directory)
        rows = []
        for shard in range(manifest.shards):
            of_shard = reader.rows(shard)
            assert len(of_shard) == manifest.images_in(shard)
            rows += of_shard
    assert [row.image_id for row in rows] == list(range(count))
    assert [(row.uri, row.size_bytes) for row in rows] == [(ref.uri, ref.size_bytes) for ref in refs(count)]


def test_one_row_group_per_shard(directory: RunDirectory) -> None:
    write_manifest(iter(refs(25)), directory, 10)
    footer = pq.read_metadata(directory.path("manifest/00000.parquet"))
    assert [footer.row_group(group).num_rows for group in range(footer.num_row_groups)] == [10, 10, 5]


def test_the_digest_depends_on_every_field_and_on_the_order(directory: RunDirectory) -> None:
    def digest(images: list[ImageRef], shard_size: int = 4) -> str:
        return write_manifest(iter(images), directory, shard_size).digest

    base = refs(10)
    assert digest(base) == digest(refs(10)) == digest(base, 3)
    changed = [
        base[::-1],
        base[:-1],
        [*base[:-1], ImageRef("/photos/other.jpg", base[-1].size_bytes, base[-1].etag)],
        [*base[:-1], ImageRef(base[-1].uri, 99999, base[-1].etag)],
        [*base[:-1], ImageRef(base[-1].uri, base[-1].size_bytes, "other")],
    ]
    assert len({digest(base), *map(digest, changed)}) == 1 + len(changed)


def test_parts_of_another_planning_are_left_alone_until_this_one_counts(
    directory: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "ROWS_PER_PART", 10)
    other = write_manifest(iter(refs(45)), directory, 5)
    manifest = write_manifest(iter(refs(12)), directory, 5)
    assert len(directory.files_in("manifest")) == 7
    assert [len(ManifestReader(other, directory).rows(shard)) for shard in range(9)] == [5] * 9
    addition = "manifest/00001-0123abcd-00000.parquet"
    directory.create(addition, b"of a process that extends the run")
    remove_stray_parts(manifest, directory)
    assert directory.files_in("manifest") == sorted([addition, *(part.name for part in manifest.parts)])


def test_planning_holds_one_part_at_most(directory: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(manifest_module, "ROWS_PER_PART", 100)
    ahead = []

    def images() -> Iterator[ImageRef]:
        for number, ref in enumerate(refs(1000)):
            ahead.append(number - 100 * len(directory.files_in("manifest")))
            yield ref

    write_manifest(images(), directory, 10)
    assert max(ahead) <= 100


@pytest.mark.parametrize(("count", "size"), [(1, 16), (300, 16), (5_000, 79), (70_000, 1024)])
def test_small_inputs_get_small_shards(count: int, size: int) -> None:
    chosen, images = choose_shard_size(iter(refs(count)))
    assert chosen == size
    assert sum(1 for _ in images) == count


def test_a_manifest_that_was_changed_is_refused(directory: RunDirectory) -> None:
    manifest = write_manifest(iter(refs(25)), directory, 10)
    part = Path(directory.path(manifest.parts[0].name))
    other = write_manifest(iter(refs(24)), directory, 10)
    part.write_bytes(Path(directory.path(other.parts[0].name)).read_bytes())
    with pytest.raises(RunFailedError, match="does not fit run.json"):
        ManifestReader(manifest, directory).rows(0)
    directory.remove("manifest/00000.parquet")
    with pytest.raises(RunFailedError, match="is missing"):
        ManifestReader(manifest, directory).rows(0)


@settings(max_examples=40, deadline=None)
@given(data=st.data(), count=st.integers(1, 120), shard_size=st.integers(1, 20), rows_per_part=st.integers(1, 50))
def test_chosen_images_and_all_uris_come_back_as_planned(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, count: int, shard_size: int, rows_per_part: int
) -> None:
    directory = RunDirectory(str(tmp_path_factory.mktemp("run")))
    directory.prepare()
    planned = refs(count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manifest_module, "ROWS_PER_PART", rows_per_part)
        manifest = write_manifest(iter(planned), directory, shard_size)
    chosen = sorted(data.draw(st.sets(st.integers(0, count - 1))))
    assert list(stored_images(chosen, manifest, directory)) == [(number, planned[number]) for number in chosen]
    assert [uri for uris in stored_uris(manifest, directory) for uri in uris] == [ref.uri for ref in planned]
    assert digest_of(manifest.parts, directory) == manifest.digest
