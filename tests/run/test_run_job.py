"""Whole runs inside this process and on a real embedded Ray."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import ray
from PIL import Image
from pycocotools import mask as coco_mask
from scipy import ndimage

from ovss_ray import open_run
from ovss_ray.errors import InputError, RunFailedError, RunMismatchError, SettingError, WeightsError
from ovss_ray.labels.shard import read_shard_metadata
from ovss_ray.run import worker as worker_module
from ovss_ray.run.driver import run_job
from ovss_ray.run.status import read_status
from ovss_ray.run.verify import verify_run
from ovss_ray.segmenters import load_segmenter
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import load_vocabulary
from tests.run.conftest import CLIP

MakeSpec = Callable[..., JobSpec]


@pytest.fixture(scope="module")
def embedded_ray() -> Iterator[None]:
    """One Ray for the tests of this module; `run_job` uses a Ray that is already there."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


def files_of(run: str) -> list[str]:
    names = (str(path.relative_to(run)) for path in Path(run).rglob("*") if path.is_file())
    return sorted(name for name in names if not name.startswith("drivers/"))  # one, of the last driver


def label_maps(run: str) -> dict[str, np.ndarray]:
    with open_run(run) as opened:
        uris = dict(opened.sql("SELECT image_id, uri FROM images").fetchall())
        return {uris[image_id]: labels for image_id, labels in opened.label_maps()}


def test_a_run_leaves_exactly_the_files_of_the_design(make_spec: MakeSpec) -> None:
    spec = make_spec()
    summary = run_job(spec)
    assert (summary.images, summary.labelled, summary.shards) == (40, 40, 5)
    shards = [f"shards/{shard:08d}.parquet" for shard in range(5)]
    others = ["classes.parquet", "manifest/00000.parquet", "run.json", "summary.json", "text.parquet"]
    assert files_of(spec.run) == sorted([*others, *shards])
    assert not (Path(spec.run) / ".tmp").exists()


def test_labels_are_those_of_the_segmenter_alone(make_spec: MakeSpec) -> None:
    spec = make_spec()
    run_job(spec)
    segmenter = load_segmenter("maskclip", clip=CLIP)
    text = segmenter.encode_vocabulary(load_vocabulary("cat,dog,grass,sky", templates="single"))
    for uri, labels in list(label_maps(spec.run).items())[::9]:
        pixels = np.asarray(Image.open(uri).convert("RGB"))
        (alone,) = segmenter.segment([pixels], text)
        np.testing.assert_array_equal(labels, alone.labels)


def test_the_statistics_are_those_of_the_label_maps(make_spec: MakeSpec) -> None:
    spec = make_spec()
    run_job(spec)
    maps = label_maps(spec.run)
    with open_run(spec.run) as run:
        rows = run.sql("SELECT uri, class_name, pixels, area_fraction FROM segments").fetchall()
    counted = {
        (uri, name): (labels == number).sum()
        for uri, labels in maps.items()
        for number, name in enumerate(["cat", "dog", "grass", "sky"])
        if (labels == number).any()
    }
    assert {(uri, name): pixels for uri, name, pixels, _ in rows} == counted
    for uri, _, pixels, fraction in rows:
        assert fraction == pytest.approx(pixels / maps[uri].size)


def test_plain_duckdb_reads_the_shards(make_spec: MakeSpec) -> None:
    spec = make_spec()
    run_job(spec)
    query = f"""
        SELECT segment.class_id, count(*), sum(segment.pixels)
        FROM (SELECT unnest(segments) AS segment FROM read_parquet('{spec.run}/shards/*.parquet'))
        GROUP BY 1 ORDER BY 1
    """
    with duckdb.connect() as connection:
        rows = connection.sql(query).fetchall()
    pixels = sum(labels.size for labels in label_maps(spec.run).values())
    assert sum(row[2] for row in rows) == pixels


def test_batching_shard_size_and_actors_do_not_change_labels(
    make_spec: MakeSpec, tmp_path: Path, embedded_ray: None
) -> None:
    variants = [
        {"run": str(tmp_path / "one"), "batch_size": 1, "shard_size": 40},
        {"run": str(tmp_path / "two"), "batch_size": 16, "shard_size": 7},
        {"run": str(tmp_path / "tiny-memory"), "batch_size": 5, "shard_size": 9, "prefetch_mib": 1},
        {"run": str(tmp_path / "ray"), "engine": "ray", "workers": 2, "shard_size": 3},
    ]
    found = []
    for variant in variants:
        run_job(make_spec(**variant))
        found.append(label_maps(variant["run"]))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        pixels = np.concatenate([found[0][uri].ravel() for uri in other])
        agree = np.concatenate([other[uri].ravel() for uri in other]) == pixels
        # Another batch shape rounds differently in the last bit, which can tip a pixel that was a tie.
        assert agree.mean() > 0.9999


