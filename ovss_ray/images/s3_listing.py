"""Listing a bucket in the order of its keys with many requests at once."""

from __future__ import annotations

import asyncio
import pickle
import zlib
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, replace
from typing import Any

import fsspec

from ovss_ray.errors import InputError
from ovss_ray.images.versions import bare_etag
from ovss_ray.images.walking import StoredFile

_Key = tuple[str, int, str | None]  # key, size, ETag

_REQUESTS = 32  # under way at once
_SERIAL_PAGES = 4  # a range of keys that is longer is split at its folders
_SMALLEST_FOLDER = 4  # keys, on an average page
_PAGES_AHEAD = 2048  # pages held for later: two million keys, about 80 MB


def walk_s3(fs: fsspec.AbstractFileSystem, bucket: str, folder: str, prefix: str) -> Iterator[StoredFile]:
    """List the keys of a bucket, sorted, with size and ETag (ListObjectsV2), with many requests at once.

    Keys that end with a slash, which consoles create to show a folder, are left out.

    Args:
        fs: an s3fs file system.
        folder: what keys are given relative to; "" or ends with a slash.
        prefix: begins with `folder`; only keys that begin with it are asked for.

    Raises:
        InputError: there is no such bucket.
    """
    for page in _Listing(fs, bucket, prefix).pages():
        for key, size_bytes, etag in page:
            yield StoredFile(key[len(folder) :], size_bytes, etag)


@dataclass(eq=False)
class _Range:
    """Keys that begin with `prefix`, behind `after` and up to `last` (with all below it, if it is a folder).

    It is listed page by page; what has arrived waits in `pages` for its turn.

    Attributes:
        folders: list the folders right below the prefix instead of what is in them.
        folders_together: so many folders make a range that is hardly longer than what is listed without a split.
        next: the range behind this one.
        token: where the next page begins.
    """

    prefix: str
    after: str = ""
    first: str = ""
    last: str = ""
    folders: bool = False
    folders_together: int = 1
    next: _Range | None = None
    pages: list[bytes] = field(default_factory=list)
    token: str | None = None
    listed_pages: int = 0
    asked: bool = False
    done: bool = False

    def has(self, key: str) -> bool:
        return key > self.after and key >= self.first and not self.is_behind(key)

    def is_behind(self, key: str) -> bool:
        return bool(self.last) and key > self.last and not key.startswith(self.last)

    def query(self) -> dict[str, str]:
        delimiter = {"Delimiter": "/"} if self.folders else {}
        if self.token is not None:
            return {"Prefix": self.prefix, "ContinuationToken": self.token, **delimiter}
        return {"Prefix": self.prefix, **({"StartAfter": self.after} if self.after else {}), **delimiter}


