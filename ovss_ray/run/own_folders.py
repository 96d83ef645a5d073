"""Temporary folders of processes that may be killed: whoever makes one next removes those of the dead.

They lie side by side in one folder that only this user can enter. A lock in each says that its process lives.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

STALE_S = 60.0  # a folder without a lock is about to get one, or its process died before that
_LOCK = "lock"


class OwnFolder:
    """A new folder of this process; removes what dead ones left beside it.

    Args:
        root: the folder of such folders.

    Attributes:
        path: of the folder; its file "lock" is in use.
    """

    def __init__(self, root: Path) -> None:
        _sweep(root)
        while True:
            self.path = Path(tempfile.mkdtemp(prefix=f"{os.getpid()}-", dir=root))
            self._lock = (self.path / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX)
            if self._is_there():
                break
            self._lock.close()  # another process has swept it away before it was locked

    def _is_there(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._lock.fileno()), (self.path / _LOCK).stat())
        except FileNotFoundError:
            return False

    def leave(self) -> None:
        """Give it up, to be removed by the next process that makes one."""
        self._lock.close()


@contextmanager
def own_folder() -> Iterator[Path]:
    """An empty temporary folder that is removed at the end, or, after a kill, by the next process that needs one."""
    folder = OwnFolder(folder_of_folders(Path(tempfile.gettempdir())))
    inside = folder.path / "files"
    inside.mkdir()
    try:
        yield inside
    finally:
        shutil.rmtree(folder.path, ignore_errors=True)
        folder.leave()


def folder_of_folders(base: Path) -> Path:
    """Where the folders of this user's processes lie, in a folder that others may write to as well."""
    root = base / f"ovss-ray-{os.getuid()}"
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    about = root.lstat()
    if about.st_uid != os.getuid() or about.st_mode & 0o077:  # made by somebody else before
        root = Path(tempfile.mkdtemp(prefix="ovss-ray-", dir=base))
    return root


def _sweep(root: Path) -> None:
    for folder in root.iterdir():
        try:
            lock = (folder / _LOCK).open()
        except OSError:
            with contextlib.suppress(OSError):
                if time.time() - folder.lstat().st_mtime > STALE_S:
                    shutil.rmtree(folder, ignore_errors=True)
            continue
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                continue  # its process lives
            shutil.rmtree(folder, ignore_errors=True)
