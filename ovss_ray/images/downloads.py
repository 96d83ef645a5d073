"""One read from any store: first what the reply says of the file, then its content within bounds.

The drivers' own `cat_file` reads whatever comes into memory and drops the headers. Here the headers decide before the
body is read whether it is what was planned, and the body is counted, decompressed, while it arrives. It stays one
request an image.
"""

from __future__ import annotations

import os
import stat
import zlib
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import fsspec

from ovss_ray.errors import ImageError
from ovss_ray.images.stores import TruncatedError
from ovss_ray.images.versions import (
    Version,
    bare_etag,
    changed,
    changed_size,
    check_unchanged,
    http_seconds,
    version_of_status,
)

CHUNK_BYTES = 1 << 20


class NoRoomError(Exception):
    """There is no room now for a file that is larger than expected; what was read of it is dropped.

    Attributes:
        size_bytes: its size, or a guess at it where nobody tells: twice what has come.
    """

    def __init__(self, size_bytes: int) -> None:
        super().__init__(f"no room for {size_bytes} bytes")
        self.size_bytes = size_bytes


def all_room(_size_bytes: int) -> bool:
    """For `Wish.room`: there is always room."""
    return True


@dataclass(frozen=True)
class Wish:
    """What is to be read, and what was planned.

    Attributes:
        start, end: the byte range; None reads the whole file.
        max_bytes: the most bytes that a whole file may have; ranges have their own length.
        size_bytes: the size that was planned, of a whole file.
        mark: the version that was planned, see `Version.mark`.
        what: the file that holds the image, for messages; "" if it is the image.
        room: asked before more is read whether there is room for so many bytes of the file, those read included.
    """

    start: int | None = None
    end: int | None = None
    max_bytes: int = 1 << 30
    size_bytes: int | None = None
    mark: str | None = None
    what: str = ""
    room: Callable[[int], bool] = all_room

    def ask_for_room(self, size_bytes: int) -> None:
        """Make sure that there is room for a file of this size.

        Raises:
            NoRoomError: there is none.
        """
        if not self.room(size_bytes):
            raise NoRoomError(size_bytes)

    @property
    def length(self) -> int | None:
        """Bytes of the range; None for a whole file."""
        return None if self.start is None or self.end is None else self.end - self.start

    @property
    def most_bytes(self) -> int:
        """What may arrive at most."""
        return self.max_bytes if self.length is None else self.length


@dataclass(frozen=True)
class Reply:
    """A reply whose body is not read yet.

    Attributes:
        version: what its headers say of the object.
        chunks: the body, decompressed, in pieces.
        as_stored: whether the pieces are what sizes count; not where the object, or its transfer, was compressed.
    """

    version: Version
    chunks: AsyncIterator[bytes]
    as_stored: bool = True


async def download(fs: fsspec.AbstractFileSystem, path: str, wish: Wish) -> bytes:
    """Read as asked; in the event loop of the driver.

    Raises:
        ImageError: `fetch_failed`, another version than planned, or a server that ignores byte ranges; `too_large`.
        TruncatedError: fewer bytes than planned, from a server that does not say how many there are.
        NoRoomError: there is no room for it now.
        Exception: whatever else the driver raises.
    """
    async with _opened(fs, path, wish) as reply:
        return await _received(reply, wish)


def read_local(path: str, wish: Wish) -> bytes:
    """Read as asked, from a disk; raises as `download`, and `ImageError` (`not_found`) for what is no file."""
    status = os.stat(path)  # noqa: PTH116
    if stat.S_ISDIR(status.st_mode):
        os.scandir(path).close()  # a folder that could not be listed says why
    if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
        raise ImageError("not_found", "there is no file of this name, but a folder or device")
    with open(path, "rb") as file:
        version = version_of_status(os.fstat(file.fileno()))
        _check_before(wish, version)
        wish.ask_for_room(wish.length or version.size_bytes or 0)
        file.seek(wish.start or 0)
        # What is there, and a byte more that shows whether the file grows; never what a limit would allow.
        data = file.read(wish.length if wish.length is not None else (version.size_bytes or 0) + 1)
        pieces = [data]
        while wish.length is None and pieces[-1] and len(data) > (version.size_bytes or 0):
            pieces.append(file.read(CHUNK_BYTES))
            if sum(map(len, pieces)) > wish.max_bytes:
                raise too_large(wish.max_bytes)
            wish.ask_for_room(sum(map(len, pieces)))
        if wish.mark is not None:
            check_unchanged(wish.mark, version_of_status(os.fstat(file.fileno())), wish.what)
    data = data if len(pieces) == 1 else b"".join(pieces)
    _check_complete(wish, len(data), version.size_bytes)
    return data


