"""The run directory: how its files are read, and created at most once, on a local disk or in an object store."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import shlex
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from fsspec.asyn import sync

from ovss_ray.errors import InputError, OvssError, RunFailedError, SettingError
from ovss_ray.images.backoff import try_often
from ovss_ray.images.drivers import open_bounded
from ovss_ray.images.stores import (
    FINAL_FAILURES,
    StorageOptions,
    StoreFailure,
    answered_status,
    brief,
    explained,
    is_local,
    open_store,
    protocol_of,
    store_failure,
)
from ovss_ray.labels.layout import SHARDS_FOLDER
from ovss_ray.labels.shard import list_shards
from ovss_ray.redaction import redacted
from ovss_ray.run.files import Files, LocalFiles, StoredFiles

log = logging.getLogger(__name__)

T = TypeVar("T")

READ_ATTEMPTS = 5
LIST_ATTEMPTS = 3  # the driver itself tries each page of a listing again
WRITE_ATTEMPTS = 7  # half a minute: much cheaper than to label a shard again
_TIMEOUT_S = 20.0

_FINAL_ERRNOS = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room there, or raise the quota",
    errno.EROFS: "mount it writable, or use another place",
    errno.EACCES: "check the permissions",
    errno.EPERM: "check the permissions",
    errno.ENOTSUP: "use another disk or an object store",
}


class StoreUnavailableError(OvssError, OSError):
    """The run directory could not be read or written in many attempts; what failed may work later."""

    exit_code = 5


class RunDirectory:
    """Reads and creates the files of one run; safe to share between threads.

    Reading and writing survive what passes: a busy store (429, 503), server errors, timeouts, lost connections, lost
    replies and conflicts of conditional puts. What does not pass (no permission, no space) is not tried again.

    Args:
        uri: folder on a local disk or in an object store.
        storage_options: fsspec options per protocol.
        conditional_put: whether the store honours "create only if absent"; `prepare` finds out.
        sleep: how to wait between attempts.

    Attributes:
        fs: the file system, for reading files piece by piece; its driver tries failed requests again.
        root: path of the run directory on it.
        is_local: whether it lies on a disk.
    """

    def __init__(
        self,
        uri: str,
        storage_options: StorageOptions | None = None,
        *,
        conditional_put: bool = True,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.uri = uri.rstrip("/")
        self.storage_options = storage_options
        self.is_local = is_local(self.uri)
        self._sleep = sleep
        self.fs, self.root = open_store(self.uri, storage_options)
        self._files: Files
        if self.is_local:
            self._files = LocalFiles(self.path(".tmp"))
        else:
            once, _ = open_bounded(self.uri, storage_options or {}, requests=1, timeout_s=_TIMEOUT_S)
            self._files = StoredFiles(once, conditional_put=conditional_put)

    @property
    def continue_command(self) -> str:
        """The command that goes on with the run in this directory; storage options are not in it, but asked for."""
        command = shlex.join(["ovss-ray", "continue", redacted(self.uri)])
        return f"{command} --storage-options ..." if self.storage_options else command

    @property
    def conditional_put(self) -> bool:
        """Whether files are created by one step that fails if they exist."""
        return self._files.conditional_put if isinstance(self._files, StoredFiles) else True

    def path(self, name: str) -> str:
        """Full path of a file of the run on its file system."""
        return f"{self.root}/{name}"

    # -- reading -----------------------------------------------------------------------------------------------

    def exists(self, name: str) -> bool:
        """Whether a file is there."""
        return self._reading(name, lambda: self._files.exists(self.path(name)))

    def read(self, name: str) -> bytes | None:
        """Bytes of a file, or None if there is no such file.

        Raises:
            InputError: the store cannot be reached, is busy for long, or refuses.
            StoreUnavailableError: the last attempt failed in another way; `exists` and the listings raise both too.
        """
        try:
            return self._reading(name, lambda: self._files.read(self.path(name)))
        except (FileNotFoundError, NotADirectoryError):
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
        found = self._reading(
            SHARDS_FOLDER, lambda: list_shards(self.fs, self.path(SHARDS_FOLDER)), attempts=LIST_ATTEMPTS
        )
        return set(found)

    # -- writing -----------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Make the folder, sweep what killed processes left behind, and find out what the store can do.

        Raises:
            InputError: the place cannot be written to.
        """
        if protocol_of(self.uri) in ("http", "https"):
            raise SettingError(f"{self.uri}: nothing can be written to a web server; use a disk or an object store")
        try:
            with explained(self.uri, "written"):
                if self.is_local:
                    for folder in ("manifest", "shards"):
                        Path(self.path(folder)).mkdir(parents=True, exist_ok=True)
                self.sweep()
                self._probe()
        except OSError as error:
            raise InputError(
                f"the run directory {self.uri} cannot be written: {_reason(error)}; {_what_to_do(error)}"
            ) from error

    def sweep(self) -> None:
        """Remove temporary files; a writer that loses its temporary to another process's sweep writes it again."""
        if self.is_local:
            shutil.rmtree(self.path(".tmp"), ignore_errors=True)

    def create(self, name: str, data: bytes) -> bool:
        """Create a file that must not exist yet, in one atomic step.

        Returns:
            False if the file was there already (it is left as it is); True also if an earlier attempt of this call had
            created it without our learning of it.

        Raises:
            RunFailedError: it cannot be written and trying again is pointless: no space, no permission, no bucket.
            StoreUnavailableError: the last of many attempts failed.
        """
        with self._writing(name):
            return self._persist(name, lambda: self._files.create(self.path(name), data))

    def replace(self, name: str, data: bytes) -> None:
        """Write a file that may exist; readers see the old or the new bytes, never a mixture.

        Raises:
            RunFailedError, StoreUnavailableError: as in `create`.
        """
        with self._writing(name):
            self._persist(name, lambda: self._files.replace(self.path(name), data))

    def try_replace(self, name: str, data: bytes) -> bool:
        """Write a file that may exist, in one attempt; False if that fails, for what is written again soon anyway."""
        try:
            self._files.replace(self.path(name), data)
        except Exception as error:  # drivers raise exceptions of their own
            log.debug("%s/%s could not be written: %s", self.uri, name, _reason(error))
            return False
        return True

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        with self._writing(name):
            self._persist(name, lambda: self._files.remove(self.path(name)))

    def files_in(self, folder: str) -> list[str]:
        """Names, inside the run directory, of the files in one of its folders."""
        self.fs.invalidate_cache(self.path(folder))
        try:
            found = self._reading(folder, lambda: self.fs.ls(self.path(folder), detail=False), attempts=LIST_ATTEMPTS)
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{name.rsplit('/', 1)[-1]}" for name in found)

    def entries(self) -> list[str]:
        """Names of files and folders in the run directory itself, in alphabetical order; none if it is not there.

        Of an S3 store the first thousand: it may be a bucket of millions.
        """
        self.fs.invalidate_cache(self.root)
        try:
            found = self._reading("", self._list_some, attempts=LIST_ATTEMPTS)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = (name.rstrip("/") for name in found)  # some stores list the folder itself
        return sorted(name.rsplit("/", 1)[-1] for name in names if name != self.root)

    def _list_some(self) -> list[str]:
        if "s3" not in self.fs.protocol:
            return list(self.fs.ls(self.root, detail=False))
        return [entry["name"] for entry in sync(self.fs.loop, self.fs._lsdir, self.root, max_items=1000)]

    def _probe(self) -> None:
        name = f".tmp/probe-{uuid.uuid4().hex}"
        try:
            self._persist(name, lambda: self._files.probe(self.path(name)))
        except Exception:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self._files.remove(self.path(name))
            raise
        try:
            self._persist(name, lambda: self._files.remove(self.path(name)))
        except PermissionError:
            log.warning("%s/%s cannot be removed without permission to delete; it does no harm", self.uri, name)

    def _reading(self, name: str, operation: Callable[[], T], attempts: int = READ_ATTEMPTS) -> T:
        place = f"{self.uri}/{name}" if name else self.uri
        with explained(place):
            try:
                return try_often(
                    operation,
                    attempts=attempts,
                    is_final=_is_refusal,
                    sleep=self._sleep,
                    on_retry=lambda failure, error: self._warn("reading", name, failure, error),
                )
            except Exception as error:
                if store_failure(error) != "other":
                    raise  # explained above, or a file that is not there
                raise StoreUnavailableError(
                    f"{place} could not be read in {attempts} attempts: {_reason(error)}"
                ) from error

    def _persist(self, name: str, operation: Callable[[], T]) -> T:
        return try_often(
            operation,
            attempts=WRITE_ATTEMPTS,
            is_final=_is_refusal,
            sleep=self._sleep,
            on_retry=lambda failure, error: self._warn("writing", name, failure, error),
        )

    def _warn(self, doing: str, name: str, failure: StoreFailure, error: Exception) -> None:
        log.warning("%s %s/%s failed (%s: %s); trying again", doing, self.uri, name, failure, _reason(error))

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Turn the last error of writing a file into a sentence."""
        try:
            yield
            self.fs.invalidate_cache(self.path(name))  # written beside it
        except Exception as error:
            file = f"{self.uri}/{name}"
            if _is_refusal(error):
                raise RunFailedError(f"{file} cannot be written: {_reason(error)}; {_what_to_do(error)}") from error
            raise StoreUnavailableError(
                f"{file} could not be written in {WRITE_ATTEMPTS} attempts: {_reason(error)}"
            ) from error


def is_final(error: OSError) -> bool:
    """Whether a write error will not go away by trying again: no space, no permission, read-only."""
    return isinstance(error, PermissionError) or error.errno in _FINAL_ERRNOS


def _is_refusal(error: Exception) -> bool:
    if isinstance(error, OSError) and is_final(error):
        return True
    return answered_status(error) == 507 or store_failure(error) in FINAL_FAILURES  # 507: no space


def _what_to_do(error: Exception) -> str:
    if answered_status(error) == 507:
        return _FINAL_ERRNOS[errno.ENOSPC]
    if isinstance(error, OSError) and error.errno in _FINAL_ERRNOS:
        return _FINAL_ERRNOS[error.errno]
    advice = {
        "forbidden": _FINAL_ERRNOS[errno.EACCES],
        "credentials": "set credentials in the environment or in storage_options",
        "rejected": "check the address and storage_options",
    }
    return advice.get(store_failure(error)) or "check that the folder or bucket exists"


def _reason(error: Exception) -> str:
    return brief(error)