def test_both_engines_use_all_their_workers(make_spec: MakeSpec, embedded_ray: None) -> None:
    spec = make_spec(engine="ray", workers=2, shard_size=2)
    run_job(spec)
    pids = {read_shard_metadata(f"{spec.run}/shards/{shard:08d}.parquet")["pid"] for shard in range(20)}
    assert len(pids) == 2
    assert str(os.getpid()) not in pids


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_the_times_of_the_last_shard_count_too(make_spec: MakeSpec, embedded_ray: None, engine: str) -> None:
    session = run_job(make_spec(engine=engine, workers=1, limit=4)).session
    assert session is not None
    assert session["stage_seconds"]["segment"] > 0


def test_bad_files_become_rows_that_say_why(make_spec: MakeSpec, photos: Path, tmp_path: Path) -> None:
    folder = tmp_path / "mixed"
    folder.mkdir()
    good = sorted(photos.rglob("*.jpg"))[:6]
    for path in good:
        (folder / path.name).write_bytes(path.read_bytes())
    whole = good[0].read_bytes()
    Image.new("RGB", (3000, 2000)).save(folder / "huge.png")
    (folder / "corrupt.jpg").write_bytes(whole[:100] + bytes(200) + whole[300:500])
    (folder / "empty.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "zero.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("Dear reader, this is not a photograph.\n")
    (folder / "gone.jpg").write_bytes(whole)
    listed = tmp_path / "list.txt"
    listed.write_text("\n".join(str(path) for path in sorted(folder.iterdir())) + "\n")
    (folder / "gone.jpg").unlink()
    spec = make_spec(input=str(listed), max_pixels=1_000_000)
    summary = run_job(spec)
    with open_run(spec.run) as run:
        rows = {Path(uri).name: (status, error) for uri, status, error in run.sql(
            "SELECT uri, status, error FROM images WHERE status != 'ok'").fetchall()}  # fmt: skip
    assert {name: status for name, (status, _) in rows.items()} == {
        "huge.png": "too_large",
        "corrupt.jpg": "corrupt",
        "empty.jpg": "corrupt",
        "zero.jpg": "corrupt",
        "text.jpg": "unsupported",
        "gone.jpg": "not_found",
    }
    assert all(len(error) > 5 for _, error in rows.values())
    assert (summary.labelled, summary.failed) == (6, 6)
    assert sum(failure["images"] for failure in summary.failures) == 6
    assert {failure["error"] for failure in summary.failures} <= {error for _, error in rows.values()}
    assert summary.failure_kinds == len(summary.failures)


def test_an_image_on_which_the_method_fails_becomes_a_crashed_row(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fussy:
        """The real segmenter, but for one size of image."""

        def __init__(self, segmenter: object) -> None:
            self._segmenter = segmenter

        def __getattr__(self, name: str) -> object:
            return getattr(self._segmenter, name)

        def segment(self, images: list[np.ndarray], text: object, **options: object) -> object:
            if any(image.shape[:2] == (64, 64) for image in images):
                raise RuntimeError("this size is too small for me")
            return self._segmenter.segment(images, text, **options)  # type: ignore[attr-defined]

    monkeypatch.setattr(worker_module, "load_segmenter", lambda *a, **k: Fussy(load_segmenter(*a, **k)))
    summary = run_job(make_spec())
    assert summary.statuses == {"ok": 30, "crashed": 10}
    assert summary.failures[0]["error"] == "RuntimeError: this size is too small for me"


def test_a_finished_run_is_left_as_it_is(make_spec: MakeSpec) -> None:
    spec = make_spec()
    run_job(spec)
    before = {name: (Path(spec.run) / name).stat().st_mtime_ns for name in files_of(spec.run)}
    again = run_job(spec)
    assert again.labelled == 40
    assert {name: (Path(spec.run) / name).stat().st_mtime_ns for name in files_of(spec.run)} == before


def test_continuing_labels_only_what_is_missing(make_spec: MakeSpec) -> None:
    spec = make_spec()
    run_job(spec)
    expected = label_maps(spec.run)
    shards = Path(spec.run) / "shards"
    kept = {
        path.name: path.read_bytes()
        for path in shards.iterdir()
        if path.name not in ("00000001.parquet", "00000004.parquet")
    }
    (shards / "00000001.parquet").unlink()
    (shards / "00000004.parquet").unlink()
    assert read_status(spec.run).shards_done == 3
    run_job(spec.model_copy(update={"batch_size": 3}))
    assert {name: (shards / name).read_bytes() for name in kept} == kept
    again = label_maps(spec.run)
    assert again.keys() == expected.keys()


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"classes": "cat,dog"}, "vocabulary.names: the run has .*sky.*, asked for"),
        ({"method": "clipbase"}, 'method: the run has "maskclip", asked for "clipbase"'),
        ({"settings": {"crop": 0}}, "settings.crop: the run has 96, asked for 0"),
        ({"templates": ["a picture of {}"]}, "templates"),
        ({"clip": "ovss-demo/random:7"}, "weights: the run has"),
        ({"dtype": "bfloat16"}, 'dtype: the run has "float32", asked for "bfloat16"'),
        ({"shard_size": 9}, "shard_size: the run has 8, asked for 9"),
        ({"limit": 3}, "input.limit: the run has null, asked for 3"),
        ({"label_map": "zstd"}, 'label_map: the run has "png", asked for "zstd"'),
        ({"confidence_map": "uint8"}, 'confidence_map: the run has "none", asked for "uint8"'),
        ({"components": 50}, "components: the run has null, asked for 50"),
    ],
)
def test_continuing_with_other_settings_is_refused_with_the_difference(
    finished: JobSpec, changed: dict[str, object], said: str
) -> None:
    before = files_of(finished.run)
    with pytest.raises(RunMismatchError, match=said):
        run_job(JobSpec.build({**finished.model_dump(), **changed}, source="test"))
    assert files_of(finished.run) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> JobSpec:
    values = {
        "input": str(photos), "run": str(tmp_path_factory.mktemp("finished") / "run"), "classes": "cat,dog,grass,sky",
        "templates": "single", "clip": CLIP, "engine": "local", "shard_size": 8, "limit": None,
    }  # fmt: skip
    spec = JobSpec.build(values, source="test")
    run_job(spec)
    return spec


