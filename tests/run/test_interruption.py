"""Runs of the real command, interrupted at any moment and continued, on a local disk and on S3."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovss_ray import open_run
from ovss_ray.images.stores import open_store
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.heartbeat import read_beats
from ovss_ray.run.status import read_status
from tests.processes import kill_tree
from tests.run.conftest import CLIP, draw_photos
from tests.run.faulty import METHOD, draw_fault

IMAGES = 160
SHARD_SIZE = 4
SHARDS = IMAGES // SHARD_SIZE
KILLS = int(os.environ.get("OVSS_KILLS", "4"))  # ten in `make chaos`


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_photos(tmp_path_factory.mktemp("many"), IMAGES)


def command(source: str, run: str, engine: str) -> list[str]:
    job = ["label", source, run, "--classes", "cat,dog,grass,sky", "--templates", "single", "--clip", CLIP]
    return [sys.executable, "-m", "ovss_ray", *job, "--shard-size", str(SHARD_SIZE), "--engine", engine]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    """The command in a session of its own, so that all its processes can be found again."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, start_new_session=True, text=True, **pipes)


class Finished:
    """The shard files of a run as they were seen: name -> digest of the bytes."""

    def __init__(self, run: str) -> None:
        self._fs, root = open_store(run)
        self._folder = f"{root}/shards"
        self.seen: dict[str, str] = {}

    def look(self) -> int:
        """Check that no shard seen before has changed; returns how many there are now."""
        self._fs.invalidate_cache()
        try:
            names = self._fs.ls(self._folder, detail=False)
        except FileNotFoundError:
            return 0
        now = {name: hashlib.sha256(self._fs.cat_file(name)).hexdigest() for name in names}
        assert {name: now.get(name) for name in self.seen} == self.seen
        self.seen = now
        return len(now)

    def count(self) -> int:
        self._fs.invalidate_cache()
        try:
            return len(self._fs.ls(self._folder, detail=False))
        except FileNotFoundError:
            return 0


def interrupt_often_then_finish(source: str, run: str, engine: str, kills: int, seed: int) -> None:
    chance = random.Random(seed)
    shards = Finished(run)
    for kill in range(kills):
        before = shards.look()
        process = start(command(source, run, engine))
        if chance.random() < 0.3:
            time.sleep(chance.uniform(0.3, 5.0))  # somewhere in the start, planning included
        else:
            # Somewhere in the work: after some shards more, leaving enough for the kills to come.
            target = min(before + chance.randint(1, 4), SHARDS - (kills - kill))
            while process.poll() is None and shards.count() < target:
                time.sleep(0.01)
            time.sleep(chance.uniform(0, 0.1))
        assert process.poll() is None, process.communicate()[1]
        kill_tree(process.pid)
        process.communicate()
        assert_killed(run)
    unfinished = shards.look()
    assert unfinished < SHARDS
    process = start(command(source, run, engine))
    _, messages = process.communicate(timeout=240)
    assert process.returncode == 0, messages
    assert shards.look() == SHARDS
    assert_complete(run)


def assert_killed(run: str) -> None:
    """The status knows at once what happened to a driver on this machine; unless it was killed before it began."""
    directory = RunDirectory(run)
    if read_beats(directory):
        state = read_status(run)
        assert (state.activity, state.images_per_s, state.remaining_s) == ("silent", None, None)
        assert "is gone without a word; killed?" in state.pace()


