"""Additions to a run's manifest as records: `RUN/additions/00001.json`, each created once and never changed."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import fsspec
from pydantic import BaseModel, ConfigDict, ValidationError

from ovss_ray.errors import DamagedRunError, OvssError
from ovss_ray.images.backoff import try_often
from ovss_ray.images.limits import Limits
from ovss_ray.images.stores import explained, is_final
from ovss_ray.labels.layout import ADDITIONS_FOLDER, FORMAT_VERSION, AdditionKind, Manifest, Part, addition_name

_READS_AT_ONCE = 8
_READ_ATTEMPTS = 5
_RECORD_NAME = re.compile(r"(\d{5,})\.json")


T = TypeVar("T")


class Addition(BaseModel):
    """One record: the parts that it adds to the manifest, and where their images come from.

    Attributes:
        kind: "extend" adds images, "retry" labels images of the run again.
        created_at: ISO 8601, UTC.
        settings: of the listing for "extend" (`input`, `extensions`, `sample` ...), the statuses for "retry".
        images: number of images in the parts.
        digest: SHA-256 over the images, as that of the run's own manifest.
        parts: the files of the manifest, in the order of their shards.
        max_pixels, max_bytes: the limits that its images are labelled under; None is the run's own.
    """

    model_config = ConfigDict(frozen=True)

    format_version: int = FORMAT_VERSION
    kind: AdditionKind
    created_at: str
    package_version: str
    settings: dict[str, Any]
    images: int
    digest: str
    parts: tuple[Part, ...]
    max_pixels: int | None = None
    max_bytes: int | None = None

    @property
    def limits(self) -> Limits:
        """How large its images may be."""
        return Limits(self.max_pixels, self.max_bytes)


def read_additions(
    fs: fsspec.AbstractFileSystem, root: str, uri: str, *, sleep: Callable[[float], None] = time.sleep
) -> list[Addition]:
    """The additions of a run in their order: one listing, and one read of each.

    Args:
        fs: where the run lies.
        root: the run directory on `fs`.
        uri: the run directory as users write it, for messages.
        sleep: how to wait before a request is made again.

    Raises:
        DamagedRunError: a record is missing or damaged; the shards after it would be misread.
        OvssError: the store cannot be read, or one is of a newer version.
    """
    folder = f"{root}/{ADDITIONS_FOLDER}"
    fs.invalidate_cache(folder)
    try:
        with explained(f"{uri}/{ADDITIONS_FOLDER}"):
            listed = _reading(lambda: fs.ls(folder, detail=False), sleep)
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = {path.rsplit("/", 1)[-1]: path for path in listed}
    numbers = sorted(int(match[1]) for match in map(_RECORD_NAME.fullmatch, found) if match)
    for expected, number in enumerate(numbers, 1):
        if number != expected:
            raise DamagedRunError(
                f"{uri}/{addition_name(expected)} is missing; restore it, the shards after it depend on it"
            )
    paths = [f"{root}/{addition_name(number)}" for number in numbers]
    with explained(f"{uri}/{ADDITIONS_FOLDER}"), ThreadPoolExecutor(_READS_AT_ONCE) as threads:
        stored = threads.map(lambda path: _reading(lambda: fs.cat_file(path), sleep), paths)
        return [_parse(content, f"{uri}/{addition_name(number)}") for number, content in enumerate(stored, 1)]


def _reading(operation: Callable[[], T], sleep: Callable[[float], None]) -> T:
    return try_often(operation, attempts=_READ_ATTEMPTS, is_final=is_final, sleep=sleep)


def grown(planned: Manifest, additions: Sequence[Addition]) -> Manifest:
    """The manifest that a run was planned with, and the parts that came later."""
    return planned.with_parts([part for addition in additions for part in parts_of(addition)])


def parts_of(addition: Addition) -> list[Part]:
    """Its parts, with what its record says about all of them."""
    retry = addition.kind == "retry"
    source = None if retry else addition.settings.get("input")
    return [Part(part.name, part.rows, retry, addition.limits, source) for part in addition.parts]


def _parse(content: bytes, where: str) -> Addition:
    try:
        addition = Addition.model_validate_json(content)
    except ValidationError as error:
        raise DamagedRunError(f"{where} is damaged ({error.errors()[0]['msg']}); restore it to read the run") from None
    if addition.format_version > FORMAT_VERSION:
        raise OvssError(
            f"{where} has format {addition.format_version} and this ovss-ray reads {FORMAT_VERSION}; upgrade ovss-ray"
        )
    return addition
