"""The run directory: how its files are read, and created at most once, on a local disk or in an object store."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ovss_ray.errors import InputError, RunFailedError
from ovss_ray.images.stores import StorageOptions, explained, is_local, open_store
from ovss_ray.labels.layout import SHARDS_FOLDER
from ovss_ray.labels.shard import list_shards


class RunDirectory:
    """Reads and creates the files of one run; safe to share between threads.

    Args:
        uri: folder on a local disk or in an object store.
        storage_options: fsspec options per protocol.
        conditional_put: whether the store honours "create only if absent"; `prepare` finds out.
    """

    def __init__(
        self,
        uri: str,
        storage_options: StorageOptions | None = None,
        *,
        conditional_put: bool = True,
    ) -> None:
        self.uri = uri.rstrip("/")
        self.storage_options = storage_options
        self.fs, self.root = open_store(self.uri, storage_options)
        self.is_local = is_local(self.uri)
        self.conditional_put = conditional_put

    def path(self, name: str) -> str:
        """Full path of a file of the run on its file system."""
        return f"{self.root}/{name}"

    # -- reading -----------------------------------------------------------------------------------------------

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return bool(self.fs.exists(self.path(name)))

    def read(self, name: str) -> bytes | None:
        """Bytes of a file, or None if there is no such file."""
        try:
            return bytes(self.fs.cat_file(self.path(name)))
        except FileNotFoundError:
            return None

    def read_json(self, name: str) -> dict[str, Any] | None:
        """A JSON file as a dict, or None if there is no such file.

        Raises:
            RunFailedError: the file is not JSON.
        """
        data = self.read(name)
        if data is None:
            return None
        try:
            content = json.loads(data)
        except ValueError:
            raise RunFailedError(
                f"{self.uri}/{name} is damaged (not JSON); restore it, or start in a new run directory"
            ) from None
        return dict(content)

    def done_shards(self) -> set[int]:
        """Ids of the shards whose file exists: one listing of `shards/`."""
        return set(list_shards(self.fs, self.path(SHARDS_FOLDER)))

    # -- writing -----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the folder, sweep what killed processes left behind, and find out what the store can do.

        Raises:
            InputError: the place cannot be written to.
        """
        try:
            with explained(self.uri, "written"):
                if self.is_local:
                    for folder in ("manifest", "shards"):
                        Path(self.path(folder)).mkdir(parents=True, exist_ok=True)
                self.sweep()
                self.conditional_put = self._probe()
        except OSError as error:
            raise InputError(f"the run directory {self.uri} cannot be written: {_reason(error)}") from error

    def sweep(self) -> None:
        """Remove temporary files; a writer that loses its temporary to another process's sweep writes it again."""
        if self.is_local:
            shutil.rmtree(self.path(".tmp"), ignore_errors=True)

    def create(self, name: str, data: bytes) -> bool:
        """Create a file that must not exist yet, in one atomic step.

        Returns:
            False if the file was there already (it is left as it is).

        Raises:
            OSError: the store refused or failed.
        """
        if self.is_local:
            return self._link_new(self.path(name), data)
        if not self.conditional_put:
            if self.fs.exists(self.path(name)):
                return False
            self.fs.pipe_file(self.path(name), data)
            return True
        try:
            self.fs.pipe_file(self.path(name), data, mode="create")
        except OSError as error:
            if not _lost_race(error):
                raise
            return False
        return True

    def replace(self, name: str, data: bytes) -> None:
        """Write a file that may exist; readers see the old or the new bytes, never a mixture."""
        if self.is_local:
            self._write_temporary(data, lambda temporary: temporary.replace(self.path(name)))
        else:
            self.fs.pipe_file(self.path(name), data)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    def files_in(self, folder: str) -> list[str]:
        """Names, inside the run directory, of the files in one of its folders."""
        self.fs.invalidate_cache(self.path(folder))
        try:
            found = self.fs.ls(self.path(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{name.rsplit('/', 1)[-1]}" for name in found)

    def _link_new(self, final: str, data: bytes) -> bool:
        try:
            # Unlike a rename, a link fails if the name is taken.
            self._write_temporary(data, lambda temporary: os.link(temporary, final))
        except FileExistsError:
            return False
        return True

    def _write_temporary(self, data: bytes, publish: Callable[[Path], object]) -> None:
        for attempt in range(3):
            folder = Path(self.path(".tmp"))
            folder.mkdir(exist_ok=True)
            temporary = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                publish(temporary)
                return
            except FileNotFoundError:  # another process that starts on this run swept the folder: write it again
                if attempt == 2:
                    raise
            finally:
                temporary.unlink(missing_ok=True)

    def _probe(self) -> bool:
        """Whether the store honours "create only if absent"."""
        if self.is_local:
            return True
        probe = self.path(f".tmp/probe-{uuid.uuid4().hex}")
        try:
            self.fs.pipe_file(probe, b"first", mode="create")
            try:
                self.fs.pipe_file(probe, b"second", mode="create")
            except OSError as error:
                if not _lost_race(error):
                    raise
                return True
            return False
        except (NotImplementedError, TypeError, ValueError):
            return False
        finally:
            self.remove(probe.removeprefix(f"{self.root}/"))


def _lost_race(error: OSError) -> bool:
    """Whether a conditional put failed because the file exists.

    s3fs says `FileExistsError` only if the reply names the failed condition, which not every S3 server does.
    """
    code = getattr(error.__cause__, "response", {}).get("Error", {}).get("Code")
    return isinstance(error, FileExistsError) or code in ("PreconditionFailed", "412")


def is_final(error: OSError) -> bool:
    """Whether a write error will not go away by trying again: no space, no permission, read-only."""
    return isinstance(error, PermissionError) or error.errno in (
        errno.ENOSPC,
        errno.EDQUOT,
        errno.EROFS,
        errno.EACCES,
        errno.EPERM,
    )


def _reason(error: OSError) -> str:
    return error.strerror or str(error) or type(error).__name__
