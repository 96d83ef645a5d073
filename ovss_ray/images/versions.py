"""Which version of a file was planned, and whether the one that is read is still the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from email.utils import parsedate_to_datetime
from typing import Any

import fsspec

from ovss_ray.errors import ImageError

_SHOWN = 40  # characters of a tag in a message


@dataclass(frozen=True)
class Version:
    """What a store says of a file's content when it is listed or read.

    Attributes:
        tag: its own name for this content: Google's generation, else the ETag, without quotes or mark of weakness.
        size_bytes: the whole file, as it is stored.
        modified: seconds since 1970, in digits, when it was last changed.
    """

    tag: str | None = None
    size_bytes: int | None = None
    modified: str | None = None

    @property
    def mark(self) -> str | None:
        """What the manifest keeps: the tag, or for want of one size and time, "size=17;modified=1700000000.5"."""
        if self.tag is not None or self.size_bytes is None:
            return self.tag
        return f"size={self.size_bytes}" + (f";modified={self.modified}" if self.modified else "")


def is_weak(mark: str) -> bool:
    """Whether a mark holds size and time alone, which two files can have in common."""
    return mark.startswith("size=")


def version_at(fs: fsspec.AbstractFileSystem, path: str) -> Version:
    """The version of a file that is there now: one stat, or one request.

    Raises:
        Exception: whatever the driver raises, such as `FileNotFoundError`.
    """
    if "file" in fs.protocol:
        return version_of_status(os.stat(path))  # noqa: PTH116
    fs.invalidate_cache(path)  # what an earlier listing said may have changed
    return version_of_info(fs.info(path))


def version_of_info(info: Mapping[str, Any]) -> Version:
    """From what fsspec tells of a file in any store."""
    tag = info.get("generation") or bare_etag(info.get("ETag") or info.get("etag"))
    return Version(tag and str(tag), info.get("size"), http_seconds(info.get("Last-Modified")))


def version_of_status(status: os.stat_result) -> Version:
    """Of a file on a disk."""
    seconds, fraction = divmod(status.st_mtime_ns, 10**9)
    return Version(None, status.st_size, f"{seconds}.{fraction:09d}")


def bare_etag(etag: object) -> str | None:
    """An ETag as stores give it, without its quotes; weak ones are compared like others."""
    return str(etag).removeprefix("W/").strip('"') or None if etag else None


def http_seconds(header: str | None) -> str | None:
    """The time in a Last-Modified header; None where there is none that can be read."""
    try:
        return None if header is None else str(int(parsedate_to_datetime(header).timestamp()))
    except (ValueError, OverflowError):
        return None


def check_unchanged(mark: str | None, now: Version, what: str) -> None:
    """Compare a file with what was planned, as far as the store tells.

    Args:
        mark: as `Version.mark` gave it; None compares nothing.
        now: what the store says while the file is read.
        what: the file that holds the image, for the message, such as "the tar"; "" if it is the image.

    Raises:
        ImageError: `fetch_failed`, another version; with what differs.
    """
    if mark is None:
        return
    if is_weak(mark):
        size, _, modified = mark.removeprefix("size=").partition(";modified=")
        if now.size_bytes is not None and size.isdigit() and int(size) != now.size_bytes:
            raise changed_size(what, int(size), now.size_bytes)
        if now.modified is not None and modified and modified != now.modified:
            raise changed(what, f"last modified {_time(modified)} then, {_time(now.modified)} now")
    # A generation in digits and an ETag are two names of Google's, which cannot be compared.
    elif now.tag is not None and mark != now.tag and mark.isdigit() == now.tag.isdigit():
        raise changed(what, f'ETag "{mark[:_SHOWN]}" then, "{now.tag[:_SHOWN]}" now')


def changed_size(what: str, planned: int, now: int) -> ImageError:
    """The error for a file of another size."""
    return changed(what, f"{planned} bytes then, {now} now")


def changed(what: str, difference: str) -> ImageError:
    """The error for a file that is not what was planned."""
    return ImageError("fetch_failed", f"{what} changed since it was planned: {difference}".lstrip())


def _time(seconds: str) -> str:
    try:
        whole, _, fraction = seconds.partition(".")
        time = datetime.fromtimestamp(int(whole), timezone.utc)
    except (ValueError, OverflowError, OSError):
        return seconds
    return f"{time:%Y-%m-%d %H:%M:%S}{'.' if fraction else ''}{fraction} UTC"