def _check_before(wish: Wish, version: Version) -> None:
    check_unchanged(wish.mark, version, wish.what)
    if wish.length is None and version.size_bytes is not None:
        _check_size(wish, version.size_bytes)
        if version.size_bytes > wish.max_bytes:
            raise too_large(wish.max_bytes, version.size_bytes)


async def _received(reply: Reply, wish: Wish) -> bytes:
    _check_before(wish, reply.version)
    told = (reply.version.size_bytes if wish.length is None else wish.length) if reply.as_stored else None
    wish.ask_for_room(told or 0)
    pieces: list[bytes] = []
    count = 0
    async for piece in reply.chunks:
        count += len(piece)
        if count > wish.most_bytes:
            raise too_large(wish.max_bytes) if wish.length is None else no_byte_ranges()
        if count > (told or 0) and not wish.room(count):
            pieces.clear()  # the error holds this frame, for as long as somebody holds the error
            raise NoRoomError(min(2 * count, wish.most_bytes))
        pieces.append(piece)
    if reply.as_stored:
        _check_complete(wish, count, reply.version.size_bytes)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _check_size(wish: Wish, size_bytes: int) -> None:
    if wish.size_bytes is not None and size_bytes != wish.size_bytes:
        raise changed_size(wish.what, wish.size_bytes, size_bytes)


def _check_complete(wish: Wish, count: int, told: int | None) -> None:
    asked = wish.size_bytes if wish.length is None else wish.length
    if told is not None and wish.end is not None and told < wish.end:
        raise changed(wish.what, f"at least {wish.end} bytes then, {told} now")
    if asked is not None and count < asked:
        raise TruncatedError(f"only {count} of {asked} bytes arrived")
    if wish.length is None:
        _check_size(wish, count)


def too_large(max_bytes: int, size_bytes: int | None = None) -> ImageError:
    """The error for a file over the limit; None for a size that nobody told."""
    count = "more bytes than" if size_bytes is None else f"{size_bytes} bytes, over"
    return ImageError("too_large", f"{count} the limit of {max_bytes} bytes")


def no_byte_ranges() -> ImageError:
    """The error for a server that answers with the whole file."""
    return ImageError("fetch_failed", "the server ignores byte ranges, which images inside a file need")


