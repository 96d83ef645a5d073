"""The bytes of one image from wherever it lies, with retries where trying again can help."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import fsspec

from ovss_ray.errors import ImageError, SettingError
from ovss_ray.images.backoff import try_often
from ovss_ray.images.drivers import call_within, open_bounded
from ovss_ray.images.list_files import resolver
from ovss_ray.images.members import Member, split_member
from ovss_ray.images.reach import USERS_WORD, Reach
from ovss_ray.images.row_groups import RangeFile, RowGroups
from ovss_ray.images.stores import (
    StorageOptions,
    StoreFailure,
    TruncatedError,
    is_local,
    is_redirect_astray,
    local_path,
    protocol_of,
    store_failure,
    why_failed,
)
from ovss_ray.images.tars import BLOCK, is_header_of
from ovss_ray.images.window import Reply, RequestWindow

_STORES_REMEMBERED = 1024  # lists of web addresses name any number of hosts
_REPLIES: dict[StoreFailure, Reply] = {"throttled": "throttled", "not_found": "good", "forbidden": "good"}
# What the image that this thread fetches may be read from.
_REACH: ContextVar[Reach] = ContextVar("reach", default=USERS_WORD)


class Fetcher:
    """Reads images; one instance serves many threads at once and can be pickled to other processes.

    A request that fails is made again after a random wait whose window doubles each time (exponential back-off with
    full jitter), longer where the server says that it is busy (429, 503), and never before its Retry-After. Missing
    and forbidden images are not asked for twice. The retries of the drivers are switched off where they can be, so that
    attempts don't multiply. A store that says that it is busy gets fewer requests at a time (`RequestWindow`); each
    bucket and each host has a window of its own, which all threads share.
    """

    def __init__(
        self,
        storage_options: StorageOptions | None = None,
        attempts: int = 5,
        *,
        timeout_s: float = 60.0,
        connections: int = 64,
        max_bytes: int = 1 << 30,
        sleep: Callable[[float], None] = time.sleep,
        on_retry: Callable[[StoreFailure], None] | None = None,
    ) -> None:
        """Configure the reads.

        Args:
            storage_options: see `open_store`.
            attempts: requests for one image before it is given up, 1 or more.
            timeout_s: limit of one request, connection and body together; local disks know no limit.
            connections: requests to one store that may be under way together; more threads wait in line.
            max_bytes: larger images are `too_large`, where their size is known before they are read.
            sleep: how to wait between attempts.
            on_retry: told the kind of each failure that is followed by another attempt, in the thread of the fetch;
                stays behind when the fetcher is pickled.
        """
        if attempts < 1 or timeout_s <= 0 or connections < 1:
            raise SettingError("attempts and connections must be 1 or more and timeout_s above 0")
        self.storage_options = {protocol: dict(options) for protocol, options in (storage_options or {}).items()}
        self.attempts = attempts
        self.timeout_s = timeout_s
        self.connections = connections
        self.max_bytes = max_bytes
        self._sleep = sleep
        self._on_retry = on_retry
        self._open_stores()

    def fetch(
        self, uri: str, size_bytes: int | None = None, offset: int | None = None, *, reach: Reach = USERS_WORD
    ) -> bytes:
        """Read one image whole.

        Args:
            uri: as in `ImageRef.uri`.
            size_bytes: its size by the manifest; fewer bytes count as a broken transfer and are asked for again.
            offset: as in `ImageRef.offset`; images inside a file need it, and those in tars their size too.
            reach: what the address may lead to; `forbidden` where it leads elsewhere.

        Raises:
            ImageError: `not_found`, `forbidden`, `too_large` (over `max_bytes`), or `fetch_failed` after the last
                attempt, with the reason of that attempt.
        """
        if not uri:
            raise ImageError("not_found", "the list names no image in this row")
        if size_bytes is not None:
            self._check_size(size_bytes)
        try:
            with _under(reach):
                return try_often(
                    lambda: self._read_image(uri, size_bytes, offset),
                    attempts=self.attempts,
                    is_final=_is_final,
                    sleep=self._sleep,
                    on_retry=self._count_retry,
                )
        except ImageError:
            raise
        except Exception as error:
            if is_redirect_astray(error):
                raise ImageError("fetch_failed", why_failed(error)) from error
            if isinstance(error, (SettingError, ValueError)):  # an address that no attempt can make valid
                raise ImageError("fetch_failed", f"not a usable address: {error}") from error
            failure = store_failure(error)
            if failure == "not_found":
                raise ImageError("not_found", why_failed(error)) from error
            if failure == "forbidden":
                raise ImageError("forbidden", why_failed(error)) from error
            tried = f"(attempt {self.attempts} of {self.attempts})"
            raise ImageError("fetch_failed", f"{why_failed(error)} {tried}") from error

    def _count_retry(self, failure: StoreFailure, _: Exception) -> None:
        if self._on_retry is not None:
            self._on_retry(failure)

    def _read_image(self, uri: str, size_bytes: int | None, offset: int | None) -> bytes:
        member = split_member(uri)
        if member is None:
            return self._read_in_turn(uri, size_bytes)
        if member.kind == "parquet" and offset is not None:
            return self._read_cell(member, offset)
        if member.kind == "tar" and offset is not None and size_bytes is not None:
            return self._read_member(member.file, size_bytes, offset)
        raise ValueError("an image inside a file is found by its offset and size, and these are not given")

    def _read_member(self, tar: str, size_bytes: int, offset: int) -> bytes:
        data = self._read_in_turn(tar, BLOCK + size_bytes, max(offset - BLOCK, 0))
        if not is_header_of(data[:BLOCK], size_bytes):
            raise ImageError("fetch_failed", f"the tar has changed: no file of {size_bytes} bytes at byte {offset}")
        return data[BLOCK:]

    def _read_cell(self, member: Member, row: int) -> bytes:
        cell = self._row_groups.cell(member.file, member.name, row)
        if cell.data is not None:
            self._check_size(len(cell.data))
            return cell.data
        if not cell.path:
            raise ImageError("not_found", "the row of the Parquet file holds neither bytes nor a path")
        return self._read_in_turn(resolver(member.file)(cell.path), None)

    def _open_parquet(self, uri: str) -> Callable[[], Any]:
        _check_reach(uri)
        if is_local(uri):
            return lambda: open(local_path(uri), "rb")
        fs = self._store(uri)
        size_bytes = call_within(fs, self.timeout_s, "info", fs._strip_protocol(uri)).get("size")
        if size_bytes is None:
            raise ImageError("fetch_failed", "the server does not tell the size of the Parquet file")
        reach = _REACH.get()

        def read_range(start: int, end: int) -> bytes:  # called by threads of pyarrow's, too
            with _under(reach):
                return self._read_in_turn(uri, end - start, start)

        return lambda: RangeFile(read_range, size_bytes)

    def _read_in_turn(self, uri: str, size_bytes: int | None, start: int | None = None) -> bytes:
        """Read once the store's window has room; waiting there is no part of the time limit."""
        _check_reach(uri)
        if is_local(uri):
            return self._read(uri, size_bytes, start)
        window = self._window(protocol_of(uri), urlsplit(uri).netloc)
        number = window.enter()
        reply: Reply = "none"
        try:
            data = self._read(uri, size_bytes, start)
            reply = "good"
            return data
        except Exception as error:
            reply = _REPLIES.get(store_failure(error), "none")
            raise
        finally:
            window.leave(number, reply)

    def _read(self, uri: str, size_bytes: int | None, start: int | None) -> bytes:
        """Read a file, or from `start` on as many bytes as the size says."""
        end = None if start is None or size_bytes is None else start + size_bytes
        data = self._read_local(local_path(uri), start, end) if is_local(uri) else self._read_remote(uri, start, end)
        if size_bytes is not None and len(data) < size_bytes:
            raise TruncatedError(f"only {len(data)} of {size_bytes} bytes arrived")
        if end is not None and len(data) > (size_bytes or 0):
            raise ImageError("fetch_failed", "the server ignores byte ranges, which images inside a file need")
        return data

    def _read_local(self, path: str, start: int | None, end: int | None) -> bytes:
        status = os.stat(path)  # noqa: PTH116
        if stat.S_ISDIR(status.st_mode):
            os.scandir(path).close()  # a folder that could not be listed says why
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise ImageError("not_found", "there is no file of this name, but a folder or device")
        with open(path, "rb") as file:
            if start is not None and end is not None:
                file.seek(start)
                return file.read(end - start)
            self._check_size(status.st_size)
            return file.read()

    def _read_remote(self, uri: str, start: int | None, end: int | None) -> bytes:
        fs = self._store(uri)
        data: bytes = call_within(fs, self.timeout_s, "cat_file", fs._strip_protocol(uri), start=start, end=end)
        return data

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self.max_bytes:
            raise ImageError("too_large", f"{size_bytes} bytes, over the limit of {self.max_bytes}")

    def _store(self, uri: str) -> fsspec.AbstractFileSystem:
        """The file system of a URI: opened once, then shared by all threads."""
        protocol = protocol_of(uri)
        # Azure addresses name the account, which is part of the connection.
        reach = _REACH.get()
        account = urlsplit(uri).netloc if protocol in ("az", "abfs", "abfss") else ""
        key = (protocol, account, reach if protocol in ("http", "https") else None)
        with self._lock:
            if key not in self._stores:
                self._stores[key], _ = open_bounded(
                    uri,
                    self.storage_options,
                    requests=1,
                    timeout_s=self.timeout_s,
                    connections=self.connections,
                    reach=reach,
                )
            return self._stores[key]

    def _window(self, protocol: str, host: str) -> RequestWindow:
        with self._lock:
            return self._windows(protocol, host)

    def _open_stores(self) -> None:
        self._lock = threading.Lock()
        self._stores: dict[tuple[str, str, Reach | None], fsspec.AbstractFileSystem] = {}
        self._row_groups = RowGroups(self._open_parquet)
        self._windows = lru_cache(_STORES_REMEMBERED)(lambda _protocol, _host: RequestWindow(self.connections))

    def __getstate__(self) -> dict[str, Any]:
        of_this_process = ("_lock", "_stores", "_windows", "_row_groups", "_on_retry")
        return {name: value for name, value in vars(self).items() if name not in of_this_process}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._on_retry = None
        self._open_stores()


@contextmanager
def _under(reach: Reach) -> Iterator[None]:
    token = _REACH.set(reach)
    try:
        yield
    finally:
        _REACH.reset(token)


def _check_reach(uri: str) -> None:
    refusal = _REACH.get().refusal(uri)
    if refusal is not None:
        raise ImageError("forbidden", refusal)


def _is_final(error: Exception) -> bool:
    """Whether another attempt is pointless: the reason is in the image or its address, not in the way there."""
    if isinstance(error, (ImageError, SettingError, ValueError)) or is_redirect_astray(error):
        return True
    return store_failure(error) in ("not_found", "forbidden")
