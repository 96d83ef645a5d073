"""Runs against ground truth in real files: counted once, in tasks or here, on a disk and in an object store."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from PIL import Image

import ovss_ray
from ovss_ray.errors import DamagedRunError, InputError, OvssError, SettingError
from ovss_ray.evaluation.boundary import boundary_counts
from ovss_ray.evaluation.confusion import ConfusionMatrix
from ovss_ray.evaluation.evaluate import draws_for, evaluate_run
from ovss_ray.evaluation.ground_truth import GroundTruth, open_folder_truth, open_ground_truth
from ovss_ray.evaluation.ground_truth.truth import MappedTruth
from ovss_ray.evaluation.interval import bootstrap_miou
from ovss_ray.evaluation.result import Evaluation
from ovss_ray.run.cluster import Connection
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.status import read_status
from ovss_ray.run.verify import verify_run
from tests.evaluation.tiny_runs import NAMES, DeadlyTruth, Labels, TinyRun, name_of, scored_run, uri_of, write_truth


def evaluate(run: str, truth: GroundTruth | str, **how: object) -> Evaluation:
    if isinstance(truth, str):
        truth = open_folder_truth(truth, list(NAMES))
    return evaluate_run(run, truth, **{"engine": "local", **how})  # type: ignore[arg-type]


def expected(run: TinyRun, truth: dict[int, Labels]) -> ConfusionMatrix:
    """By the simplest way: all pixels of all images in one row."""
    pairs = [(labels, truth[image_id]) for image_id, labels in enumerate(run.labels) if labels is not None]
    matrix = ConfusionMatrix(len(NAMES))
    matrix.update(np.concatenate([p.ravel() for p, _ in pairs]), np.concatenate([t.ravel() for _, t in pairs]))
    return matrix


@pytest.fixture(params=["local", "s3"])
def places(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """Where the run and its ground truth lie."""
    if request.param == "local":
        return str(tmp_path / "run"), str(tmp_path / "truth")
    bucket = request.getfixturevalue("s3")
    return f"{bucket}/runs/first", f"{bucket}/truth"


def tables_of(run: str, kept: str) -> dict[str, bytes]:
    fs, root = fsspec.core.url_to_fs(run)
    fs.invalidate_cache()
    paths = fs.ls(f"{root}/{kept}", detail=False)
    return {path.rsplit("/", 1)[-1]: fs.cat_file(path) for path in paths}


def test_the_scores_are_those_of_all_pixels_at_once(places: tuple[str, str]) -> None:
    run, truth = scored_run(*places)
    run.write()
    found = evaluate(run.uri, places[1], seen=["dog", "CAT"])
    matrix = expected(run, truth)
    np.testing.assert_array_equal(found.images.confusion().counts, matrix.counts)
    assert (found.scores.miou, found.scores.pixel_accuracy) == (matrix.miou, matrix.pixel_accuracy)
    assert found.scores.split is not None
    assert found.scores.split.seen == pytest.approx(np.nanmean(matrix.class_iou[2:]))
    outlines = sum(boundary_counts(labels, truth[image_id], 4) for image_id, labels in enumerate(run.labels))
    np.testing.assert_array_equal(found.images.boundary(), outlines)
    assert found.scores.interval == bootstrap_miou(found.images.counts())[0]
    assert found.scores.interval.low < found.scores.miou < found.scores.interval.high
    assert (found.images_evaluated, found.shards_evaluated, found.shards) == (10, 3, 3)
    assert (found.problems, found.missing, found.warnings, found.exit_code) == ((), (), (), 0)
    assert (found.method, found.clip, found.protocol, found.settings) == (
        "maskclip",
        "demo",
        "maskclip/voc21",
        {"crop": 0},
    )


def test_many_images_are_drawn_less_often() -> None:
    assert [draws_for(images) for images in (1, 5_000, 40_000, 10_000_000)] == [1000, 1000, 500, 100]


def test_other_commands_take_no_notice_of_what_is_kept(tmp_path: Path) -> None:
    from ovss_ray.demo.tour import take_tour

    run = str(take_tour(tmp_path / "demo", scenes=2, engine="local").run)
    truth = open_folder_truth(tmp_path / "demo" / "labels", _demo_classes())
    before = read_status(run, full=True)
    kept = tmp_path / "demo" / "run" / evaluate(run, truth).kept
    assert kept.is_dir()
    verified = verify_run(run)
    assert (verified.exit_code, verified.stray) == (0, [])
    after = read_status(run, full=True)
    assert (after.statuses, after.shards_done, after.activity) == (before.statuses, before.shards_done, "finished")
    with ovss_ray.open_run(run) as opened:
        assert opened.sql("SELECT count(*) FROM images").fetchall() == [(2,)]


def _demo_classes() -> list[str]:
    from ovss_ray.demo.scenes import CLASSES

    return list(CLASSES)


def test_the_demo_scores_as_its_tour_says(tmp_path: Path) -> None:
    from ovss_ray.demo.tour import take_tour

    tour = take_tour(tmp_path / "demo", scenes=3, seed=7, engine="local")
    truth = open_folder_truth(tmp_path / "demo" / "labels", _demo_classes())
    found = evaluate(str(tour.run), truth)
    assert (found.scores.miou, found.scores.pixel_accuracy) == (tour.miou, tour.pixel_accuracy)
    by_name = dict(zip(found.scores.names, found.scores.class_iou.tolist(), strict=True))
    assert by_name == pytest.approx(tour.class_iou, nan_ok=True)


class TestImagesThatAreNotScored:
    @pytest.fixture
    def found(self, tmp_path: Path) -> Evaluation:
        """One image of each kind; 0 is good, 1 failed in the run."""
        rng = np.random.default_rng(3)
        sizes = [(8, 9)] * 7
        run = TinyRun(str(tmp_path / "run"), [None if i == 1 else rng.integers(0, 4, sizes[i]).astype(np.uint8)
                                              for i in range(7)]).write()  # fmt: skip
        good = rng.integers(0, 4, (8, 9)).astype(np.uint8)
        strange = good.copy()
        strange[2, 3:5] = 77
        folder = tmp_path / "VOC2012"
        write_truth(str(folder / "SegmentationClass"), {0: good, 1: good, 2: good.T.copy(), 3: strange, 4: good})
        damaged = folder / "SegmentationClass" / f"{name_of(4)}.png"
        damaged.write_bytes(damaged.read_bytes()[:-20])
        lists = folder / "ImageSets" / "Segmentation"
        lists.mkdir(parents=True)
        (lists / "val.txt").write_text("".join(f"{name_of(i)}\n" for i in (0, 1, 2, 3, 4, 5)))  # 5 has no file
        truth = open_ground_truth("voc21", folder)
        run = TinyRun(run.uri, run.labels, names=truth.vocabulary.names).write()
        return evaluate(run.uri, truth)

    def test_each_is_told_with_its_reason(self, found: Evaluation) -> None:
        told = {example.image_id: (problem.status, example.detail) for problem in found.problems
                for example in problem.examples}  # fmt: skip
        assert {image_id: status for image_id, (status, _) in told.items()} == {
            1: "no_labels",
            2: "size_mismatch",
            3: "unknown_ids",
            4: "damaged_annotation",
            5: "no_annotation",
            6: "not_in_split",
        }
        assert told[1][1] == "the run has no label map: corrupt, the file ends too early"
        assert told[2][1] == "the labels are 9 x 8 pixels, the annotation 8 x 9"
        assert "77 (2 pixels)" in str(told[3][1])
        assert f"{name_of(4)}.png" in str(told[4][1])
        assert "is missing, although the list of the split 'val' has it" in str(told[5][1])
        assert told[6][1] == f"voc21 has no annotation called {name_of(6)}"
        assert found.images.names == (name_of(0),)

    def test_the_scores_are_known_to_be_partial(self, found: Evaluation) -> None:
        assert found.missing == tuple(name_of(i) for i in (1, 2, 3, 4, 5))
        assert (found.is_partial, found.exit_code) == (True, 5)
        few, missing = found.warnings
        assert few.endswith("has 5 annotated images of voc21, published are 1,449")
        assert missing == "5 images of the ground truth are not scored, such as a01 a02 a03"

    def test_json_has_all_of_them(self, found: Evaluation) -> None:
        record = json.loads(json.dumps(found.record(), allow_nan=False))
        assert len(record["unscored_images"]) == 6
        assert record["unscored_images"][0]["uri"] == uri_of(1)
        assert record["problems"]["unknown_ids"] == 1
        assert (record["partial"], record["exit_code"], record["images_evaluated"]) == (True, 5, 1)


def test_if_no_image_can_be_scored_an_example_says_why(tmp_path: Path) -> None:
    run = TinyRun(str(tmp_path / "run"), [np.zeros((4, 4), np.uint8)] * 3).write()
    Image.new("L", (4, 4)).save(tmp_path / "other.png")
    with pytest.raises(SettingError, match="3 not_in_split; for example s3://photos/a00.jpg: .* called a00"):
        evaluate(run.uri, open_folder_truth(tmp_path, list(NAMES)))
    bare = TinyRun(str(tmp_path / "bare"), run.labels).write(done=())
    with pytest.raises(OvssError, match="no shard of .*/bare is written yet"):
        evaluate(bare.uri, open_folder_truth(tmp_path, list(NAMES)))


def test_classes_are_matched_by_name(tmp_path: Path) -> None:
    run, truth = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"))
    run.write()
    plain = evaluate(run.uri, str(tmp_path / "truth"))
    # The same pixels under other ids: "cat" is unknown to the truth of the run below, "fox" to the run.
    order = ["fox", "dog", "sky", "grass"]
    ids = {number: order.index(name) for number, name in enumerate(NAMES) if name != "cat"} | {3: 0}
    lookup = np.array([ids.get(value, 255) for value in range(256)], np.uint8)
    other = {image_id: lookup[labels] for image_id, labels in truth.items()}
    found = evaluate(run.uri, open_folder_truth(write_truth(str(tmp_path / "other"), other), order))
    assert found.scores.class_accuracy[[1, 2, 3]].tolist() == plain.scores.class_accuracy[[2, 0, 1]].tolist()
    assert found.scores.class_iou[0] == 0
    assert [warning.partition(":")[0] for warning in found.warnings] == [
        "the ground truth lacks cat of the run",
        "the run never had fox of the ground truth",
    ]


def test_labels_are_shrunk_where_the_truth_is(tmp_path: Path, rng: np.random.Generator) -> None:
    truth = {image_id: rng.integers(0, 4, (10, 6)).astype(np.uint8) for image_id in range(2)}
    large = rng.integers(0, 4, (20, 12)).astype(np.uint8)
    run = TinyRun(str(tmp_path / "run"), [large, rng.integers(0, 4, (10, 6)).astype(np.uint8)]).write()
    folder = open_folder_truth(write_truth(str(tmp_path / "truth"), truth), list(NAMES))
    assert isinstance(folder, MappedTruth)
    found = evaluate(run.uri, dataclasses.replace(folder, short_side=6))
    halved = TinyRun("", [large[::2, ::2], run.labels[1]])
    np.testing.assert_array_equal(found.images.confusion().counts, expected(halved, truth).counts)


class TestWhatIsKept:
    def test_more_shards_only_add(self, places: tuple[str, str]) -> None:
        run, truth = scored_run(*places)
        run.write(done=(0, 2))
        part = evaluate(run.uri, places[1])
        assert (part.shards_evaluated, part.images_evaluated, part.exit_code) == (2, 6, 5)
        assert part.warnings[0].startswith("1 of 3 shards are not written yet")
        before = tables_of(run.uri, part.kept)
        run.write(done=(1,))
        progress: list[tuple[int, int]] = []
        whole = evaluate(run.uri, places[1], watch=lambda *at: progress.append(at))
        after = tables_of(run.uri, whole.kept)
        assert progress == [(3, 3)]
        assert set(after) - set(before) == {"00000001.parquet"}
        assert {name: after[name] for name in before} == before
        np.testing.assert_array_equal(whole.images.confusion().counts, expected(run, truth).counts)
        assert whole.images.image_ids.tolist() == list(range(10))

    def test_what_is_kept_is_not_counted_again_until_asked(self, tmp_path: Path) -> None:
        run, truth = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"))
        run.write()
        first = evaluate(run.uri, str(tmp_path / "truth"))
        write_truth(str(tmp_path / "truth"), {0: np.zeros_like(truth[0])})  # repaired in place
        assert evaluate(run.uri, str(tmp_path / "truth")).scores.miou == first.scores.miou
        anew = evaluate(run.uri, str(tmp_path / "truth"), again=True)
        np.testing.assert_array_equal(
            anew.images.confusion().counts, expected(run, {**truth, 0: np.zeros_like(truth[0])}).counts
        )
        assert anew.kept == first.kept

    def test_another_truth_and_another_way_of_counting_have_folders_of_their_own(self, tmp_path: Path) -> None:
        run, _ = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"))
        run.write()
        folder = str(tmp_path / "truth")
        with_boundary, without = evaluate(run.uri, folder), evaluate(run.uri, folder, boundary=False)
        swapped = {0: 1, 1: 0, 2: 2, 3: 3, 255: "ignore"}
        mapped = evaluate(run.uri, open_folder_truth(folder, list(NAMES), id_map=swapped))
        assert len({with_boundary.kept, without.kept, mapped.kept}) == 3
        assert without.scores.boundary_iou is None
        assert without.scores.miou == with_boundary.scores.miou != mapped.scores.miou
        kept = json.loads((tmp_path / "run" / mapped.kept / "evaluation.json").read_text())
        assert kept["ground_truth"]["root"] == folder

    def test_the_row_that_counts_of_an_image_that_was_labelled_again(self, tmp_path: Path) -> None:
        run, truth = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"), images=6)
        labels = list(run.labels)
        first = TinyRun(run.uri, [None if i in (1, 5) else labels[i] for i in range(6)]).write()
        assert evaluate(run.uri, str(tmp_path / "truth")).problems[0].images == 2
        # 1 gets labels now, 5 fails once more, 2 had labels and has others now.
        retried = {1: labels[1], 2: np.full_like(labels[2], 3), 5: None}
        TinyRun(run.uri, first.labels, retried=retried).write(done=(2,))
        found = evaluate(run.uri, str(tmp_path / "truth"))
        final = TinyRun("", [labels[0], labels[1], retried[2], labels[3], labels[4], None])
        np.testing.assert_array_equal(found.images.confusion().counts, expected(final, truth).counts)
        (problem,) = found.problems
        assert (problem.status, [example.image_id for example in problem.examples]) == ("no_labels", [5])
        assert found.missing == ("a05",)

    def test_a_damaged_table_is_named(self, tmp_path: Path) -> None:
        run, _ = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"))
        run.write()
        found = evaluate(run.uri, str(tmp_path / "truth"))
        table = tmp_path / "run" / found.kept / "00000001.parquet"
        table.write_bytes(table.read_bytes()[:-9])
        with pytest.raises(DamagedRunError, match="00000001.parquet is damaged .*; remove it and evaluate again"):
            evaluate(run.uri, str(tmp_path / "truth"))
        table.unlink()
        assert evaluate(run.uri, str(tmp_path / "truth")).scores.miou == found.scores.miou

    def test_a_place_where_nothing_can_be_kept_is_told(self, tmp_path: Path) -> None:
        run, _ = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"))
        run.write()
        (tmp_path / "run" / "evaluation").write_text("a file where the folder should be")
        with pytest.raises(
            InputError, match="run/evaluation/truth-.* cannot be made: Not a directory; check the permissions"
        ):
            evaluate(run.uri, str(tmp_path / "truth"))


def test_processes_of_this_machine_count_the_same(tmp_path: Path) -> None:
    run, truth = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"))
    run.write()
    found = evaluate(run.uri, str(tmp_path / "truth"), workers=2)
    np.testing.assert_array_equal(found.images.confusion().counts, expected(run, truth).counts)


@pytest.fixture(scope="module")
def ray_here() -> Iterator[None]:
    connection = Connection(None)
    yield
    connection.close()


@pytest.mark.usefixtures("ray_here")
class TestEngines:
    def test_ray_tasks_count_the_same(self, tmp_path: Path) -> None:
        run, truth = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"), images=22)
        run.write()
        progress: list[tuple[int, int]] = []
        found = evaluate(run.uri, str(tmp_path / "truth"), engine="ray", watch=lambda *at: progress.append(at))
        np.testing.assert_array_equal(found.images.confusion().counts, expected(run, truth).counts)
        assert progress == [(number, 6) for number in range(1, 7)]

    def test_ray_tasks_take_the_options_of_the_store_along(self, s3: str, s3_endpoint: str) -> None:
        run, truth = scored_run(f"{s3}/run", f"{s3}/truth")
        run.write()
        options = {"s3": {"key": "test", "secret": "test", "endpoint_url": s3_endpoint}}  # tasks have no environment
        folder = open_folder_truth(f"{s3}/truth", list(NAMES), storage_options=options)
        found = evaluate(run.uri, folder, engine="ray", storage_options=options)
        np.testing.assert_array_equal(found.images.confusion().counts, expected(run, truth).counts)

    def test_a_task_whose_process_dies_is_given_out_again(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        run, truth = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"))
        run.write()
        deadly = DeadlyTruth(open_folder_truth(tmp_path / "truth", list(NAMES)), tmp_path / "died", times=2)
        found = evaluate(run.uri, deadly, engine="ray", workers=1)
        assert (tmp_path / "died").read_text() == "xx"
        np.testing.assert_array_equal(found.images.confusion().counts, expected(run, truth).counts)
        assert caplog.text.count("scoring shard 1 failed and is tried again") == 2

    def test_one_that_always_dies_ends_with_a_sentence(self, tmp_path: Path) -> None:
        run, _ = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"))
        run.write()
        deadly = DeadlyTruth(open_folder_truth(tmp_path / "truth", list(NAMES)), tmp_path / "died", times=99)
        with pytest.raises(OvssError, match="shard 1 could not be scored in 4 attempts.* same command") as told:
            evaluate(run.uri, deadly, engine="ray", workers=1)
        assert told.value.exit_code == 5
        kept = next((tmp_path / "run" / "evaluation").iterdir())
        assert (kept / "00000000.parquet").exists()

    @pytest.mark.parametrize("times", [3, 4])
    def test_a_store_that_fails_is_asked_four_times(self, tmp_path: Path, times: int) -> None:
        run, truth = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"))
        run.write()
        folder = open_folder_truth(tmp_path / "truth", list(NAMES))
        busy = DeadlyTruth(folder, tmp_path / "failed", times, says="the store is busy")
        if times < 4:
            found = evaluate(run.uri, busy, engine="ray")
            np.testing.assert_array_equal(found.images.confusion().counts, expected(run, truth).counts)
        else:
            with pytest.raises(InputError, match="^the store is busy$"):
                evaluate(run.uri, busy, engine="ray")
        assert (tmp_path / "failed").read_text() == "x" * times

    def test_what_a_task_says_of_a_file_arrives(self, tmp_path: Path) -> None:
        run, _ = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"))
        run.write()
        shard = tmp_path / "run" / "shards" / "00000001.parquet"
        shard.write_bytes(shard.read_bytes()[:-9])
        with pytest.raises(DamagedRunError, match="00000001.parquet is damaged"):
            evaluate(run.uri, str(tmp_path / "truth"), engine="ray")


def test_a_copied_run_is_evaluated_from_its_own_tables(tmp_path: Path) -> None:
    run, _ = scored_run(str(tmp_path / "run"), str(tmp_path / "truth"))
    run.write()
    found = evaluate(run.uri, str(tmp_path / "truth"))
    shutil.copytree(run.uri, tmp_path / "copy")
    before = tables_of(str(tmp_path / "copy"), found.kept)
    assert evaluate(str(tmp_path / "copy"), str(tmp_path / "truth")).scores.miou == found.scores.miou
    assert tables_of(str(tmp_path / "copy"), found.kept) == before
    assert RunDirectory(str(tmp_path / "copy")).read_json(f"{found.kept}/evaluation.json") is not None
