"""Images in tar files, as WebDataset packs them: found by their headers alone, read by byte range."""

from __future__ import annotations

import io
import json
import logging
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

from ovss_ray.errors import InputError
from ovss_ray.images.versions import changed

_LOG = logging.getLogger(__name__)

BLOCK = tarfile.BLOCKSIZE
_SHOWN = 60  # characters of a name in a message
# What is read with each header: a few milliseconds of a store's bandwidth, against one request for every caption and
# thumbnail that lies within.
READ_AHEAD = 1 << 16

LARGEST_FIELDS = 16 << 20
"""Bytes of a `.json` or text file beside an image."""

LARGEST_HEADERS = 1 << 20
"""Bytes of the headers of a member: long names and what else is told of it."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_NAMES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")


@dataclass(frozen=True)
class TarMember:
    """A regular file in a tar; `offset` is the byte where its content begins, right behind its `header_bytes`."""

    name: str
    offset: int
    size_bytes: int
    header_bytes: int


def is_tar(path: str) -> bool:
    """Whether a name is that of a tar without compression."""
    return path.lower().endswith(".tar")


def names_compressed_tar(path: str) -> bool:
    """Whether a name is that of a compressed tar."""
    return path.lower().endswith(_COMPRESSED_NAMES)


def refuse_compressed(path: str) -> None:
    """Explain why a compressed tar cannot be an input.

    Raises:
        InputError: by its name, the file is one.
    """
    if names_compressed_tar(path):
        raise _compressed(path)


def tar_members(file: BinaryIO, size_bytes: int, source: str, *, wanted: Callable[[str], bool]) -> Iterator[TarMember]:
    """The regular files of a tar in its order (ustar, GNU and pax formats, also several tars joined end to end).

    Only headers are read. Links and sparse files have no content of their own; those that are wanted are counted in a
    warning.

    Args:
        file: the tar, open for reading; seeks are used to step over contents.
        size_bytes: its size.
        source: its address, for messages.
        wanted: says by name whether a link would be missed.

    Raises:
        InputError: compressed, damaged or cut off, or with headers of more than `LARGEST_HEADERS` bytes; after all
            members before the damage. Only a missing end (padding and end mark) is forgiven.
    """
    left_out = 0
    for info, start in _headers(file, size_bytes, source):
        if info.isreg() and info.sparse is None:
            yield TarMember(info.name, info.offset_data, info.size, info.offset_data - start)
        elif not info.isdir() and wanted(info.name):
            left_out += 1
    if left_out:
        _LOG.warning(
            "%s: %d images are links or sparse files and are left out; pack the tar without links to have them",
            source,
            left_out,
        )


def _headers(file: BinaryIO, size_bytes: int, source: str) -> Iterator[tuple[tarfile.TarInfo, int]]:
    """Each member with the byte where its headers begin; a long name, or what counts for all members, has its own."""
    headers = _HeaderFile(file, source)
    tar = _open(file, headers, source)
    offset = zero_blocks = 0
    while block := _block_at(file, offset):
        if not any(block):  # the end mark is two of them; what is behind it may be another tar
            offset, zero_blocks = offset + BLOCK, zero_blocks + 1
            continue
        headers.begin(offset)
        try:
            info = tarfile.TarInfo.fromtarfile(tar)
        except (tarfile.HeaderError, ValueError, RecursionError) as error:
            if zero_blocks > 1:
                _LOG.warning("%s: what follows its end mark at byte %d is no tar and is ignored", source, offset)
                return
            raise InputError(
                f"{source} is damaged: no header at byte {offset} of {size_bytes} ({error}); pack or download it again"
            ) from error
        if info.isreg() and info.sparse is None and info.offset_data + info.size > size_bytes:
            raise InputError(
                f"{source} is cut off: {info.name} should end at byte {info.offset_data + info.size}, but the file "
                f"ends at {size_bytes}; pack or download it again"
            )
        if tar.offset <= offset:
            raise InputError(f"{source} is damaged: the header at byte {offset} has a negative size; pack it again")
        headers.check(tar.pax_headers)  # of all members
        yield info, offset
        offset, zero_blocks = tar.offset, 0


class _HeaderFile(io.RawIOBase):
    """A tar of which headers alone are read; tarfile would read those of any length."""

    def __init__(self, file: BinaryIO, source: str) -> None:
        self._file = file
        self._source = source
        self._start = 0

    def begin(self, offset: int) -> None:
        """Go to the headers of a member."""
        self._start = offset
        self._file.seek(offset)

    def read(self, size: int = -1) -> bytes:
        """Read the next header."""
        if not 0 <= size <= self._start + LARGEST_HEADERS - self._file.tell():
            raise self._too_large()
        return self._file.read(size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move, as in any file."""
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        """The position."""
        return self._file.tell()

    def check(self, common: Mapping[str, str]) -> None:
        """Refuse what is told of all members, if it has become too much."""
        if common and sum(len(name) + len(value) for name, value in common.items()) > LARGEST_HEADERS:
            raise self._too_large()

    def _too_large(self) -> InputError:
        return InputError(
            f"{self._source} has headers of more than {LARGEST_HEADERS} bytes at byte {self._start}; pack it again"
        )


