"""What a run directory tells about its run: not begun, going on, stopped, complete, grown; local and on S3."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ovss_ray.images.stores import open_store
from ovss_ray.run import summary as summary_module
from ovss_ray.run.additions import continue_run, extend_run, load_job, retry_run
from ovss_ray.run.driver import run_job
from ovss_ray.run.summary import read_status
from ovss_ray.spec import JobSpec

MakeSpec = Callable[..., JobSpec]


@pytest.fixture
def finished(make_spec: MakeSpec) -> JobSpec:
    """40 images in 5 shards."""
    spec = make_spec()
    run_job(spec)
    return spec


def shard(run: str, number: int) -> Path:
    return Path(run) / "shards" / f"{number:08d}.parquet"


def let_shards_finish_at(run: str, seconds_ago: dict[int, float]) -> None:
    for number in range(5):
        if number in seconds_ago:
            at = time.time() - seconds_ago[number]
            os.utime(shard(run, number), (at, at))
        else:
            shard(run, number).unlink(missing_ok=True)


def test_a_complete_run(finished: JobSpec) -> None:
    state = read_status(finished.run)
    assert (state.activity, state.shards_done, state.images_done, state.remaining_s) == ("complete", 5, 40, None)
    assert (state.statuses, state.failures, state.crashed, state.additions) == ({"ok": 40}, [], 0, [])
    assert state.pace().startswith("last shard finished at ")


def test_a_run_that_goes_on(finished: JobSpec) -> None:
    let_shards_finish_at(finished.run, {0: 1000, 1: 31, 2: 21, 3: 11})
    state = read_status(finished.run)
    assert (state.activity, state.shards_done, state.images_done) == ("going on", 4, 32)
    assert state.images_per_s == pytest.approx(16 / 20, rel=0.01)  # what came before the break does not count
    assert state.remaining_s == pytest.approx(10, rel=0.01)
    assert state.last_shard_age_s is not None
    assert state.last_shard_age_s >= 11
    assert state.usual_shard_s is not None
    assert state.usual_shard_s > 0
    assert state.pace().startswith("going on, 0.8 images/s, 10 s left; last shard finished at ")


def test_a_run_that_has_stopped(finished: JobSpec) -> None:
    let_shards_finish_at(finished.run, {0: 7210, 1: 7200})
    state = read_status(finished.run)
    assert (state.activity, state.shards_done, state.remaining_s) == ("stopped", 2, None)
    assert "2 h 00 min ago, while one takes" in state.pace()
    assert state.statuses == {"ok": 16}


def test_a_run_that_has_not_begun(finished: JobSpec) -> None:
    let_shards_finish_at(finished.run, {})
    state = read_status(finished.run)
    assert (state.activity, state.shards_done, state.last_shard_at, state.statuses) == ("not begun", 0, None, {})


def test_statuses_of_a_large_run_are_counted_on_request(finished: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(summary_module, "COUNTED_SHARDS", 2)
    assert read_status(finished.run).statuses == {"ok": 40}  # from the summary
    shard(finished.run, 4).unlink()
    state = read_status(finished.run)
    assert (state.statuses, state.failures, state.images_done) == (None, None, 32)
    assert read_status(finished.run, full=True).statuses == {"ok": 32}


def test_additions_are_told_apart_and_the_summary_of_before_is_not_believed(
    make_spec: MakeSpec, photos: Path, tmp_path: Path
) -> None:
    listed = tmp_path / "list.txt"
    paths = [str(path) for path in sorted(photos.rglob("*.jpg"))]
    listed.write_text("\n".join([*paths[:7], str(tmp_path / "absent.jpg")]))
    spec = make_spec(input=str(listed), shard_size=4)
    run_job(spec)
    listed.write_text("\n".join(paths[:13]))
    extend_run(load_job(spec.run))
    retry_run(load_job(spec.run))
    state = read_status(spec.run)
    counted = [(added["kind"], added["images"], added["shards"], added["shards_done"]) for added in state.additions]
    assert counted == [("extend", 6, 2, 0), ("retry", 1, 1, 0)]
    assert (state.images, state.images_done, state.shards, state.shards_done) == (14, 8, 5, 2)
    assert state.statuses == {"ok": 7, "not_found": 1}
    (tmp_path / "absent.jpg").write_bytes(Path(paths[0]).read_bytes())
    assert continue_run(load_job(spec.run)).statuses == {"ok": 14}
    state = read_status(spec.run)
    assert (state.activity, state.images_done, state.statuses) == ("complete", 14, {"ok": 14})
    assert [added["shards_done"] for added in state.additions] == [2, 1]


def test_on_s3(finished: JobSpec, s3: str) -> None:
    fs, root = open_store(f"{s3}/run")
    shard(finished.run, 3).unlink()
    fs.put(f"{finished.run}/", f"{root}/", recursive=True)
    state = read_status(f"{s3}/run")
    assert (state.activity, state.shards_done, state.statuses) == ("going on", 4, {"ok": 32})


def test_failures_are_shown_largest_first_with_an_example_and_how_many_kinds_are_left_out() -> None:
    failures = [
        {"status": "corrupt", "kind": "broken at N", "images": 1200, "example": "a.jpg", "error": "broken at 7"},
        {"status": "not_found", "kind": "no file", "images": 3, "example": "b.jpg", "error": "no file"},
        {"status": "forbidden", "kind": "no access", "images": 1, "example": "", "error": "no access"},
    ]  # fmt: skip
    assert [line.strip() for line in summary_module.failure_lines(failures, 12, shown=2)] == [
        "1,200  corrupt: broken at N",
        "such as a.jpg: broken at 7",
        "3  not_found: no file",
        "such as b.jpg",
        "and 10 more kinds",
    ]
    assert [line.strip() for line in summary_module.failure_lines(failures[2:], 1)] == ["1  forbidden: no access"]
