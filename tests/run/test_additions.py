"""Runs that grow: new images, failed images once more; on a disk and on S3, killed and raced."""

from __future__ import annotations

import io
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovss_ray import open_run
from ovss_ray.errors import RunFailedError, RunMismatchError, SettingError
from ovss_ray.images.listing import list_images
from ovss_ray.images.stores import open_store
from ovss_ray.run import manifest as manifest_module
from ovss_ray.run.additions import KnownUris, check_job, continue_run, extend_run, load_job, retry_run
from ovss_ray.run.driver import run_job
from ovss_ray.run.manifest import digest_of
from ovss_ray.run.status import read_status
from ovss_ray.spec import JobSpec
from tests.run.conftest import draw_photos

MakeSpec = Callable[..., JobSpec]


class Folder:
    """A folder of pictures, local or in a bucket, that pictures can be put into and spoilt."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self._fs, self._root = open_store(uri)

    def put(self, *names: str, data: bytes | None = None) -> None:
        for name in names:
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(f"{self._root}/{name}", jpeg(len(name)) if data is None else data)


def jpeg(seed: int, size: tuple[int, int] = (70, 60)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (4, 5, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(sink, "JPEG")
    return sink.getvalue()


LOCAL_AND_S3 = pytest.mark.parametrize("place", ["local", "s3"], indirect=True)


@pytest.fixture
def place(request: pytest.FixtureRequest) -> str:
    """Where images and run are: a folder, or a bucket for those tests that ask for it."""
    return str(request.getfixturevalue("s3" if getattr(request, "param", "local") == "s3" else "tmp_path"))


@pytest.fixture
def folder(place: str) -> Folder:
    made = Folder(f"{place}/photos")
    made.put(*(f"{number}.jpg" for number in range(6)))
    return made


@pytest.fixture
def start(place: str, folder: Folder, make_spec: MakeSpec) -> Callable[..., JobSpec]:
    """Label the folder in shards of 4."""

    def label(**fields: object) -> JobSpec:
        spec = make_spec(**{"input": folder.uri, "run": f"{place}/run", "shard_size": 4, **fields})
        run_job(spec)
        return spec

    return label


def names(run: str, where: str = "true") -> list[str]:
    """The images that the run has rows of, by ascending id."""
    with open_run(run) as opened:
        rows = opened.sql(f"SELECT image_id, uri FROM images WHERE {where} ORDER BY image_id").fetchall()
        assert len({image_id for image_id, _ in rows}) == len(rows)
        return [uri.rsplit("/", 1)[1] for _, uri in rows]


def files_of(run: str) -> list[str]:
    fs, root = open_store(run)
    fs.invalidate_cache()
    return sorted(path.removeprefix(f"{root}/") for path in fs.find(root))


FIRST = [f"{number}.jpg" for number in range(6)]


class TestExtend:
    @LOCAL_AND_S3
    def test_images_that_are_new_are_added_and_labelled(self, start: Callable[..., JobSpec], folder: Folder) -> None:
        spec = start()
        folder.put("0b.jpg", "9.jpg", "a.jpg", "b.jpg", "c.jpg", "d.txt")
        job = load_job(spec.run)
        addition = extend_run(job)
        assert addition is not None
        assert (addition.kind, addition.images, addition.settings["input"]) == ("extend", 5, job.spec.input)
        assert digest_of(addition.parts, job.directory) == addition.digest
        assert names(spec.run) == FIRST
        summary = continue_run(load_job(spec.run))
        assert (summary.images, summary.labelled, summary.shards) == (11, 11, 4)
        assert names(spec.run) == [*FIRST, "0b.jpg", "9.jpg", "a.jpg", "b.jpg", "c.jpg"]
        with open_run(spec.run) as run:
            assert (run.num_images, run.num_shards) == (11, 4)
            assert run.label_map(10).shape == (60, 70)

    def test_nothing_new_leaves_the_run_as_it_is(self, start: Callable[..., JobSpec]) -> None:
        spec = start()
        before = files_of(spec.run)
        assert extend_run(load_job(spec.run)) is None
        assert continue_run(load_job(spec.run)).labelled == 6
        assert files_of(spec.run) == before

    def test_the_command_that_started_the_run_labels_additions_too(
        self, start: Callable[..., JobSpec], folder: Folder
    ) -> None:
        spec = start()
        folder.put("new.jpg")
        extend_run(load_job(spec.run))
        folder.put("later.jpg")
        summary = run_job(spec)
        assert (summary.images, summary.labelled) == (7, 7)
        assert names(spec.run) == [*FIRST, "new.jpg"]
        assert run_job(spec).images == 7

    def test_a_limit_counts_new_images_and_that_of_the_run_is_over(self, start: Callable[..., JobSpec]) -> None:
        spec = start(limit=2)
        extend_run(load_job(spec.run), {"limit": 3})
        assert continue_run(load_job(spec.run)).images == 5
        extend_run(load_job(spec.run))
        assert run_job(spec).images == 6
        assert names(spec.run) == FIRST

    def test_a_sample_holds_for_new_images_and_can_be_made_larger(
        self, start: Callable[..., JobSpec], folder: Folder
    ) -> None:
        folder.put(*(f"x{number}.jpg" for number in range(20)))
        spec = start(sample=0.4)
        folder.put(*(f"y{number}.jpg" for number in range(20)))
        for sample in (None, 0.7):
            extend_run(load_job(spec.run), {"sample": sample} if sample else {})
            continue_run(load_job(spec.run))
            expected = [ref.uri.rsplit("/", 1)[1] for ref in list_images(folder.uri, sample=sample or 0.4)]
            assert sorted(names(spec.run)) == sorted(expected)
        assert 0 < len(expected) < 46

    def test_another_input(self, start: Callable[..., JobSpec], place: str) -> None:
        spec = start()
        other = Folder(f"{place}/other")
        other.put("0.jpg", "z.jpg")
        addition = extend_run(load_job(spec.run), {"input": other.uri, "extensions": "jpg"})
        assert addition is not None
        assert addition.settings["extensions"] == ("jpg",)
        continue_run(load_job(spec.run))
        assert names(spec.run) == [*FIRST, "0.jpg", "z.jpg"]

    @LOCAL_AND_S3
    def test_of_two_at_the_same_time_one_is_told_to_try_again(
        self, start: Callable[..., JobSpec], folder: Folder
    ) -> None:
        spec = start()
        folder.put("new.jpg")
        mine, theirs = load_job(spec.run), load_job(spec.run)
        extend_run(theirs)
        after = files_of(spec.run)
        with pytest.raises(RunFailedError, match=r"another process has just added images .*additions/00001.json"):
            extend_run(mine)
        assert files_of(spec.run) == after
        assert extend_run(load_job(spec.run)) is None
        assert continue_run(load_job(spec.run)).images == 7


def test_a_list_with_repetitions_adds_each_image_once(
    make_spec: MakeSpec, tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(manifest_module, "ROWS_PER_PART", 8)
    paths = [str(path) for path in sorted(photos.rglob("*.jpg"))]
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join([*paths[:3], paths[0]]))
    spec = make_spec(input=str(listed), shard_size=4)
    run_job(spec)
    listed.write_text("\n".join([*paths[::-1], *paths]))
    addition = extend_run(load_job(spec.run))
    assert addition is not None
    assert (addition.images, [part.rows for part in addition.parts]) == (37, [8, 8, 8, 8, 5])
    continue_run(load_job(spec.run))
    with open_run(spec.run) as run:
        uris = run.images(["uri"])["uri"].to_pylist()
    assert uris == [*paths[:3], paths[0], *paths[:2:-1]]


def test_settings_that_change_labels_are_refused_before_anything_is_added(make_spec: MakeSpec) -> None:
    spec = make_spec(limit=4)
    run_job(spec)
    check_job(load_job(spec.run, {"batch_size": 3, "max_pixels": 10**9}))
    for changes, said in (({"dtype": "bfloat16"}, "dtype"), ({"clip": "ovss-demo/random:7"}, "weights")):
        with pytest.raises(RunMismatchError, match=said):
            check_job(load_job(spec.run, changes))
    with pytest.raises(SettingError, match="command line: batch_size = 'many'"):
        load_job(spec.run, {"batch_size": "many"})
    with pytest.raises(SettingError, match="there is no run directory"):
        load_job(f"{spec.run}s")


def test_the_vocabulary_file_of_the_run_is_not_needed(make_spec: MakeSpec, tmp_path: Path) -> None:
    classes = tmp_path / "classes.txt"
    classes.write_text("cat: kitten\ndog\n")
    spec = make_spec(classes=str(classes), limit=4)
    run_job(spec)
    classes.unlink()
    extend_run(load_job(spec.run), {"limit": 3})
    assert continue_run(load_job(spec.run)).labelled == 7


KILLED = """
import os, signal, sys
from ovss_ray.run import additions, manifest
manifest.ROWS_PER_PART = 4
listed = additions.images_of
def list_then_die(*arguments, **settings):
    for number, image in enumerate(listed(*arguments, **settings)):
        if number == 46:
            os.kill(os.getpid(), signal.SIGKILL)
        yield image
