"""Finding the files of a data set below a folder or a bucket, in the layouts that people have."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

import fsspec

from ovss_ray.errors import ImageError, InputError
from ovss_ray.evaluation.ground_truth.errors import DamagedAnnotationError, MissingAnnotationError
from ovss_ray.evaluation.ground_truth.ids import Values, digest
from ovss_ray.evaluation.ground_truth.pixels import Decoder
from ovss_ray.images.explaining import listing, nearest_name
from ovss_ray.images.fetching import Fetcher
from ovss_ray.images.stores import StorageOptions, is_local, open_store
from ovss_ray.images.walking import walk_local

_SHOWN_ENTRIES = 12


@dataclass(frozen=True)
class Layout:
    """One way in which a data set lies on a disk.

    Attributes:
        folder: of the annotations; the root of the data set may be any of the folders above it.
        pattern: regular expression of the paths of the annotations below `folder`, with a group "name".
        shown: what the files are called, for messages.
        deep: look into the folders below `folder` too.
        bare: the root may also be `folder` itself.
    """

    folder: str
    pattern: str
    shown: str
    deep: bool = False
    bare: bool = False

    def folders(self) -> tuple[str, ...]:
        """What `folder` may be called from the root, the whole of it first."""
        parts = self.folder.split("/")
        return tuple("/".join(parts[start:]) for start in range(len(parts) + self.bare))

    def __str__(self) -> str:
        parts = self.folder.split("/")
        optional = len(parts) - 1 + self.bare
        return "".join(f"[{part}/]" if rank < optional else f"{part}/" for rank, part in enumerate(parts)) + self.shown


@dataclass(frozen=True)
class Found:
    """The annotations of a layout: their folder, and name -> file, both relative to the root."""

    layout: Layout
    folder: str
    files: Mapping[str, str]


@dataclass(frozen=True, eq=False)
class DataRoot:
    """The folder or bucket of a data set. Its store is opened when needed, once per process.

    Attributes:
        uri: a URI without a slash at the end, or an absolute path.
        storage_options: see `open_store`.
    """

    uri: str
    storage_options: StorageOptions = field(default_factory=dict)

    @classmethod
    def of(cls, root: str, storage_options: StorageOptions | None) -> DataRoot:
        """The root as a user names it; raises `InputError` if it cannot be opened, or there is nothing."""
        fs, path = open_store(root, storage_options)
        fs.invalidate_cache()  # what was listed in this process before may have changed
        with listing(root):
            there = fs.isdir(path)
        if not there:
            hint = nearest_name(path) if is_local(root) and not os.path.lexists(path) else ""
            raise InputError(f"there is no folder {root}{hint}; give the one that holds the ground truth")
        uri = path.rstrip("/") or "/" if is_local(root) else root.rstrip("/")
        return cls(uri, storage_options or {})

    def find(self, layouts: Sequence[Layout], what: str) -> Found:
        """The first of the layouts that has files here.

        Raises:
            InputError: none has; says what was looked for and what is there.
        """
        found = self._first_with_files(layouts)
        if found is None:
            looked_for = ", or ".join(map(str, layouts))
            raise InputError(f"no {what} in {self.uri}: looked for {looked_for}; there is {self.shown_entries()}")
        return found

    def _first_with_files(self, layouts: Sequence[Layout]) -> Found | None:
        paths = cache(lambda folder, deep: list(self.paths(folder, deep)))
        for layout in layouts:
            pattern = re.compile(layout.pattern)
            for folder in layout.folders():
                matches = ((pattern.fullmatch(path), path) for path in paths(folder, layout.deep))
                files = {match["name"]: f"{folder}/{path}".lstrip("/") for match, path in matches if match}
                if files:
                    return Found(layout, folder, files)
        return None

    def paths(self, folder: str, deep: bool) -> Iterator[str]:
        """The files below a folder, relative to it; nothing if there is no such folder."""
        path = f"{self._path}/{folder}".rstrip("/")
        with listing(f"{self.uri}/{folder}"):
            if not self._fs.isdir(path):
                return
            if is_local(self.uri):
                for file in walk_local(path, lambda _: deep):
                    yield file.relative
                return
            names = self._fs.find(path) if deep else self._fs.ls(path, detail=False)
            yield from (name[len(path) :].strip("/") for name in names)

    def read(self, relative: str) -> bytes:
        """The bytes of a file.

        Raises:
            MissingAnnotationError: there is none.
            DamagedAnnotationError: it is far too large.
            InputError: the store fails or denies access: nothing that is wrong with this file.
        """
        try:
            return self._fetcher.fetch(self.place(relative))
        except ImageError as error:
            if error.status == "not_found":
                raise MissingAnnotationError(f"there is no {self.place(relative)}") from error
            if error.status == "too_large":
                raise DamagedAnnotationError(f"{self.place(relative)} is no annotation: {error.reason}") from error
            advice = "check the credentials" if error.status == "forbidden" else "try again later"
            raise InputError(f"{self.place(relative)} cannot be read: {error.reason}; {advice}") from error

    def place(self, relative: str) -> str:
        """The URI or path of a file."""
        return f"{self.uri.rstrip('/')}/{relative}"

    def shown_entries(self) -> str:
        """The first files and folders right in the root, for messages."""
        with listing(self.uri):
            entries = self._fs.ls(self._path, detail=True)
        names = sorted(
            entry["name"].rstrip("/").rpartition("/")[2] + ("/" if entry["type"] == "directory" else "")
            for entry in entries
        )
        more = f" and {len(names) - _SHOWN_ENTRIES} more" if len(names) > _SHOWN_ENTRIES else ""
        return ", ".join(names[:_SHOWN_ENTRIES]) + more if names else "nothing"

    @cached_property
    def _opened(self) -> tuple[fsspec.AbstractFileSystem, str]:
        return open_store(self.uri, self.storage_options)

    @property
    def _fs(self) -> fsspec.AbstractFileSystem:
        return self._opened[0]

    @property
    def _path(self) -> str:
        return self._opened[1]

    @cached_property
    def _fetcher(self) -> Fetcher:
        return Fetcher(self.storage_options)

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri, "storage_options": self.storage_options}


@dataclass(frozen=True, eq=False)
class AnnotationFiles:
    """One file per image.

    Attributes:
        root: of the data set.
        files: name -> file, relative to the root.
        decode: bytes and place of a file -> the values in it.
    """

    root: DataRoot
    files: Mapping[str, str]
    decode: Decoder

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.files))

    def values(self, name: str) -> Values:
        return self.decode(self.root.read(self.files[name]), self.place(name))

    def place(self, name: str) -> str:
        return self.root.place(self.files[name])

    def identity(self) -> dict[str, Any]:
        return {"decoder": self.decode.__name__, "files": digest(sorted(self.files.items()))}