def test_confidence_maps_and_components_are_those_of_the_segmenter_alone(make_spec: MakeSpec) -> None:
    spec = make_spec(limit=6, confidence_map="uint8", components=30, label_map="zstd")
    run_job(spec)
    segmenter = load_segmenter("maskclip", clip=CLIP)
    text = segmenter.encode_vocabulary(load_vocabulary("cat,dog,grass,sky", templates="single"))
    with open_run(spec.run) as run:
        listed = run.components().to_pylist()
        for image_id in range(6):
            alone = segmenter.segment(run.image(image_id), text)
            kept = run.confidence_map(image_id)
            assert np.abs(kept - 255 * alone.confidence.astype(np.float64)).max() <= 0.51
            own = [component for component in listed if component["image_id"] == image_id]
            numbered = {class_id: ndimage.label(alone.labels == class_id, np.ones((3, 3)))[0] for class_id in range(4)}
            sizes = [int(n) for found in numbered.values() for n in np.bincount(found.ravel())[1:] if n >= 30]
            assert sorted(component["pixels"] for component in own) == sorted(sizes)
            for component in own:
                size = [component["height"], component["width"]]
                mask = coco_mask.decode({"size": size, "counts": component["rle"]}).astype(bool)
                assert len(np.unique(numbered[component["class_id"]][mask])) == 1


def test_a_run_of_a_version_without_the_newer_settings_is_continued(make_spec: MakeSpec) -> None:
    spec = make_spec(limit=16)
    run_job(spec)
    record = Path(spec.run) / "run.json"
    stored = json.loads(record.read_text())
    for name in ("confidence_map", "components"):
        del stored["identity"][name], stored["job"][name]
    record.write_text(json.dumps(stored))
    (Path(spec.run) / "shards/00000001.parquet").unlink()
    assert run_job(spec).labelled == 16
    with pytest.raises(RunMismatchError, match='confidence_map: the run has "none", asked for "uint8"'):
        run_job(spec.model_copy(update={"confidence_map": "uint8"}))


def test_a_run_without_the_table_of_classes_is_read_and_gets_it_when_continued(make_spec: MakeSpec) -> None:
    """Older versions wrote none."""
    spec = make_spec(limit=8)
    run_job(spec)
    path = Path(spec.run) / "classes.parquet"
    written = path.read_bytes()
    path.unlink()
    with open_run(spec.run) as run:
        assert run.sql("SELECT class_name FROM classes ORDER BY class_id").fetchall()[1] == ("dog",)
    assert verify_run(spec.run).exit_code == 0
    run_job(spec)
    assert path.read_bytes() == written
    path.write_bytes(b"somebody's own")
    run_job(spec)
    assert path.read_bytes() == b"somebody's own"  # created, never replaced


