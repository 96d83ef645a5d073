"""The drivers behind fsspec, set so that retries and waiting stay within bounds that the caller knows."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine
from datetime import datetime
from typing import Any, TypeVar

import fsspec

from ovss_ray.errors import SettingError
from ovss_ray.images.reach import USERS_WORD, Reach
from ovss_ray.images.stores import StorageOptions, open_store, protocol_of
from ovss_ray.version import __version__

T = TypeVar("T")


def open_bounded(
    uri: str,
    storage_options: StorageOptions,
    *,
    requests: int,
    timeout_s: float,
    connections: int = 64,
    reach: Reach = USERS_WORD,
) -> tuple[fsspec.AbstractFileSystem, str]:
    """Open the file system that holds a URI, as `open_store` does, with limits where the options given say nothing.

    The drivers of Google and Azure keep their own retries, six and three, which cannot be set from here.

    Args:
        uri: see `open_store`.
        storage_options: see `open_store`.
        requests: how often the S3 driver makes a request that fails. With 1 the caller learns of every failure; with
            more, a reply that breaks off or does not come counts double, because two layers of the driver retry.
        timeout_s: limit for connecting and for each read from the connection.
        connections: connections to an S3 store that may be open together.
        reach: see `open_store`.

    Returns:
        The fsspec file system and the path inside it.
    """
    protocol = protocol_of(uri)
    options = storage_options
    if protocol in ("s3", "s3a"):
        options = {protocol: _s3(storage_options, requests, timeout_s, connections)}
    elif protocol in ("http", "https"):
        options = {protocol: _http(storage_options, timeout_s)}
    fs, path = open_store(uri, options, reach)
    if protocol in ("s3", "s3a"):
        fs.retries = min(requests, 2)  # by s3fs itself, around those of botocore
        _read_times_quickly(fs)
    return fs, path


def call_within(fs: fsspec.AbstractFileSystem, timeout_s: float, method: str, *arguments: Any, **options: Any) -> Any:
    """Call a method of a file system such as "pipe_file"; one that talks to a network is given up when time is up.

    Raises:
        TimeoutError: nothing came back in time; what was asked for may have happened nevertheless.
    """
    if not fs.async_impl:
        return getattr(fs, method)(*arguments, **options)
    return wait_within(fs, timeout_s, getattr(fs, f"_{method}")(*arguments, **options))


def wait_within(fs: fsspec.AbstractFileSystem, timeout_s: float, answer: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine that runs in the event loop of a file system, or `TimeoutError` when time is up."""

    async def bounded() -> T:
        # wait_for cancels the request; the time limit of fsspec's own `sync` would leave it running.
        return await asyncio.wait_for(answer, timeout_s)

    try:
        return asyncio.run_coroutine_threadsafe(bounded(), fs.loop).result()
    except asyncio.TimeoutError as error:
        raise TimeoutError(f"no complete answer within {timeout_s:g} s") from error


def _s3(storage_options: StorageOptions, requests: int, timeout_s: float, connections: int) -> dict[str, Any]:
    given = {**storage_options.get("s3", {}), **storage_options.get("s3a", {})}
    config = {
        "max_pool_connections": connections,
        "connect_timeout": timeout_s,
        "read_timeout": timeout_s,
        "retries": {"mode": "standard", "total_max_attempts": requests},
        **given.get("config_kwargs", {}),
    }
    # max_concurrency 1 reads an object in one GET; s3fs would ask for its size first, which doubles requests.
    # An instance of its own, because its retries are changed: others in this process may want them.
    return {"max_concurrency": 1, **given, "config_kwargs": config, "skip_instance_cache": True}


def _read_times_quickly(fs: fsspec.AbstractFileSystem) -> None:
    """More than half of a listing's CPU time would go into botocore's parser of times in any format, once a key."""
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    if fs.session is None:  # else it is the user's
        try:
            fs.session = AioSession(**fs.kwargs)  # as s3fs would
        except TypeError as error:
            raise SettingError(f"storage_options['s3'] cannot be used: {error}") from error
        fs.session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=read_time)


def read_time(value: Any) -> datetime:
    """A time in an answer of S3, in the format of its listings or in any other, as botocore reads it."""
    if isinstance(value, str) and value.endswith("Z"):
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(f"{value[:-1]}+00:00")
    from botocore.utils import parse_timestamp

    parsed: datetime = parse_timestamp(value)
    return parsed


def _http(storage_options: StorageOptions, timeout_s: float) -> dict[str, Any]:
    import aiohttp

    given = {**storage_options.get("http", {}), **storage_options.get("https", {})}
    client = {
        "headers": {"User-Agent": f"ovss-ray/{__version__}"},  # some hosts refuse the name of the library
        "timeout": aiohttp.ClientTimeout(total=timeout_s),
        **given.get("client_kwargs", {}),
    }
    return {**given, "client_kwargs": client}
