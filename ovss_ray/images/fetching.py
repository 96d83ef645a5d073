"""The bytes of one image from wherever it lies, with retries where trying again can help."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import os
import random
import stat
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import fsspec

from ovss_ray.errors import ImageError, SettingError
from ovss_ray.images.stores import (
    StorageOptions,
    is_local,
    local_path,
    open_store,
    protocol_of,
    retry_after,
    store_failure,
)
from ovss_ray.version import __version__

_FIRST_WINDOW_S = 0.5
_LONGEST_WINDOW_S = 20.0
_LONGEST_RETRY_AFTER_S = 60.0
_THROTTLED_FACTOR = 4  # object stores need a while to spread a busy prefix over more servers


class Fetcher:
    """Reads images; one instance serves many threads at once and can be pickled to other processes.

    A request that fails is made again after a random wait whose window doubles each time (exponential back-off with
    full jitter), longer where the server says that it is busy (429, 503), and never before its Retry-After. Missing
    and forbidden images are not asked for twice. The retries of the drivers are switched off where they can be, so that
    attempts don't multiply.
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
    ) -> None:
        """Configure the reads.

        Args:
            storage_options: see `open_store`.
            attempts: requests for one image before it is given up, 1 or more.
            timeout_s: limit of one request, connection and body together; local disks know no limit.
            connections: requests to one object store that may be under way together; more threads wait in line.
            max_bytes: larger images are `too_large`, where their size is known before they are read.
            sleep: how to wait between attempts.
        """
        if attempts < 1 or timeout_s <= 0 or connections < 1:
            raise SettingError("attempts and connections must be 1 or more and timeout_s above 0")
        self.storage_options = {protocol: dict(options) for protocol, options in (storage_options or {}).items()}
        self.attempts = attempts
        self.timeout_s = timeout_s
        self.connections = connections
        self.max_bytes = max_bytes
        self._sleep = sleep
        self._open_stores()

    def fetch(self, uri: str, size_bytes: int | None = None) -> bytes:
        """Read one image whole.

        Args:
            uri: as in `ImageRef.uri`.
            size_bytes: its size by the manifest; fewer bytes count as a broken transfer and are asked for again.

        Raises:
            ImageError: `not_found`, `forbidden`, `too_large` (over `max_bytes`), or `fetch_failed` after the last
                attempt, with the reason of that attempt.
        """
        if not uri:
            raise ImageError("not_found", "the list names no image in this row")
        if size_bytes is not None:
            self._check_size(size_bytes)
        for attempt in range(1, self.attempts + 1):
            try:
                return self._read(uri, size_bytes)
            except ImageError:
                raise
            except (SettingError, ValueError) as error:  # an address that no attempt can make valid
                raise ImageError("fetch_failed", f"not a usable address: {error}") from error
            except Exception as error:  # every store raises exceptions of its own, from drivers that may be missing
                failure = store_failure(error)
                if failure == "not_found":
                    raise ImageError("not_found", _describe(error, "there is no such file")) from error
                if failure == "forbidden":
                    raise ImageError("forbidden", _describe(error, "no permission")) from error
                if attempt == self.attempts:
                    reason = _describe(error, type(error).__name__)
                    raise ImageError("fetch_failed", f"{reason} (attempt {attempt} of {attempt})") from error
                self._sleep(_wait_s(attempt, error, throttled=failure == "throttled"))
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _read(self, uri: str, size_bytes: int | None) -> bytes:
        data = self._read_local(local_path(uri)) if is_local(uri) else self._read_remote(uri)
        if size_bytes is not None and len(data) < size_bytes:
            raise OSError(f"only {len(data)} of {size_bytes} bytes arrived")
        return data

    def _read_local(self, path: str) -> bytes:
        status = os.stat(path)  # noqa: PTH116
        if not stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
            raise ImageError("not_found", "there is no file of this name, but a folder or device")
        self._check_size(status.st_size)
        with open(path, "rb") as file:
            return file.read()

    def _read_remote(self, uri: str) -> bytes:
        fs = self._store(uri)
        path = fs._strip_protocol(uri)

        async def read() -> bytes:
            # wait_for cancels the request; the time limit of fsspec's own `sync` would leave it running.
            data: bytes = await asyncio.wait_for(fs._cat_file(path), self.timeout_s)
            return data

        try:
            return asyncio.run_coroutine_threadsafe(read(), fs.loop).result()
        except (asyncio.TimeoutError, TimeoutError) as error:
            raise OSError(f"no complete answer within {self.timeout_s:g} s") from error

    def _check_size(self, size_bytes: int) -> None:
        if size_bytes > self.max_bytes:
            raise ImageError("too_large", f"{size_bytes} bytes, over the limit of {self.max_bytes}")

    def _store(self, uri: str) -> fsspec.AbstractFileSystem:
        """The file system of a URI: opened once, then shared by all threads."""
        protocol = protocol_of(uri)
        # Azure addresses name the account, which is part of the connection.
        key = (protocol, urlsplit(uri).netloc if protocol in ("az", "abfs", "abfss") else "")
        with self._lock:
            if key not in self._stores:
                self._stores[key], _ = open_store(uri, self._tuned(protocol))
                if protocol in ("s3", "s3a"):
                    self._stores[key].retries = 1
            return self._stores[key]

    def _tuned(self, protocol: str) -> StorageOptions:
        """The options given for a protocol, with this fetcher's limits where they say nothing."""
        if protocol in ("s3", "s3a"):
            given = {**self.storage_options.get("s3", {}), **self.storage_options.get("s3a", {})}
            config = {
                "max_pool_connections": self.connections,
                "connect_timeout": self.timeout_s,
                "read_timeout": self.timeout_s,
                "retries": {"mode": "standard", "total_max_attempts": 1},
                **given.get("config_kwargs", {}),
            }
            # max_concurrency 1 reads an object in one GET; s3fs would ask for its size first, which doubles requests.
            # An instance of its own, because its retries are switched off: others in this process may want them.
            own = {"max_concurrency": 1, **given, "config_kwargs": config, "skip_instance_cache": True}
            return {protocol: own}
        if protocol in ("http", "https"):
            import aiohttp

            given = {**self.storage_options.get("http", {}), **self.storage_options.get("https", {})}
            client = {
                "headers": {"User-Agent": f"ovss-ray/{__version__}"},  # some hosts refuse the name of the library
                "timeout": aiohttp.ClientTimeout(total=self.timeout_s),
                **given.get("client_kwargs", {}),
            }
            return {protocol: {**given, "client_kwargs": client}}
        return self.storage_options

    def _open_stores(self) -> None:
        self._lock = threading.Lock()
        self._stores: dict[tuple[str, str], fsspec.AbstractFileSystem] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_stores")}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        vars(self).update(state)
        self._open_stores()


def _describe(error: Exception, without_text: str) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error)
    return f"{type(error).__name__}: {text}" if text else without_text


def _wait_s(attempt: int, error: Exception, throttled: bool) -> float:
    window = min(_LONGEST_WINDOW_S, _FIRST_WINDOW_S * (_THROTTLED_FACTOR if throttled else 1) * 2.0 ** (attempt - 1))
    jitter = random.uniform(0, window)
    asked_for = _seconds(retry_after(error))
    # The jitter comes on top, or all threads would be back together.
    return jitter if asked_for is None else jitter + min(asked_for, _LONGEST_RETRY_AFTER_S)


def _seconds(retry_after_header: str | None) -> float | None:
    """The wait that a Retry-After header asks for: it holds seconds or a date."""
    if retry_after_header is None:
        return None
    try:
        return max(0.0, float(retry_after_header))
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(retry_after_header)
    except ValueError:
        return None
    return max(0.0, (until - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