class _Listing:
    """A chain of ranges that together hold all keys with a prefix, in order.

    It begins as one range, listed page by page. A range that turns out long is split at the folders below its prefix,
    again and again; runs of small folders stay together, so that splitting costs few requests. What arrives before
    its turn is held compressed and within bounds; beyond them, only the first range goes on.
    """

    def __init__(self, fs: fsspec.AbstractFileSystem, bucket: str, prefix: str) -> None:
        self._fs = fs
        self._bucket = bucket
        self._front: _Range | None = _Range(prefix)
        self._requests: dict[Future[dict[str, Any]], _Range] = {}
        self._held = 0
        # Directory buckets (S3 Express) list unsorted and cannot begin behind a key.
        self._splits = not bucket.endswith("--x-s3")

    def pages(self) -> Iterator[list[_Key]]:
        try:
            while self._front is not None:
                while self._front.pages:
                    self._held -= 1
                    yield _unpacked(self._front.pages.pop(0))
                if self._front.done:
                    self._front = self._front.next
                    continue
                self._ask()
                answered, _ = wait(self._requests, return_when=FIRST_COMPLETED)
                for request in answered:
                    self._take(request)
        finally:
            for request in self._requests:
                request.cancel()

    def _ask(self) -> None:
        """Begin requests, for the first ranges in order first."""
        range_ = self._front
        while range_ is not None and len(self._requests) < _REQUESTS:
            if range_ is not self._front and self._held >= _PAGES_AHEAD:
                return
            if not range_.done and not range_.asked:
                range_.asked = True
                call = self._fs._call_s3("list_objects_v2", Bucket=self._bucket, **range_.query())
                self._requests[asyncio.run_coroutine_threadsafe(call, self._fs.loop)] = range_
            range_ = range_.next

    def _take(self, request: Future[dict[str, Any]]) -> None:
        range_ = self._requests.pop(request)
        try:
            page = request.result()
        except FileNotFoundError as error:  # a prefix without keys is no error, so it is the bucket
            raise InputError(f"the bucket {self._bucket} does not exist; check its name and the endpoint") from error
        range_.asked = False
        range_.token = page.get("NextContinuationToken") if page.get("IsTruncated") else None
        follow = self._take_folders(range_, page) if range_.folders else self._take_keys(range_, page)
        for later in reversed(follow):
            later.next, range_.next = range_.next, later

    def _hold(self, range_: _Range, items: list[dict[str, Any]]) -> None:
        if items:
            range_.pages.append(_packed(items))
            self._held += 1

    def _take_keys(self, range_: _Range, page: dict[str, Any]) -> list[_Range]:
        keys = [item["Key"] for item in page.get("Contents", ())]
        if keys and keys[0] <= range_.after:  # the store ignores StartAfter, so each range begins at its prefix
            self._splits = False
        self._hold(range_, [item for item in page.get("Contents", ()) if range_.has(item["Key"])])
        range_.done = range_.token is None or any(map(range_.is_behind, keys[-1:]))
        range_.after = max([range_.after, *keys[-1:]])
        range_.listed_pages += 1
        folders = len({_head(key, range_.prefix) for key in keys})
        long = range_.listed_pages >= _SERIAL_PAGES and self._splits
        # Listing the folders costs a request per thousand, too: of smaller ones it would take as long as their keys.
        if range_.done or not long or not keys or len(keys) < _SMALLEST_FOLDER * folders:
            return []
        range_.done = True
        return _rest(range_, max(_SERIAL_PAGES * (folders - 1), 1))

    def _take_folders(self, range_: _Range, page: dict[str, Any]) -> list[_Range]:
        """Turn a page of folders into ranges; the files between them are results already."""
        files = {item["Key"]: item for item in page.get("Contents", ())}
        names = sorted([*files, *(item["Prefix"] for item in page.get("CommonPrefixes", ()))])
        follow = []
        for group in _groups([name for name in names if range_.has(name)], files.keys(), range_.folders_together):
            if group[-1] in files:
                follow.append(_Range(group[0], done=True))
                self._hold(follow[-1], [files[name] for name in group])
            elif len(group) == 1:
                follow.append(_Range(group[0]))
            else:
                follow.append(_Range(range_.prefix, after=_just_before(group[0]), first=group[0], last=group[-1]))
        range_.done = True
        if range_.token is not None and not any(map(range_.is_behind, names[-1:])):
            follow.append(replace(range_, next=None, done=False, pages=[], after=max([range_.after, *names[-1:]])))
        return follow


def _rest(range_: _Range, folders_together: int) -> list[_Range]:
    """What is left of a range that has turned out long: the folder it stands in, and the folders behind that."""
    folder = _head(range_.after, range_.prefix)
    behind = replace(range_, next=None, done=False, pages=[], token=None, folders=True, after=folder)
    behind.folders_together = folders_together
    if not folder.endswith("/"):
        return [behind]
    inside = _Range(folder, after=range_.after, first=range_.first)
    return [inside] if folder == range_.last else [inside, behind]


def _groups(names: list[str], files: Any, folders_together: int) -> Iterator[list[str]]:
    """Cut sorted names into runs of files alone, and runs from folder to folder with at most so many of them."""
    group: list[str] = []
    folders = 0
    for position, name in enumerate(names):
        group.append(name)
        if name in files:
            starts_folder = position + 1 < len(names) and names[position + 1] not in files
            if folders == 0 and starts_folder:
                yield group
                group = []
            continue
        folders += 1
        if folders == folders_together:
            yield group
            group, folders = [], 0
    if group:
        yield from _without_trailing_files(group, files)


def _without_trailing_files(group: list[str], files: Any) -> Iterator[list[str]]:
    end = next((position for position in range(len(group), 0, -1) if group[position - 1] not in files), 0)
    yield from (part for part in (group[:end], group[end:]) if part)


def _head(key: str, prefix: str) -> str:
    """The folder right below the prefix that a key is in, with its slash; the key itself if it is in none."""
    name, slash, _ = key[len(prefix) :].partition("/")
    return prefix + name + slash


def _just_before(folder: str) -> str:
    """A key to begin behind so as not to miss a folder; sorts behind nearly all of what comes before it."""
    return folder[:-1] + chr(ord("/") - 1) + "~"


def _packed(items: list[dict[str, Any]]) -> bytes:
    keys: list[_Key] = [
        (item["Key"], item["Size"], bare_etag(item.get("ETag"))) for item in items if not item["Key"].endswith("/")
    ]
    return zlib.compress(pickle.dumps(keys, pickle.HIGHEST_PROTOCOL), 1)


def _unpacked(page: bytes) -> list[_Key]:
    keys: list[_Key] = pickle.loads(zlib.decompress(page))
    return keys
