"""Temporary folders of processes that were killed go with the next process that makes one; others stay."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TextIO

import pytest

from ovss_ray.run import own_folders
from ovss_ray.run.own_folders import OwnFolder, folder_of_folders, own_folder

HOLD = """
import sys
from ovss_ray.run.own_folders import own_folder
with own_folder() as folder:
    (folder / "a.txt").write_text("a")
    print(folder, flush=True)
    sys.stdin.readline()
"""


@pytest.fixture(autouse=True)
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder of temporary files."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def hold() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_a_killed_process_leaves_its_folder_to_the_next(places: Path) -> None:
    killed, left = hold()
    living, used = hold()
    killed.kill()
    killed.wait()
    assert (left / "a.txt").exists()
    root = folder_of_folders(places)
    assert root.stat().st_mode & 0o077 == 0
    for name, time in (("old", 1), ("new", None)):  # without a lock
        (root / name).mkdir()
        os.utime(root / name, None if time is None else (time, time))
    with own_folder() as own:
        assert own.is_relative_to(root)
        assert list(own.iterdir()) == []
        assert [path.exists() for path in (left.parent, used, root / "old", root / "new")] == [False, True, False, True]
    assert not own.parent.exists()
    living.communicate("\n")
    assert not used.parent.exists()


def test_a_folder_that_others_can_enter_is_not_used(places: Path) -> None:
    root = folder_of_folders(places)
    root.chmod(0o755)
    other = folder_of_folders(places)
    assert other != root
    assert other.stat().st_mode & 0o077 == 0


def test_a_folder_that_another_process_sweeps_before_it_is_locked_is_made_again(
    places: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = folder_of_folders(places)
    lock, swept = fcntl.flock, []

    def sweep_first(file: TextIO, operation: int) -> None:
        if not swept:
            swept.append(Path(file.name).parent)
            own_folders._sweep(root)
        lock(file, operation)

    monkeypatch.setattr(fcntl, "flock", sweep_first)
    own = OwnFolder(root)
    assert [own.path.exists(), swept[0].exists()] == [True, False]
    own.leave()