def _opened(fs: fsspec.AbstractFileSystem, path: str, wish: Wish) -> AbstractAsyncContextManager[Reply]:
    protocols = (fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol
    if "http" in protocols:
        return _from_web(fs, path, wish)
    if "s3" in protocols:
        return _from_s3(fs, path, wish)
    if "gs" in protocols and hasattr(fs, "session"):
        return _from_google(fs, path, wish)
    if "abfs" in protocols and hasattr(fs, "service_client"):
        return _from_azure(fs, path, wish)
    return _from_any(fs, path, wish)


@asynccontextmanager
async def _from_web(fs: fsspec.AbstractFileSystem, path: str, wish: Wish) -> AsyncIterator[Reply]:
    options = dict(fs.kwargs)
    # Images are compressed already, and a server that compresses them once more tells no size and another ETag.
    headers = {"Accept-Encoding": "identity", **options.pop("headers", {}), **_range(wish)}
    session = await fs.set_session()
    async with session.get(fs.encode_url(path), headers=headers, **options) as reply:
        fs._raise_not_found_for_status(reply, path)
        yield _http_reply(reply, reply.headers)


@asynccontextmanager
async def _from_google(fs: fsspec.AbstractFileSystem, path: str, wish: Wish) -> AsyncIterator[Reply]:
    from gcsfs.retry import validate_response  # type: ignore[import-not-found, import-untyped, unused-ignore]

    bucket = fs.split_path(path)[0]
    if hasattr(fs, "_is_zonal_bucket") and await fs._is_zonal_bucket(bucket):  # these are read over gRPC
        async with _from_any(fs, path, wish) as reply:
            yield reply
        return
    await fs._set_session()
    async with fs.session.get(
        fs.url(path),
        params=fs._get_params({}),
        headers=fs._get_headers(_range(wish)),
        timeout=fs.requests_timeout,
    ) as response:
        if response.status >= 400:
            validate_response(response.status, await response.content.read(CHUNK_BYTES), path, None)
        reply = _http_reply(response, response.headers)
        generation = response.headers.get("X-Goog-Generation")
        version = Version(generation or reply.version.tag, reply.version.size_bytes, reply.version.modified)
        yield Reply(version, reply.chunks, reply.as_stored)


@asynccontextmanager
async def _from_s3(fs: fsspec.AbstractFileSystem, path: str, wish: Wish) -> AsyncIterator[Reply]:
    bucket, key, version_id = fs.split_path(path)
    asked = {} if version_id is None else {"VersionId": version_id}
    reply = await fs._call_s3("get_object", Bucket=bucket, Key=key, **asked, **_range(wish))
    body = reply["Body"]

    async def chunks() -> AsyncIterator[bytes]:
        while piece := await body.read(CHUNK_BYTES):
            yield piece

    try:
        size = reply.get("ContentLength") if wish.length is None else _total(reply.get("ContentRange"))
        yield _stored_reply(Version(bare_etag(reply.get("ETag")), size), chunks(), reply.get("ContentEncoding"))
    finally:
        body.close()


@asynccontextmanager
async def _from_azure(fs: fsspec.AbstractFileSystem, path: str, wish: Wish) -> AsyncIterator[Reply]:
    container, blob, version_id = fs.split_path(path)
    async with fs.service_client.get_blob_client(container=container, blob=blob) as client:
        # Releases that know it decompress without a bound, unless it is switched off.
        as_it_is = {"decompress": False} if "decompress" in str(client.download_blob.__doc__) else {}
        options = {"version_id": version_id, "max_concurrency": 1, **as_it_is, **getattr(fs, "_timeout_kwargs", {})}
        stream = await client.download_blob(offset=wish.start, length=wish.length, **options)
        found = stream.properties
        size = found.size if wish.length is None else _total(found.content_range)
        encoding = found.content_settings.content_encoding if as_it_is else None
        yield _stored_reply(Version(bare_etag(found.etag), size), stream.chunks(), encoding)


@asynccontextmanager
async def _from_any(fs: fsspec.AbstractFileSystem, path: str, wish: Wish) -> AsyncIterator[Reply]:
    """A store that is only known by the interface of fsspec: it tells no version, and a range bounds what comes."""
    start = wish.start or 0

    async def chunks() -> AsyncIterator[bytes]:
        yield await fs._cat_file(path, start=start, end=start + wish.most_bytes + (wish.length is None))

    yield Reply(Version(), chunks())


def _http_reply(response: Any, headers: Mapping[str, str]) -> Reply:
    as_stored = headers.get("Content-Encoding", "identity") in ("identity", "")
    total = _total(headers.get("Content-Range"))
    if total is None and response.status != 206 and headers.get("Content-Length", "").isdigit():
        total = int(headers["Content-Length"])
    version = Version(bare_etag(headers.get("ETag")), total, http_seconds(headers.get("Last-Modified")))
    return Reply(version, response.content.iter_chunked(CHUNK_BYTES), as_stored)


def _stored_reply(version: Version, chunks: AsyncIterator[bytes], encoding: str | None) -> Reply:
    """Of a store that gives objects as they were put there, "Content-Encoding: gzip" and all."""
    if encoding not in ("gzip", "deflate"):
        return Reply(version, chunks)
    return Reply(version, _inflated(chunks), as_stored=False)


async def _inflated(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    inflater = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by its first bytes
    try:
        async for piece in chunks:
            rest = piece
            while rest and not inflater.eof:
                yield inflater.decompress(rest, CHUNK_BYTES)
                rest = inflater.unconsumed_tail
        yield inflater.flush()
    except zlib.error as error:
        raise ImageError("corrupt", f"what the store calls compressed cannot be decompressed: {error}") from error


def _range(wish: Wish) -> dict[str, str]:
    return {} if wish.length is None else {"Range": f"bytes={wish.start}-{(wish.end or 1) - 1}"}


def _total(content_range: str | None) -> int | None:
    """The size of the whole file, from "bytes 0-99/1234"."""
    total = (content_range or "").rpartition("/")[2]
    return int(total) if total.isdigit() else None
