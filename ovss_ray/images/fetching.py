"""The bytes of one image from wherever it lies, with retries where trying again can help."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from ovss_ray.errors import ImageError, SettingError
from ovss_ray.images.addresses import LONGEST_ADDRESS
from ovss_ray.images.backoff import try_often
from ovss_ray.images.downloads import NoRoomError, Wish, all_room, download, read_local, too_large
from ovss_ray.images.drivers import call_within, open_bounded, wait_within
from ovss_ray.images.limits import DEFAULT_MAX_BYTES
from ovss_ray.images.list_files import resolver
from ovss_ray.images.members import Member, split_member
from ovss_ray.images.reach import USERS_WORD, Reach
from ovss_ray.images.references import ImageRef
from ovss_ray.images.row_groups import RangeFile, RowGroups
from ovss_ray.images.stores import (
    StorageOptions,
    StoreFailure,
    answered_status,
    is_local,
    is_redirect_astray,
    local_path,
    protocol_of,
    store_failure,
    why_failed,
)
from ovss_ray.images.tars import BLOCK, LARGEST_HEADERS, check_member
from ovss_ray.images.versions import Version, changed, check_unchanged, version_of_info, version_of_status
from ovss_ray.images.window import Reply, RequestWindow

T = TypeVar("T")

RANGE_NOT_SATISFIABLE = 416
_PARQUET = "the Parquet file"
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
        max_bytes: int = DEFAULT_MAX_BYTES,
        sleep: Callable[[float], None] = time.sleep,
        on_retry: Callable[[StoreFailure], None] | None = None,
    ) -> None:
        """Configure the reads.

        Args:
            storage_options: see `open_store`.
            attempts: requests for one image before it is given up, 1 or more.
            timeout_s: limit of one request, connection and body together; local disks know no limit.
            connections: requests to one store that may be under way together; more threads wait in line.
            max_bytes: larger images are `too_large`; counted while they arrive, and after decompression, where nobody
                tells the size before.
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
        self,
        uri: str,
        size_bytes: int | None = None,
        offset: int | None = None,
        *,
        etag: str | None = None,
        header_bytes: int | None = None,
        reach: Reach = USERS_WORD,
        room: Callable[[int], bool] = all_room,
    ) -> bytes:
        """Read one image whole, as it was planned.

        Args:
            uri, size_bytes, offset, etag, header_bytes: as in `ImageRef`. Images inside a file need the offset, those
                in tars the size too. What is None is not compared.
            reach: what the address may lead to; `forbidden` where it leads elsewhere.
            room: told how large the file is, or how much has come where nobody tells, before more of it is read;
                False ends the read. Called from any thread; must not wait.

        Raises:
            NoRoomError: `room` said so.
            ImageError: `not_found`, `forbidden`, `too_large` (over `max_bytes`), or `fetch_failed`: at once for a file
                that changed since it was planned, else after the last attempt, with the reason of that attempt.
        """
        if size_bytes is not None and size_bytes > self.max_bytes:
            raise too_large(self.max_bytes, size_bytes)
        ref = ImageRef(uri, size_bytes, etag, offset, header_bytes=header_bytes)
        return self._often(uri, reach, lambda: self._read_image(ref, room))

    def version(self, uri: str, *, reach: Reach = USERS_WORD) -> Version:
        """Which version of a file is there now, as far as its store tells: one stat, or one request.

        Raises:
            ImageError: as `fetch`.
        """
        return self._often(uri, reach, lambda: self._version(uri))

    def _often(self, uri: str, reach: Reach, read: Callable[[], T]) -> T:
        if not uri:
            raise ImageError("not_found", "the list names no image in this row")
        _check_length(uri)
        try:
            with _under(reach):
                return try_often(
                    read, attempts=self.attempts, is_final=_is_final, sleep=self._sleep, on_retry=self._count_retry
                )
        except (ImageError, NoRoomError):
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

    def _read_image(self, ref: ImageRef, room: Callable[[int], bool]) -> bytes:
        member = split_member(ref.uri)
        if member is None:
            return self._read_in_turn(ref.uri, Wish(None, None, self.max_bytes, ref.size_bytes, ref.etag, room=room))
        if ref.offset is None:
            raise ImageError("not_found", f"the {member.kind} file holds no such image (any more)")
        if member.kind == "parquet":
            return self._read_cell(member, ref.offset, ref.etag, room)
        if ref.size_bytes is None:
            raise ValueError("an image in a tar is found by its size, and this is not given")
        return self._read_member(member, ref, ref.size_bytes, ref.offset)

    def _read_member(self, member: Member, ref: ImageRef, size_bytes: int, offset: int) -> bytes:
        """The headers lie right before the content: one request for both shows whether the member is still there."""
        known = ref.header_bytes is not None and ref.header_bytes <= LARGEST_HEADERS
        headers = min(ref.header_bytes if known and ref.header_bytes else BLOCK, offset)
        wish = Wish(offset - headers, offset + size_bytes, mark=ref.etag, what="the tar")
        data = self._read_in_turn(member.file, wish)
        check_member(data[:headers], member.name, size_bytes, with_name=known)
        return data[headers:]

    def _read_cell(self, member: Member, row: int, etag: str | None, room: Callable[[int], bool]) -> bytes:
        cell = self._row_groups.cell(member.file, member.name, row, etag)
        if cell.data is not None:
            Wish(room=room).ask_for_room(len(cell.data))
            return cell.data
        if not cell.path:
            raise ImageError("not_found", "the row of the Parquet file holds neither bytes nor a path")
        uri = resolver(member.file)(cell.path)
        _check_length(uri)
        with _under(_REACH.get().inside(member.file)):
            return self._read_in_turn(uri, Wish(max_bytes=self.max_bytes, room=room))

    def _open_parquet(self, uri: str, etag: str | None) -> Callable[[], Any]:
        """How to open the version of a Parquet file that was planned; without a mark, the one that is there now."""
        now = self._version(uri)
        size_bytes = now.size_bytes
        if size_bytes is None:
            raise ImageError("fetch_failed", "the server does not tell the size of the Parquet file")
        check_unchanged(etag, now, _PARQUET)
        mark, reach = etag or now.mark, _REACH.get()

        def read_range(start: int, end: int) -> bytes:  # called by threads of pyarrow's, too
            with _under(reach):
                return self._read_in_turn(uri, Wish(start, end, mark=mark, what=_PARQUET))

        return lambda: RangeFile(read_range, size_bytes)

    def _version(self, uri: str) -> Version:
        _check_reach(uri)
        if is_local(uri):
            return version_of_status(os.stat(local_path(uri)))  # noqa: PTH116
        fs = self._store(uri)
        path = fs._strip_protocol(uri)
        fs.invalidate_cache(path)
        return version_of_info(call_within(fs, self.timeout_s, "info", path))

    def _read_in_turn(self, uri: str, wish: Wish) -> bytes:
        """Read once the store's window has room; waiting there is no part of the time limit."""
        _check_reach(uri)
        if is_local(uri):
            return read_local(local_path(uri), wish)
        window = self._window(protocol_of(uri), urlsplit(uri).netloc)
        number = window.enter()
        reply: Reply = "none"
        try:
            fs = self._store(uri)
            data = wait_within(fs, self.timeout_s, download(fs, fs._strip_protocol(uri), wish))
            reply = "good"
            return data
        except Exception as error:
            if wish.length is not None and answered_status(error) == RANGE_NOT_SATISFIABLE:
                raise changed(wish.what, f"at least {wish.end} bytes then, fewer now") from error
            is_good = isinstance(error, (ImageError, NoRoomError))
            reply = "good" if is_good else _REPLIES.get(store_failure(error), "none")
            raise
        finally:
            window.leave(number, reply)

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
        self._row_groups = RowGroups(self._open_parquet, max_bytes=self.max_bytes)
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


def _check_length(uri: str) -> None:
    """Before a message is made of an address."""
    if len(uri) > LONGEST_ADDRESS:
        raise ImageError("fetch_failed", f"not a usable address: more than {LONGEST_ADDRESS} characters")


def _check_reach(uri: str) -> None:
    refusal = _REACH.get().refusal(uri)
    if refusal is not None:
        raise ImageError("forbidden", refusal)


def _is_final(error: Exception) -> bool:
    """Whether another attempt is pointless: the reason is in the image or its address, not in the way there."""
    if isinstance(error, (ImageError, NoRoomError, SettingError, ValueError)) or is_redirect_astray(error):
        return True
    return store_failure(error) in ("not_found", "forbidden", "rejected")
