"""What a run directory tells about its run: planned, loading, running, stopped, silent, finished; local and on S3."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest

from ovss_ray.cli import main
from ovss_ray.commands import status as status_command
from ovss_ray.errors import RunFailedError, SettingError
from ovss_ray.images.stores import open_store
from ovss_ray.run import status as status_module
from ovss_ray.run import summary as summary_module
from ovss_ray.run.additions import continue_run, extend_run, load_job, retry_run
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.driver import run_job
from ovss_ray.run.heartbeat import Heartbeat, Listener, read_beats
from ovss_ray.run.status import find_runs, read_status
from ovss_ray.spec import JobSpec
from tests.faults import FaultyEndpoint, status
from tests.processes import heed_interrupts

MakeSpec = Callable[..., JobSpec]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory, photos: Path) -> Path:
    """40 images in 5 shards."""
    run = tmp_path_factory.mktemp("status") / "run"
    job = {"input": str(photos), "run": str(run), "classes": "cat,dog", "templates": "single", "shard_size": 8}
    run_job(JobSpec.build({**job, "clip": "ovss-demo/random", "engine": "local"}, source="test"))
    return run


@pytest.fixture
def finished(original: Path, tmp_path: Path) -> str:
    return str(shutil.copytree(original, tmp_path / "run"))


def shard(run: str, number: int) -> Path:
    return Path(run) / "shards" / f"{number:08d}.parquet"


def say_last(run: str, seconds_ago: float = 0.0, **facts: Any) -> None:
    """Let the run's driver be on another machine, and its last beat be so old and say something else."""
    (file,) = (Path(run) / "drivers").iterdir()
    at = (datetime.now(timezone.utc) - timedelta(seconds=seconds_ago)).isoformat()
    said = {**json.loads(file.read_bytes()), "host": "far-away", "process": None, "beat_at": at, **facts}
    file.write_text(json.dumps(said))


def test_a_finished_run(finished: str) -> None:
    state = read_status(finished)
    assert (state.activity, state.shards_done, state.images_done, state.remaining_s) == ("finished", 5, 40, None)
    assert (state.statuses, state.failures, state.crashed, state.additions) == ({"ok": 40}, [], 0, [])
    (driver,) = state.drivers
    assert (driver["state"], driver["shards_done"], driver["failures"], driver["is_alive"]) == ("finished", 5, 0, False)
    assert state.pace() == f"finished at {str(state.since)[:19].replace('T', ' ')} UTC"


def test_a_run_that_is_running_elsewhere(finished: str) -> None:
    shard(finished, 4).unlink()
    say_last(finished, 20, state="running", images_per_s=12.5, remaining_s=63.0, failures=2)
    state = read_status(finished)
    assert (state.activity, state.images_per_s, state.remaining_s, state.images_done) == ("running", 12.5, 63.0, 32)
    assert "running, 12.5 images/s, 1 min 03 s left; on far-away (process " in state.pace()
    assert state.last_sign_age_s == pytest.approx(20, abs=10)


@pytest.mark.parametrize("before", ["planning", "loading", "running", "stopping"])
def test_a_copy_of_a_run_that_was_running_has_no_rate(before: str, finished: str) -> None:
    shard(finished, 4).unlink()
    say_last(finished, 3600, state=before, images_per_s=12.5, remaining_s=63.0)
    state = read_status(finished)  # the times of its files are of now
    assert (state.activity, state.images_per_s, state.remaining_s) == ("silent", None, None)
    assert "no sign of life since " in state.pace()
    assert "(1 h 00 min ago): the driver on far-away" in state.pace()


def test_clocks_that_differ(finished: str) -> None:
    shard(finished, 4).unlink()
    say_last(finished, -7230, state="running")  # its clock is ahead
    state = read_status(finished)
    assert (state.activity, state.images_per_s, state.last_sign_age_s) == ("silent", None, 0.0)
    assert "killed, or cannot reach the run; its clock is 2 h 00 min ahead of this machine's" in state.pace()
    listener = Listener()
    say_last(finished, 7200, state="running")
    assert read_status(finished, listener=listener).activity == "silent"
    say_last(finished, 7170, state="running")  # it is two hours behind, but has just written
    assert read_status(finished, listener=listener).activity == "running"
    assert read_status(finished, listener=listener).activity == "running"