additions.images_of = list_then_die
additions._BATCH = 4
additions.extend_run(additions.load_job(sys.argv[1]), {"input": sys.argv[2]})
"""


def test_an_extension_that_was_killed_leaves_the_run_as_it_was(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(limit=4, shard_size=4)
    run_job(spec)
    more = draw_photos(tmp_path / "more", 60, seed=5)
    killed = subprocess.run([sys.executable, "-c", KILLED, spec.run, str(more)], capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    orphans = [name for name in files_of(spec.run) if name.startswith("manifest/00001-")]
    assert len(orphans) > 3
    assert run_job(spec).images == 4
    with open_run(spec.run) as run:
        assert run.num_images == 4
    addition = extend_run(load_job(spec.run), {"input": str(more)})
    assert addition is not None
    assert addition.images == 60
    assert [name for name in files_of(spec.run) if name.startswith("manifest/")] == sorted(
        ["manifest/00000.parquet", *(part.name for part in addition.parts)]
    )


class TestRetry:
    @pytest.fixture
    def failed(self, start: Callable[..., JobSpec], folder: Folder) -> JobSpec:
        """6 good images, 2 corrupt ones, one that is no image; in shards of 4."""
        folder.put("bad1.jpg", "bad2.jpg", data=jpeg(1)[:300])
        folder.put("text.jpg", data=b"Dear reader, this is not a photograph.\n")
        return start()

    @LOCAL_AND_S3
    def test_what_failed_is_labelled_and_counts_once(self, failed: JobSpec, folder: Folder) -> None:
        assert names(failed.run, "status = 'ok'") == FIRST
        folder.put("bad1.jpg")
        addition = retry_run(load_job(failed.run))
        assert addition is not None
        assert (addition.kind, addition.images) == ("retry", 3)
        summary = continue_run(load_job(failed.run))
        assert (summary.images, summary.shards, summary.statuses) == (9, 4, {"ok": 7, "corrupt": 1, "unsupported": 1})
        folder.put("text.jpg")
        retry_run(load_job(failed.run), ["unsupported"])
        assert continue_run(load_job(failed.run)).statuses == {"ok": 8, "corrupt": 1}
        with open_run(failed.run) as run:
            assert len(dict(run.label_maps())) == 8
            assert (run.num_images, run.num_shards) == (9, 5)
        assert names(failed.run, "status = 'corrupt'") == ["bad2.jpg"]

    def test_images_that_fail_again_stop_nothing_and_others_still_do(
        self, start: Callable[..., JobSpec], folder: Folder
    ) -> None:
        spec = start()
        folder.put(*(f"bad{number:02}.jpg" for number in range(30)), data=b"\xff\xd8\xff")
        extend_run(load_job(spec.run))
        assert continue_run(load_job(spec.run, {"max_failed_fraction": 1})).failed == 30
        retry_run(load_job(spec.run))
        summary = continue_run(load_job(spec.run))  # as `ovss-ray continue` does after a retry that was stopped
        assert (summary.labelled, summary.failed) == (6, 30)
        retry_run(load_job(spec.run))
        folder.put(*(f"ill{number:02}.jpg" for number in range(30)), data=b"\xff\xd8\xff")
        extend_run(load_job(spec.run))
        with pytest.raises(RunFailedError, match="of the first .* images failed"):
            continue_run(load_job(spec.run))

    def test_a_run_whose_last_images_are_its_bad_ones_can_be_continued(self, place: str, make_spec: MakeSpec) -> None:
        folder = Folder(f"{place}/many")
        folder.put(*(f"{number:03}.jpg" for number in range(90)))
        folder.put(*(f"bad{number:02}.jpg" for number in range(21)), data=b"\xff\xd8\xff")
        spec = make_spec(input=folder.uri, run=f"{place}/run", shard_size=30)
        assert run_job(spec).failed == 21
        (Path(spec.run) / "shards/00000003.parquet").unlink()
        assert continue_run(load_job(spec.run)).failed == 21

    def test_nothing_to_do(self, failed: JobSpec) -> None:
        before = files_of(failed.run)
        assert retry_run(load_job(failed.run), ["timeout", "crashed"]) is None
        assert files_of(failed.run) == before

    def test_images_that_wait_for_their_retry_are_not_added_again(self, failed: JobSpec, folder: Folder) -> None:
        retry_run(load_job(failed.run), ["corrupt"])
        addition = retry_run(load_job(failed.run))
        assert addition is not None
        assert addition.images == 1
        folder.put("bad1.jpg", "bad2.jpg", "text.jpg")
        assert run_job(failed).labelled == 9

    def test_images_that_were_added_later_can_be_retried(self, failed: JobSpec, folder: Folder) -> None:
        folder.put("later.jpg", data=b"\xff\xd8\xff")
        extend_run(load_job(failed.run))
        assert continue_run(load_job(failed.run)).images == 10
        folder.put("later.jpg", "text.jpg")
        retry_run(load_job(failed.run))
        assert continue_run(load_job(failed.run)).statuses == {"ok": 8, "corrupt": 2}
        assert names(failed.run)[9] == "later.jpg"


class TestRetryOfImagesThatAreTooLarge:
    @pytest.fixture
    def capped(self, make_spec: MakeSpec, tmp_path: Path) -> JobSpec:
        folder = Folder(str(tmp_path / "photos"))
        folder.put("a.jpg", "b.jpg")
        folder.put("large.jpg", data=jpeg(1, (200, 100)))
        spec = make_spec(input=folder.uri, max_pixels=10_000)
        assert run_job(spec).statuses == {"ok": 2, "too_large": 1}
        return spec

    def test_a_larger_limit_holds_for_them_alone(self, capped: JobSpec) -> None:
        job = load_job(capped.run, {"max_pixels": 20_000})
        addition = retry_run(job)
        assert addition is not None
        assert addition.max_pixels == 20_000
        Folder(capped.input).put("large2.jpg", data=jpeg(1, (200, 100)))
        extend_run(load_job(capped.run))
        assert run_job(capped).statuses == {"ok": 3, "too_large": 1}
        assert names(capped.run, "status = 'too_large'") == ["large2.jpg"]
        with open_run(capped.run) as run:
            assert run.label_map(2).shape == (100, 200)

    def test_a_larger_limit_of_bytes_holds_for_them_alone(self, capped: JobSpec, make_spec: MakeSpec) -> None:
        spec = make_spec(input=capped.input, run=f"{capped.run}-bytes", max_bytes="2000")
        assert run_job(spec).statuses == {"ok": 2, "too_large": 1}
        with pytest.raises(SettingError, match="max_bytes = 1024 is less than the run's 2000"):
            retry_run(load_job(spec.run, {"max_bytes": "1KiB"}))
        job = load_job(spec.run, {"max_bytes": "1MiB", "max_pixels": spec.max_pixels + 1})
        addition = retry_run(job)
        assert addition is not None
        assert (addition.max_bytes, addition.max_pixels) == (1 << 20, spec.max_pixels + 1)
        Folder(spec.input).put("large2.jpg", data=jpeg(1, (200, 100)))
        extend_run(load_job(spec.run))
        assert continue_run(job).statuses == {"ok": 3, "too_large": 1}
        with open_run(spec.run) as run:
            assert run.image(2).shape == (100, 200, 3)
        with pytest.raises(RunMismatchError, match=r"decoding\.max_bytes: the run has 2000, asked for 3000"):
            run_job(make_spec(input=capped.input, run=spec.run, max_bytes=3000))

    def test_shards_that_were_not_finished_are_labelled_with_them(self, capped: JobSpec) -> None:
        job = load_job(capped.run, {"max_pixels": 20_000})
        retry_run(job)
        for name in ("shards/00000000.parquet", "summary.json"):
            (Path(capped.run) / name).unlink()
        summary = continue_run(job)
        assert (summary.statuses, summary.labelled, summary.failed) == ({"ok": 3}, 3, 0)
        state = read_status(capped.run)
        assert (state.activity, state.shards_done) == ("finished", 2)
        assert (state.drivers[0]["images_done"], state.drivers[0]["shards_done"]) == (4, 2)
        assert (Path(capped.run) / "summary.json").exists()

    def test_the_same_command_with_nothing_left_to_do(self, capped: JobSpec) -> None:
        job = load_job(capped.run, {"max_pixels": 20_000})
        assert retry_run(job, ["timeout"]) is None
        assert continue_run(job).statuses == {"ok": 2, "too_large": 1}

    def test_a_smaller_limit_and_an_unknown_status_are_refused(self, capped: JobSpec) -> None:
        with pytest.raises(SettingError, match="max_pixels = 5000 is less than the run's 10000"):
            retry_run(load_job(capped.run, {"max_pixels": 5000}))
        with pytest.raises(SettingError, match="did you mean 'too_large'"):
            retry_run(load_job(capped.run), ["to_large"])


@given(batches=st.lists(st.lists(st.integers(0, 60).map(str), max_size=30), max_size=12))
def test_known_uris_are_a_set(batches: list[list[str]]) -> None:
    known, reference = KnownUris(), set()
    for batch in batches:
        expected = []
        for uri in batch:
            expected.append(uri not in reference)
            reference.add(uri)
        assert known.add(batch).tolist() == expected
