"""Every file below a folder, one at a time: local disks, and the stores that fsspec knows (S3: `s3_listing.py`)."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import fsspec

from ovss_ray.images.versions import version_of_info

_LOG = logging.getLogger(__name__)

# Names of one local directory that are held and sorted together. Larger directories come in sorted chunks of this
# size, in the order of the file system: memory stays bounded at 10 million files in one folder.
SORTED_NAMES = 200_000

Enter = Callable[[str], bool]


class StoredFile(NamedTuple):
    """A file below the folder that is walked; size and etag where the listing gives them for nothing.

    Attributes:
        unlisted: whether it is not a file, but a folder that could not be looked into.
    """

    relative: str
    size_bytes: int | None = None
    etag: str | None = None
    unlisted: bool = False


def walk_local(root: str, enter: Enter) -> Iterator[StoredFile]:
    """Walk a local directory depth-first, sorted like object keys (a folder sorts as its name with a slash).

    Links to directories are followed, except back into a directory that is being walked. Sizes are not asked for: on
    network file systems a stat per file costs more than the listing itself. Entries that cannot be looked at (links
    that lead nowhere or to themselves, files that vanish) come like files, and a directory that cannot be listed comes
    once itself, so that whoever reads them says what is wrong with each; that of the root is raised.

    Args:
        root: an absolute path.
        enter: says for a directory, relative to the root, whether to go into it.
    """
    top = os.stat(root)  # noqa: PTH116
    identity = (top.st_dev, top.st_ino)
    open_directories = {identity}
    stack = [("", identity, _sorted_entries(root))]
    while stack:
        prefix, identity, entries = stack[-1]
        try:
            entry = next(entries, None)
        except OSError as error:
            if not prefix or not _is_odd(error):
                raise
            _LOG.warning("%s cannot be listed: %s", prefix, error.strerror)
            yield StoredFile(prefix, unlisted=True)
            entry = None
        if entry is None:
            stack.pop()
            open_directories.discard(identity)
            continue
        relative = prefix + entry.name
        if not _is_directory(entry):
            if entry.is_symlink() or entry.is_file():  # a dangling link is kept and becomes a `not_found` row
                yield StoredFile(relative)
        elif enter(relative):
            try:
                status = entry.stat()
            except FileNotFoundError:
                yield StoredFile(relative + "/", unlisted=True)
                continue
            identity = (status.st_dev, status.st_ino)
            if identity in open_directories:
                _LOG.warning("%s links back to a directory above it and is not followed", entry.path)
                continue
            open_directories.add(identity)
            stack.append((relative + "/", identity, _sorted_entries(entry.path)))


def _sorted_entries(directory: str) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        while chunk := list(islice(entries, SORTED_NAMES)):
            yield from sorted(chunk, key=lambda entry: entry.name + "/" if _is_directory(entry) else entry.name)


def _is_directory(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:  # a link to itself, or into a folder that may not be entered
        if not _is_odd(error):
            raise
        return False


def _is_odd(error: OSError) -> bool:
    """Whether an error says something about one name, and nothing about the disk."""
    return error.errno in (errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)


def s3_folders(fs: fsspec.AbstractFileSystem, bucket: str, folder: str) -> list[str]:
    """The folders right below a folder of a bucket ("" or ending with a slash); the first thousand names there."""
    page = fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=folder, Delimiter="/")
    return [item["Prefix"].rstrip("/") for item in page.get("CommonPrefixes", ())]


def walk_store(fs: fsspec.AbstractFileSystem, root: str, enter: Enter) -> Iterator[StoredFile]:
    """Walk any other store depth-first and sorted, one listing per folder."""
    stack = [_sorted_infos(fs, root)]
    while stack:
        info = next(stack[-1], None)
        if info is None:
            stack.pop()
            continue
        relative = info["name"][len(root) :].strip("/")
        if info["type"] != "directory":
            yield StoredFile(relative, info.get("size"), version_of_info(info).tag)
        elif enter(relative):
            stack.append(_sorted_infos(fs, info["name"].rstrip("/")))


def _sorted_infos(fs: fsspec.AbstractFileSystem, folder: str) -> Iterator[dict[str, Any]]:
    infos = fs.ls(folder, detail=True)
    fs.invalidate_cache(folder)  # or fsspec would keep every listing in memory
    names = {info["name"].rstrip("/") + ("/" if info["type"] == "directory" else ""): info for info in infos}
    return (names[name] for name in sorted(names) if name.rstrip("/") != folder)