@pytest.mark.parametrize("ahead_s", [0.0, 7200.0])
def test_a_driver_that_was_heard_and_stops_writing_is_gone(
    ahead_s: float, finished: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard(finished, 4).unlink()
    listener = Listener()
    for ago in (2.0, 1.0):
        say_last(finished, ago - ahead_s, state="running", images_per_s=12.5)
        state = read_status(finished, listener=listener)
    assert (state.activity, state.images_per_s) == ("running", 12.5)
    (beat,) = read_beats(RunDirectory(finished))
    now = time.monotonic()
    monkeypatch.setattr("ovss_ray.run.heartbeat.time.monotonic", lambda: now + beat.patience_s + 1.0)
    state = read_status(finished, listener=listener)
    assert (state.activity, state.images_per_s) == ("silent", None)


def test_of_several_drivers_the_rates_add_up(finished: str) -> None:
    shard(finished, 4).unlink()
    say_last(finished, 5, state="running", images_per_s=3.0, remaining_s=99.0)
    (file,) = (Path(finished) / "drivers").iterdir()
    other = {**json.loads(file.read_bytes()), "driver": "20260101T000000-00000000", "images_per_s": 1.0}
    (file.parent / "20260101T000000-00000000.json").write_text(json.dumps(other))
    state = read_status(finished)
    assert (state.images_per_s, state.remaining_s, len(state.drivers)) == (4.0, 2.0, 2)
    assert "by 2 drivers" in state.pace()


def test_a_run_without_a_sign_of_life(finished: str) -> None:
    shutil.rmtree(f"{finished}/drivers")
    assert read_status(finished).activity == "finished"
    shard(finished, 4).unlink()
    state = read_status(finished)
    assert (state.activity, state.since, state.drivers) == ("stopped", None, [])
    assert state.pace() == "stopped: no driver has left a sign of life here"


def test_planning_and_how_it_ended(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path / "run"))
    directory.prepare()
    with Heartbeat(directory, "planning"):
        state = read_status(directory.uri)
        assert (state.activity, state.images, state.shards, state.statuses) == ("planning", None, None, {})
        assert state.pace().startswith("planning; on ")
    with pytest.raises(SettingError, match="its planning was not finished"):
        read_status(directory.uri)  # nothing is known of it any more
    with pytest.raises(RunFailedError), Heartbeat(directory, "planning"):
        raise RunFailedError("the list https://me:secret@host/list.txt is damaged")
    state = read_status(directory.uri)
    assert (state.activity, state.reason) == ("stopped", "the list https://me:***@host/list.txt is damaged")


def test_a_driver_removes_what_others_left_but_not_those_that_live(finished: str) -> None:
    directory = RunDirectory(finished)
    with Heartbeat(directory, "loading") as first, Heartbeat(directory, "loading") as second:
        assert {beat.driver for beat in read_beats(directory)} == {first.driver, second.driver}


def test_statuses_of_a_large_run_are_counted_on_request(finished: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status_module, "COUNTED_SHARDS", 2)
    assert read_status(finished).statuses == {"ok": 40}  # from the summary
    shard(finished, 4).unlink()
    state = read_status(finished)
    assert (state.statuses, state.failures, state.failed, state.images_done) == (None, None, None, 32)
    assert read_status(finished, full=True).statuses == {"ok": 32}


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
    assert (state.activity, state.reason) == ("stopped", "it was finished, and has more shards now")
    assert state.statuses == {"ok": 7, "not_found": 1}
    (tmp_path / "absent.jpg").write_bytes(Path(paths[0]).read_bytes())
    assert continue_run(load_job(spec.run)).statuses == {"ok": 14}
    state = read_status(spec.run)
    assert (state.activity, state.images_done, state.statuses) == ("finished", 14, {"ok": 14})
    assert [added["shards_done"] for added in state.additions] == [2, 1]


