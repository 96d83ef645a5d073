"""The files of a run directory, written whole and created at most once: one attempt, without retries."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import fsspec

from ovss_ray.images.drivers import call_within
from ovss_ray.images.stores import answered_status

T = TypeVar("T")

_REQUEST_S = 60.0
_SLOWEST_UPLOAD = 2**20  # bytes/s that an upload is given time for
_LARGEST_PUT = 5 * 2**30  # of S3
_REWRITES = 100  # as many writers may be done between two steps of one
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # as link() tells it


class Files(Protocol):
    """What a run directory asks of the place where it lies; all paths are paths of its file system."""

    def exists(self, path: str) -> bool:
        """Whether a file is there."""
        ...

    def read(self, path: str) -> bytes:
        """The bytes of a file.

        Raises:
            FileNotFoundError: there is none.
        """
        ...

    def create(self, path: str, data: bytes) -> bool:
        """Create a file that must not exist yet, in one atomic step; False if another one is there."""
        ...

    def replace(self, path: str, data: bytes) -> None:
        """Write a file that may exist; readers see the old or the new bytes, never a mixture."""
        ...

    def remove(self, path: str) -> None:
        """Remove a file if it exists."""
        ...

    def probe(self, path: str) -> None:
        """Write a file to find out what can be done here; it may stay, and a second call with it is harmless."""
        ...


class LocalFiles:
    """Files on a disk: written beside their place, then linked or moved into it.

    Args:
        temporaries: a folder on the same disk; it is there only while something is being written.
    """

    def __init__(self, temporaries: str) -> None:
        self._temporaries = Path(temporaries)

    def exists(self, path: str) -> bool:
        return Path(path).exists()

    def read(self, path: str) -> bytes:
        return Path(path).read_bytes()

    def create(self, path: str, data: bytes) -> bool:
        Path(path).parent.mkdir(exist_ok=True)
        return self._write_temporary(data, lambda temporary: _link(temporary, path))

    def replace(self, path: str, data: bytes) -> None:
        Path(path).parent.mkdir(exist_ok=True)
        self._write_temporary(data, lambda temporary: temporary.replace(path))

    def remove(self, path: str) -> None:
        Path(path).unlink(missing_ok=True)
        if Path(path).parent == self._temporaries:
            self._tidy()

    def probe(self, path: str) -> None:
        """As in `Files`.

        Raises:
            OSError: nothing can be written here, or the file system has no hard links.
        """
        self._write_temporary(b"", lambda temporary: _probe_link(temporary, path))

    def _tidy(self) -> None:
        with contextlib.suppress(OSError):
            self._temporaries.rmdir()  # unless another is writing there

    def _write_temporary(self, data: bytes, publish: Callable[[Path], T]) -> T:
        for attempt in range(1, _REWRITES + 1):
            self._temporaries.mkdir(exist_ok=True)
            temporary = self._temporaries / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex}"
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                return publish(temporary)
            except FileNotFoundError:  # another writer that was done, or one that starts, removed the folder
                if attempt == _REWRITES:
                    raise
            finally:
                temporary.unlink(missing_ok=True)
                self._tidy()
        raise AssertionError("unreachable: the last attempt returns or raises")


class StoredFiles:
    """Files in an object store.

    A put whose reply gets lost may have taken place, and may be made again beneath us: aiohttp repeats a PUT on a
    connection that breaks. It is then refused because of itself. So whoever is refused looks at what is there.

    Args:
        fs: the store; its driver should not try a failed request again, as the caller does.
        conditional_put: whether the store honours "create only if absent"; `probe` finds out.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, *, conditional_put: bool = True) -> None:
        self._fs = fs
        self.conditional_put = conditional_put

    def exists(self, path: str) -> bool:
        return bool(self._call("exists", path))

    def read(self, path: str) -> bytes:
        return bytes(self._call("cat_file", path))

    def create(self, path: str, data: bytes) -> bool:
        """As in `Files`; also True if the file there holds these very bytes: an earlier attempt of the same writer.

        Raises:
            OSError: besides what the store says, if it refuses because of a file that is not there.
        """
        if not self.conditional_put:
            if self.exists(path):
                return self._holds(path, data)
            self.replace(path, data)
            return True
        try:
            self._put(path, data, mode="create")
        except Exception as error:  # not only OSError: drivers raise exceptions of their own
            if not _lost_race(error):
                raise
            return self._holds(path, data)
        return True

    def replace(self, path: str, data: bytes) -> None:
        self._put(path, data)

    def remove(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._call("rm_file", path)

    def probe(self, path: str) -> None:
        """As in `Files`; sets `conditional_put`."""
        self.conditional_put = self._honours_condition(path)

    def _honours_condition(self, path: str) -> bool:
        for data in (b"first", b"second"):
            try:
                self._put(path, data, mode="create")
            except Exception as error:
                if _lost_race(error):
                    return True
                if not _not_implemented(error):
                    raise
                self.replace(path, data)  # raises if it was not the condition that the store refuses
                return False
        return False

    def _holds(self, path: str, data: bytes) -> bool:
        try:
            return self._call("size", path) == len(data) and self.read(path) == data
        except FileNotFoundError:
            raise OSError(errno.EBUSY, "the store says that the file exists, but it is not there") from None

    def _put(self, path: str, data: bytes, **options: Any) -> None:
        if "s3" in self._fs.protocol and len(data) < _LARGEST_PUT:
            # In one request: s3fs would send 100 MB and more in parts, which can be half done.
            options["chunksize"] = _LARGEST_PUT
        call_within(self._fs, _REQUEST_S + len(data) / _SLOWEST_UPLOAD, "pipe_file", path, data, **options)

    def _call(self, method: str, path: str) -> Any:
        return call_within(self._fs, _REQUEST_S, method, path)


def _link(temporary: Path, path: str) -> bool:
    try:
        os.link(temporary, path)  # unlike a rename, it fails if the name is taken
    except FileExistsError:
        # Over NFS a link whose reply got lost is asked for again, and then its own success is in the way.
        return temporary.stat().st_nlink == 2
    return True


def _probe_link(temporary: Path, path: str) -> None:
    try:
        os.link(temporary, path)
    except FileExistsError:
        return
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        raise OSError(errno.ENOTSUP, "its file system has no hard links") from None


def _lost_race(error: Exception) -> bool:
    """Whether a conditional put failed because the file exists.

    s3fs says `FileExistsError` only if the reply names the failed condition, which not every S3 server does.
    """
    return isinstance(error, FileExistsError) or answered_status(error) == 412


def _not_implemented(error: Exception) -> bool:
    """Whether a store, or an old driver, does not know "create only if absent"."""
    old_driver = isinstance(error, (NotImplementedError, TypeError, ValueError))
    return old_driver or type(error).__name__ == "ParamValidationError" or answered_status(error) in (400, 405, 501)
