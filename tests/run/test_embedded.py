"""A Ray of one's own: reached from this machine only, and gone with its driver, which is killed alone here."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import ray  # brings its psutil
from psutil import CONN_LISTEN, NoSuchProcess, Process

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