# -- on S3 -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refused", [False, True])
def test_beats_are_few_and_one_that_cannot_be_written_stops_nothing(
    refused: bool, make_spec: MakeSpec, s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with FaultyEndpoint(s3_endpoint) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url)
        if refused:
            endpoint.plan.add(status(403), method="PUT", path="*/drivers/*")
        spec = make_spec(run=f"{s3}/run", limit=8)
        assert run_job(spec).labelled == 8
        assert 2 <= len(endpoint.asked("PUT", "*/drivers/*")) <= 7  # planning, loading, running, finished (3 times)
        state = read_status(spec.run)
        assert (state.activity, len(state.drivers)) == ("finished", 0 if refused else 1)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """`ovss-ray status` in this process; returns what it prints."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(status_command, "WATCH_EVERY_S", 0.05)
    monkeypatch.setattr(status_command, "WATCH_SHARE", 0.0)

    def give(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["ovss-ray", "status", *arguments])
        with pytest.raises(SystemExit) as left:
            main()
        assert not left.value.code
        return capsys.readouterr().out

    return give


@pytest.mark.parametrize("place", ["local", "s3"])
def test_a_folder_of_runs_is_a_table(
    place: str, finished: str, tmp_path: Path, command: Callable[..., str], request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "runs"
    shutil.copytree(finished, folder / "b done")
    shutil.copytree(finished, folder / "a")
    shard(str(folder / "a"), 4).unlink()
    say_last(str(folder / "a"), 10, state="running", images_per_s=12.5, remaining_s=63.0)
    (folder / "broken").mkdir()
    (folder / "broken" / "run.json").write_text("{")
    (folder / "photos").mkdir()
    (folder / "photos" / "cat.jpg").write_bytes(b"")
    where = str(folder)
    if place == "s3":
        where = f"{request.getfixturevalue('s3')}/runs"
        fs, root = open_store(where)
        fs.put(f"{folder}/", f"{root}/", recursive=True)
    assert find_runs(where) == [f"{where}/a", f"{where}/b done", f"{where}/broken"]
    assert find_runs(f"{where}/a") is None
    header, first, second, third, *rest = command(where).splitlines()
    assert header.split() == ["run", "state", "images", "done", "images/s", "failed", "last", "sign"]
    assert first.split()[:6] == ["a", "running", "40", "80.0%", "12.5", "0"]
    assert second.split()[:6] == ["b", "done", "finished", "40", "100.0%", "0"]
    assert third.split() == ["broken", "cannot", "be", "read"]
    assert "broken/run.json is damaged" in " ".join(rest)
    found = json.loads(command(where, "--json"))
    assert [state.get("activity") for state in found] == ["running", "finished", None]
    assert "is damaged" in found[2]["error"]


@pytest.mark.parametrize("options", [(), ("--json",)])
def test_watching_ends_when_the_run_is_finished(
    options: tuple[str, ...], finished: str, command: Callable[..., str]
) -> None:
    kept = shard(finished, 4).read_bytes()
    shard(finished, 4).unlink()
    say_last(finished, 10, state="running", images_per_s=12.5, remaining_s=63.0)

    def finish() -> None:
        time.sleep(1)
        shard(finished, 4).write_bytes(kept)
        say_last(finished, state="finished")

    threading.Thread(target=finish).start()
    lines = command(finished, "--watch", *options).splitlines()
    assert len(lines) > 2
    if options:
        activities = [json.loads(line)["activity"] for line in lines]
        assert (activities[0], activities[-1]) == ("running", "finished")
    else:
        assert "32 of 40 images; running, 12.5 images/s" in lines[0]
        assert "40 of 40 images; finished at" in lines[-1]


def test_ctrl_c_ends_the_watching_without_a_word(finished: str) -> None:
    shard(finished, 4).unlink()
    watching = subprocess.Popen(
        [sys.executable, "-m", "ovss_ray", "status", finished, "--watch"],
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed_interrupts,
    )  # fmt: skip
    assert watching.stdout is not None
    assert "32 of 40 images; stopped" in watching.stdout.readline()
    watching.send_signal(signal.SIGINT)
    _, said = watching.communicate(timeout=30)
    assert (watching.returncode, said) == (0, "")


def test_failures_are_shown_largest_first_with_an_example_and_how_many_kinds_are_left_out() -> None:
    failures = [
        {"status": "corrupt", "kind": "broken at N", "images": 1200, "example": "a.jpg", "error": "broken at 7"},
        {"status": "not_found", "kind": "no file", "images": 3, "example": "b.jpg", "error": "no file"},
        {"status": "forbidden", "kind": "no access", "images": 1, "example": "", "error": "no access"},
    ]
    assert [line.strip() for line in summary_module.failure_lines(failures, 12, shown=2)] == [
        "1,200  corrupt: broken at N",
        "such as a.jpg: broken at 7",
        "3  not_found: no file",
        "such as b.jpg",
        "and 10 more kinds",
    ]
    assert [line.strip() for line in summary_module.failure_lines(failures[2:], 1)] == ["1  forbidden: no access"]
