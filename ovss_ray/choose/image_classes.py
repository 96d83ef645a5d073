"""Image-level classes that somebody knows: a file with the names of images and of the classes that are in them."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ovss_ray.errors import InputError, SettingError, nearest
from ovss_ray.images.list_files import URI_COLUMNS
from ovss_ray.images.members import split_member
from ovss_ray.images.stores import StorageOptions, explained, open_store
from ovss_ray.images.tables import Table, list_format, open_parquet, open_text_table
from ovss_ray.vocabulary import Vocabulary

CLASS_COLUMNS = ("classes", "class", "labels", "label")
_NAME_COLUMNS = (*URI_COLUMNS, "name")


@dataclass(frozen=True)
class ImageClasses:
    """The classes of images, by what the file calls each image.

    Attributes:
        source: the file, for messages.
        classes: class ids in ascending order, without the background.
    """

    source: str
    classes: Mapping[str, tuple[int, ...]]

    def name_of(self, uri: str) -> str | None:
        """What the file calls an image: its URI, else the longest end of its path ("b/c.jpg", "c.jpg"), else its stem
        ("c"); None if it does not know the image."""
        member = split_member(uri)
        path = uri if member is None else member.name
        ends = [path[match.end() :] for match in re.finditer("/", path)]
        last = ends[-1] if ends else path
        names = (uri, path, *ends, last.rpartition(".")[0])
        return next((name for name in names if name in self.classes), None)

    def check_unambiguous(self, uris: Iterable[str]) -> None:
        """Raises `SettingError` if one name of the file would stand for several of these images."""
        meant: dict[str, str] = {}
        for uri in uris:
            name = self.name_of(uri)
            if name is not None and meant.setdefault(name, uri) != uri:
                raise SettingError(
                    f"{self.source}: '{name}' is the name of {meant[name]} and of {uri}; "
                    "write enough of the path to tell them apart"
                )

    @property
    def digest(self) -> str:
        """SHA-256 of what the file says."""
        text = repr(sorted(self.classes.items()))
        return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def read_image_classes(
    path: str, vocabulary: Vocabulary, storage_options: StorageOptions | None = None
) -> ImageClasses:
    """Read a .csv, .tsv, .jsonl or .parquet file, compressed or not, local or in a store; it is held in memory.

    One column names images (uri, url, path, image, file_name or name), one their classes (classes, class, labels or
    label): a list, or text with one class or several, separated by semicolons, or by commas where there are none.
    Several rows of one image add up. The background class may be there and is left out.

    Raises:
        SettingError: a class that the vocabulary has not, or no such columns.
        InputError: the file cannot be read, or has no row.
    """
    ids = {item.name: item.id for item in vocabulary.classes}
    found: dict[str, set[int]] = defaultdict(set)
    with _open_table(path, storage_options) as table:
        columns = [
            _column(table, names, what, path) for names, what in ((_NAME_COLUMNS, "images"), (CLASS_COLUMNS, "classes"))
        ]
        for name, value in table.rows(columns):
            if name is not None and str(name).strip():
                found[str(name).strip()].update(_ids(value, ids, f"{path}: image '{name}'"))
    if not found:
        raise InputError(f"{path} names no image; write rows with an image and its classes")
    ground = {vocabulary.background}
    return ImageClasses(path, {name: tuple(sorted(classes - ground)) for name, classes in found.items()})


@contextmanager
def _open_table(path: str, storage_options: StorageOptions | None) -> Iterator[Table]:
    kind = list_format(path)
    if kind is None or kind == ".txt":
        raise SettingError(f"{path} is no file of image classes; give a .csv, .tsv, .jsonl or .parquet file")
    fs, inner = open_store(path, storage_options)
    try:
        with explained(path):
            if kind == ".parquet":
                with open_parquet(fs, inner, path) as table:
                    yield table
            else:
                with open_text_table(fs, inner, path, kind=kind) as table:
                    yield table
    except OSError as error:
        raise InputError(f"the file of image classes {path} cannot be read: {error.strerror or error}") from error


def _column(table: Table, names: Sequence[str], what: str, path: str) -> str:
    by_lower_case = {column.strip().lower(): column for column in reversed(table.columns)}
    for name in names:
        if name in by_lower_case:
            return by_lower_case[name]
    there = ", ".join(table.columns) or "none"
    raise SettingError(f"{path} has no column of {what}: call it one of {', '.join(names)}; its columns are {there}")


def _ids(value: Any, ids: Mapping[str, int], where: str) -> list[int]:
    if value is None:
        return []
    names = [str(name).strip() for name in value] if isinstance(value, list | tuple) else _split(str(value), ids)
    unknown = next((name for name in names if name and name not in ids), None)
    if unknown is not None:
        raise SettingError(f"{where} has the class '{unknown}', which --classes does not name{nearest(unknown, ids)}")
    return [ids[name] for name in names if name]


def _split(text: str, ids: Mapping[str, int]) -> list[str]:
    if text.strip() in ids:  # names of classes may hold commas
        return [text.strip()]
    return [name.strip() for name in text.split(";" if ";" in text else ",")]
