"""What a listing says about an image, and what it is asked for."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass

from ovss_ray.errors import SettingError
from ovss_ray.naming import setting_name


@dataclass(frozen=True)
class ImageRef:
    """One image of a run: where it is, and what the listing says about it for nothing.

    Attributes:
        uri: a URI, or an absolute path for a local file; "" for a row of a list that names no image. An image inside
            a file has a chained address, see `members.py`.
        size_bytes: its size where the store's listing gives it (object stores), else None.
        etag: the store's own mark of its content, where the listing gives it, see `Version.mark`; of an image inside a
            file, the mark of that file.
        offset: position inside the file that holds the image among others (byte of a tar, row of a Parquet file); None
            if the image is a file of its own.
        extra: what a list says about the image beside its place, as a JSON object; None if nothing is kept.
        header_bytes: of a member of a tar, the length of its headers, which lie right before it; else None.
    """

    uri: str
    size_bytes: int | None = None
    etag: str | None = None
    offset: int | None = None
    extra: str | None = None
    header_bytes: int | None = None


@dataclass(frozen=True)
class Wanted:
    """What of a source counts as an image, and what is kept of lists.

    Attributes:
        extensions: of files in folders and tars, in lower case, without the dot.
        uri_column: the column of a list that holds the URIs; None looks for the usual names.
        image_column: the column of a Parquet file that holds the bytes of images; None looks for it.
        keep_columns: columns that go into `ImageRef.extra`.
    """

    extensions: frozenset[str]
    uri_column: str | None = None
    image_column: str | None = None
    keep_columns: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, extensions: Iterable[str], uri_column: str | None, image_column: str | None, keep_columns: Iterable[str]
    ) -> Wanted:
        """From what a user gives: extensions in any case of letters, with or without a dot.

        Raises:
            SettingError: both columns are named.
        """
        if uri_column is not None and image_column is not None:
            raise SettingError(
                f"{setting_name('uri_column')} and {setting_name('image_column')} exclude each other: "
                "addresses, or the bytes themselves"
            )
        kinds = frozenset(name.lower().lstrip(".") for name in extensions)
        return cls(kinds, uri_column, image_column, tuple(keep_columns))

    def is_image(self, name: str) -> bool:
        """Whether a file counts as an image, by its name."""
        return extension_of(name) in self.extensions


def extension_of(name: str) -> str:
    """The extension of a file name in lower case, without the dot."""
    return posixpath.splitext(name)[1].lower().lstrip(".")