def assert_complete(run: str) -> None:
    """Every image exactly once, and no file that does not belong."""
    assert read_status(run).activity == "finished"
    fs, root = open_store(run)
    fs.invalidate_cache()
    files = sorted(path.removeprefix(f"{root}/") for path in fs.find(root, withdirs=False))
    (last,) = [name for name in files if name.startswith("drivers/")]  # those of drivers that were killed are gone
    expected = [last, *(f"shards/{shard:08d}.parquet" for shard in range(SHARDS))]
    others = ["classes.parquet", "manifest/00000.parquet", "run.json", "summary.json", "text.parquet"]
    assert files == sorted([*others, *expected])
    with open_run(run) as opened:
        rows = opened.sql("SELECT count(*), count(DISTINCT image_id), count(DISTINCT uri), max(image_id) FROM images")
        assert rows.fetchall() == [(IMAGES, IMAGES, IMAGES, IMAGES - 1)]
        assert opened.status_counts() == {"ok": IMAGES}


@pytest.mark.timeout(60 * (KILLS + 4))
def test_killed_at_random_moments_with_ray(many_photos: Path, tmp_path: Path) -> None:
    interrupt_often_then_finish(str(many_photos), str(tmp_path / "run"), "ray", kills=KILLS, seed=1)
    assert not (tmp_path / "run" / ".tmp").exists()


def test_killed_on_s3(many_photos: Path, s3: str) -> None:
    fs, bucket = open_store(s3)
    fs.put(f"{many_photos}/", f"{bucket}/photos/", recursive=True)
    interrupt_often_then_finish(f"{s3}/photos", f"{s3}/runs/first", "local", kills=2, seed=2)


def test_ray_on_s3(many_photos: Path, s3: str) -> None:
    fs, bucket = open_store(s3)
    fs.put(f"{many_photos}/", f"{bucket}/photos/", recursive=True)
    interrupt_often_then_finish(f"{s3}/photos", f"{s3}/runs/first", "ray", kills=1, seed=3)


def is_running(run: str) -> bool:
    """Whether the status says so, and there are labels."""
    return Finished(run).count() > 0 and read_status(run).activity == "running"


@pytest.fixture
def running(many_photos: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    run = str(tmp_path / "run")
    slow = ["--method", METHOD, "--set", "seconds=0.1"]
    process = start([*command(str(many_photos), run, "local"), *slow])
    while process.poll() is None and not is_running(run):
        time.sleep(0.05)
    yield process
    kill_tree(process.pid)
    process.communicate()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_the_run_and_says_how_to_continue(
    running: subprocess.Popen[str], tmp_path: Path, signum: signal.Signals, code: int
) -> None:
    alive = read_status(str(tmp_path / "run"))
    assert alive.activity == "running"
    assert alive.pace().startswith("running")
    running.send_signal(signum)
    _, messages = running.communicate(timeout=60)
    assert running.returncode == code
    found = re.search(rf"stopped by {signum.name}; (\d+) of {SHARDS} shards are finished and kept", messages)
    assert found, messages
    assert int(found[1]) == Finished(str(tmp_path / "run")).count() < SHARDS
    state = read_status(str(tmp_path / "run"))
    assert state.activity == "stopped"
    assert (state.reason or "").startswith(f"stopped by {signum.name}; {found[1]} of {SHARDS} shards")
    assert messages.endswith(f"Continue with:\n  ovss-ray continue {tmp_path}/run\n")
    assert not (tmp_path / "run" / ".tmp").exists()


def test_a_thread_that_waits_for_ever_does_not_keep_a_stopped_process(tmp_path: Path) -> None:
    draw_fault(tmp_path / "photos.png", "hang")
    journal = tmp_path / "journal"
    faulty = ["--method", METHOD, "--set", f"journal={journal}"]
    process = start([*command(str(tmp_path / "photos.png"), str(tmp_path / "run"), "local"), *faulty])
    try:
        while process.poll() is None and not journal.exists():
            time.sleep(0.05)
        for _ in range(2):  # the second one does not wait for shards in flight
            process.send_signal(signal.SIGTERM)
            time.sleep(0.5)
        _, messages = process.communicate(timeout=60)
    finally:
        kill_tree(process.pid)
    assert process.returncode == 143
    assert messages.endswith(f"Continue with:\n  ovss-ray continue {tmp_path}/run\n")
