"""A Ray of one's own: reached from this machine only, and gone with its driver, which is killed alone here."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ray  # brings its psutil
from psutil import CONN_LISTEN, NoSuchProcess, Process

from ovss_ray.run import embedded
from tests.run.conftest import CLIP, draw_photos

assert ray


def wait_for(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_left(process: Process) -> bool:
    """Whether it lives: in a container nobody may collect those that have ended."""
    try:
        return bool(process.is_running() and process.status() != "zombie")
    except NoSuchProcess:
        return False


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where this user's folders for Ray are; the names of sockets in pytest's own would be too long."""
    with TemporaryDirectory(prefix="t", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        yield Path(folder)


def test_nothing_listens_to_the_network_and_nothing_stays_when_the_driver_is_killed_alone(
    tmp_path: Path, places: Path
) -> None:
    photos = draw_photos(tmp_path / "photos", 200)
    run = tmp_path / "run"
    job = ["label", str(photos), str(run), "--classes", "cat,dog", "--templates", "single", "--clip", CLIP]
    driver = subprocess.Popen(
        [sys.executable, "-m", "ovss_ray", *job, "--shard-size", "1"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: driver.poll() is not None or any(run.glob("shards/*")), 120)
    everything = Process(driver.pid).children(recursive=True)
    listening = [
        (process.name(), connection.laddr)
        for process in [Process(driver.pid), *everything]
        for connection in process.net_connections(kind="inet")
        if connection.status == CONN_LISTEN
    ]
    (folder,) = places.glob("ovss-ray-*/*")
    assert (folder / "session_latest" / "logs").is_dir()
    driver.kill()
    driver.wait()
    assert {name for name, _ in listening} > {"gcs_server", "raylet"}
    assert {address.ip.removeprefix("::ffff:") for _, address in listening} <= {"127.0.0.1", "::1"}
    wait_for(lambda: not any(is_left(process) for process in everything), 30)
    wait_for(lambda: not folder.exists(), 30)


def test_folders_of_dead_drivers_go_with_the_next_start_and_others_stay(places: Path) -> None:
    root = embedded.folder_of_folders()
    assert root.parent == places
    assert root.stat().st_mode & 0o077 == 0
    dead, living, old, new = (root / f"{name}-{os.getpid()}" for name in ("dead", "living", "old", "new"))
    for folder in (dead, living, old, new):
        (folder / "session").mkdir(parents=True)
    (dead / "lock").touch()
    os.utime(old, (1, 1))
    with (living / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        embedded.sweep(root)
    assert [folder.exists() for folder in (dead, living, old, new)] == [False, True, False, True]