def test_of_two_drivers_with_other_classes_those_of_the_run_are_in_the_table(make_spec: MakeSpec) -> None:
    def start(classes: str) -> str | None:
        try:
            run_job(make_spec(classes=classes))
        except RunMismatchError:
            return None
        return classes

    with ThreadPoolExecutor(2) as threads:
        (won,) = [classes for classes in threads.map(start, ("cat,dog", "tree,sky,sea")) if classes]
    run = make_spec().run
    assert ",".join(open_run(run).vocabulary.names) == won
    assert ",".join(pq.read_table(f"{run}/classes.parquet")["name"].to_pylist()) == won


def test_what_does_not_change_labels_may_change(finished: JobSpec) -> None:
    changed = {"batch_size": 2, "fetch_concurrency": 3, "workers": 2, "shard_size": "auto", "decode_threads": 1}
    assert run_job(JobSpec.build({**finished.model_dump(), **changed}, source="test")).labelled == 40


def test_every_footer_says_where_the_labels_come_from(finished: JobSpec) -> None:
    record = json.loads((Path(finished.run) / "run.json").read_text())
    metadata = read_shard_metadata(f"{finished.run}/shards/00000003.parquet")
    assert metadata["fingerprint"] == record["fingerprint"]
    assert metadata["shard_id"] == "3"
    assert json.loads(metadata["vocabulary"]) == record["vocabulary"]
    assert json.loads(metadata["statuses"]) == {"ok": 8}
    assert float(metadata["finished_at"]) >= float(metadata["started_at"])


def test_the_run_file_holds_no_secret(make_spec: MakeSpec) -> None:
    spec = make_spec(storage_options={"s3": {"secret": "hunter2"}})
    run_job(spec)
    assert "hunter2" not in (Path(spec.run) / "run.json").read_text()


def test_errors_come_before_any_work(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    cases: list[tuple[dict[str, object], type[Exception], str]] = [
        ({"input": str(tmp_path / "nothing")}, InputError, "no image"),
        ({"input": str(tmp_path / "absent")}, InputError, "there is no .*check the path"),
        ({"method": "maskclipp"}, SettingError, "did you mean 'maskclip'"),
        ({"classes": "voc22"}, SettingError, "did you mean 'voc2[01]'"),
        ({"classes": "cat,cat"}, SettingError, "cat"),
        ({"settings": {"strid": 3}}, SettingError, "did you mean 'stride'"),
        ({"settings": {"stride": 100}}, SettingError, "stride = 100 is larger than crop = 96"),
        ({"settings": {"area_thd": 0.1}}, SettingError, "needs a background class"),
        ({"clip": "ViT-B-61/openai"}, WeightsError, "ViT-B-16"),
        ({"clip": f"ovss-demo/{tmp_path}/no.pt"}, WeightsError, "no.pt"),
    ]
    for fields, error, said in cases:
        with pytest.raises(error, match=said):
            run_job(make_spec(**fields))
    assert not (tmp_path / "run").exists()


def test_a_worker_that_cannot_start_stops_the_run_after_three(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = []

    def broken(*_: object, **__: object) -> None:
        starts.append(1)
        raise WeightsError("the weights are not on this node")

    monkeypatch.setattr(worker_module, "load_segmenter", broken)
    with pytest.raises(RunFailedError, match=r"(?s)3 workers in a row could not start: the weights are not.*0 of 5"):
        run_job(make_spec())
    assert len(starts) == 3
    monkeypatch.undo()
    assert run_job(make_spec()).labelled == 40


def test_a_killed_actor_is_replaced(make_spec: MakeSpec, embedded_ray: None) -> None:
    spec = make_spec(engine="ray", workers=2, shard_size=2)
    killed = []

    def kill_one() -> None:
        shards = Path(spec.run) / "shards"
        while not shards.is_dir() or len(list(shards.iterdir())) < 3:
            time.sleep(0.02)
        pid = int(read_shard_metadata(str(sorted(shards.iterdir())[-1]))["pid"])
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)

    killer = threading.Thread(target=kill_one)
    killer.start()
    summary = run_job(spec)
    killer.join()
    assert killed
    assert summary.statuses == {"ok": 40}
    with open_run(spec.run) as run:
        assert run.sql("SELECT count(*), count(DISTINCT image_id) FROM images").fetchall() == [(40, 40)]


def test_an_output_that_cannot_be_written_stops_the_run_and_can_be_continued(
    make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = make_spec()
    real_link = os.link

    def full_disk(source: str, target: str) -> None:
        if str(target).endswith("00000002.parquet"):
            raise OSError(28, "No space left on device")
        real_link(source, target)

    monkeypatch.setattr(os, "link", full_disk)
    with pytest.raises(RunFailedError, match="No space left on device"):
        run_job(spec)
    monkeypatch.undo()
    assert run_job(spec).labelled == 40