def _open(file: BinaryIO, headers: _HeaderFile, source: str) -> tarfile.TarFile:
    start = _block_at(file, 0)
    if not start:
        raise InputError(f"{source} is empty (0 bytes); pack or download it again")
    if any(start.startswith(mark) for mark in _COMPRESSED):
        raise _compressed(source)
    headers.begin(0)
    try:
        return tarfile.TarFile(fileobj=headers, mode="r", encoding="utf-8", errors="surrogateescape")
    except (tarfile.ReadError, RecursionError) as error:
        raise InputError(f"{source} is not a tar, or damaged at its beginning ({error})") from error


def _block_at(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.read(BLOCK)


def _compressed(source: str) -> InputError:
    return InputError(
        f"{source} is a compressed tar, and images cannot be read out of the middle of one; decompress it (images "
        "hardly shrink), or unpack it and give the folder"
    )


def check_member(headers: bytes, name: str, size_bytes: int, *, with_name: bool) -> None:
    """Make sure that what lies before the content of a member is still its headers.

    Args:
        headers: all of them, those for long names included, or only the last 512 bytes.
        name, size_bytes: of the member, by the manifest.
        with_name: whether all headers are there, so that they tell the name.

    Raises:
        ImageError: `fetch_failed`, the tar has changed.
    """
    try:
        info = _whole_header(headers) if with_name else _last_header(headers)
    except (tarfile.HeaderError, tarfile.ReadError, ValueError, RecursionError):
        info = None
    was = repr(name[-_SHOWN:])
    if info is None or not info.isreg() or info.size != size_bytes:
        raise changed("the tar", f"no file of {size_bytes} bytes where {was} was")
    if with_name and info.name != name:
        raise changed("the tar", f"{info.name[-_SHOWN:]!r} where {was} was")


def _whole_header(headers: bytes) -> tarfile.TarInfo | None:
    tar = tarfile.TarFile(fileobj=io.BytesIO(headers), mode="r", encoding="utf-8", errors="surrogateescape")
    return tar.next()


def _last_header(headers: bytes) -> tarfile.TarInfo:
    return tarfile.TarInfo.frombuf(headers[-BLOCK:], "utf-8", "surrogateescape")


class SampleFields:
    """What lies beside the images of a tar: WebDataset's files of one name up to its first dot are one sample.

    Args:
        names: what is kept: fields of the `.json` file of a sample, or extensions of its text files (`txt`, `cls`).
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        self._names = names
        self._values: dict[str, Any] = {}
        self.seen: dict[str, None] = {}

    def add(self, file: BinaryIO, member: TarMember, source: str) -> None:
        """Take in a file of the current sample.

        Raises:
            InputError: a `.json` file that is not a JSON object, or a text file that is wanted and not UTF-8.
        """
        extension = sample_of(member.name)[1]
        if extension != "json" and extension not in self._names:
            self.seen.setdefault(extension)
            return
        file.seek(member.offset)
        if member.size_bytes > LARGEST_FIELDS:
            raise InputError(
                f"{member.name} in {source} has {member.size_bytes} bytes, over the limit of {LARGEST_FIELDS} for "
                "what is kept with an image; leave keep_columns out"
            )
        try:
            text = file.read(member.size_bytes).decode()
            fields = json.loads(text) if extension == "json" else {extension: text}
        except (ValueError, RecursionError) as error:
            raise InputError(f"{member.name} in {source} cannot be read: {error}") from error
        if not isinstance(fields, dict):
            raise InputError(f"{member.name} in {source} is not a JSON object, so it has no fields to keep")
        self._values.update(fields)
        self.seen.update(dict.fromkeys(fields))

    def take(self) -> list[Any]:
        """The values of the sample, None for what it does not have; the next file begins a new one."""
        values = [self._values.get(name) for name in self._names]
        self._values = {}
        return values


def sample_of(name: str) -> tuple[str, str]:
    """The sample that a member belongs to, and its extension: "a/b.c.jpg" is ("a/b", "c.jpg")."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension
