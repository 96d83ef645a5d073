"""What lies where in a run directory, and how its images divide into shards; for those who write it and who read it.

run.json                      the resolved job and its fingerprint; created once
manifest/00000.parquet        the frozen list of images, one row group per shard
additions/00001.json          images added later, or labelled again: more manifest parts; each created once
classes.parquet               the classes, for plain SQL; created once, and again where it is missing
text.parquet                  the encoded vocabulary
shards/00000000.parquet       one file per shard: the result and, by existing, the checkpoint
crashed/00000000-12.json      an image that killed its worker, so that it is not tried again
drivers/20260102T030405-0123abcd.json  what a driver does, written over every half a minute; the last one stays
summary.json                  written at the end
evaluation/voc21-0123456789ab/  counts against a ground truth, one file per shard; made later, and can be removed
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal

from ovss_ray.images.limits import AS_THE_RUN, Limits

FORMAT_VERSION = 1

RUN_FILE = "run.json"
SUMMARY_FILE = "summary.json"
TEXT_FILE = "text.parquet"
CLASSES_FILE = "classes.parquet"
MANIFEST_FOLDER = "manifest"
ADDITIONS_FOLDER = "additions"
SHARDS_FOLDER = "shards"
CRASHED_FOLDER = "crashed"
DRIVERS_FOLDER = "drivers"
EVALUATION_FOLDER = "evaluation"

AdditionKind = Literal["extend", "retry"]


def shard_name(shard: int) -> str:
    """Name of a shard's file inside the run directory."""
    return f"{SHARDS_FOLDER}/{shard:08d}.parquet"


def addition_name(number: int) -> str:
    """Name of the record of the n-th addition, counted from 1."""
    return f"{ADDITIONS_FOLDER}/{number:05d}.json"


@dataclass(frozen=True)
class Part:
    """One file of the manifest.

    Attributes:
        name: inside the run directory, such as "manifest/00000.parquet".
        rows: images listed in it.
        retry: its images are listed in an earlier part too, and are labelled once more.
        limits: how large its images may be.
        source: the input that its images were listed from; None is that of the run.
    """

    name: str
    rows: int
    retry: bool = False
    limits: Limits = AS_THE_RUN
    source: str | None = None


@dataclass(frozen=True)
class Manifest:
    """The list of a run's images as parts, and how they divide into shards: no shard spans two parts.

    Attributes:
        shard_size: images per shard; the last shard of a planning may hold fewer.
        digest: SHA-256 over order, URIs, sizes and etags of the images that the run was planned with.
        parts: in the order of their shards.
    """

    shard_size: int
    digest: str
    parts: tuple[Part, ...]

    @property
    def images(self) -> int:
        """Number of distinct images; their ids are 0 to images - 1."""
        return sum(part.rows for part in self.parts if not part.retry)

    @property
    def rows(self) -> int:
        """Number of images to label, those counted twice that are labelled again."""
        return sum(part.rows for part in self.parts)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return self._first_shards[-1]

    @property
    def retry_shards(self) -> list[range]:
        """The shards that label images again, oldest first."""
        return [self.shards_of(index) for index, part in enumerate(self.parts) if part.retry]

    def images_in(self, shard: int) -> int:
        """Number of images of a shard."""
        part, group = self.place_of(shard)
        return min(self.shard_size, self.parts[part].rows - group * self.shard_size)

    def place_of(self, shard: int) -> tuple[int, int]:
        """Index of a shard's part, and of its row group in that part."""
        part = bisect_right(self._first_shards, shard) - 1
        return part, shard - self._first_shards[part]

    def shards_of(self, part: int) -> range:
        """The shards of a part."""
        return range(self._first_shards[part], self._first_shards[part + 1])

    def is_retry(self, shard: int) -> bool:
        """Whether a shard labels images again."""
        part, _ = self.place_of(shard)
        return self.parts[part].retry

    def first_id(self, shard: int) -> int | None:
        """Id of the shard's first image, the others follow it; None for a shard that labels images again."""
        part, group = self.place_of(shard)
        return None if self.parts[part].retry else self._first_ids[part] + group * self.shard_size

    def home_of(self, image_id: int) -> tuple[int, int]:
        """The shard that an image was planned in, and its position there."""
        parts, firsts = self._planned
        part = parts[bisect_right(firsts, image_id) - 1]
        group, position = divmod(image_id - self._first_ids[part], self.shard_size)
        return self._first_shards[part] + group, position

    def source_of(self, image_id: int) -> str | None:
        """The input that an image was listed from; None is that of the run."""
        parts, firsts = self._planned
        return self.parts[parts[bisect_right(firsts, image_id) - 1]].source

    def with_parts(self, parts: Sequence[Part]) -> Manifest:
        """The same with more parts at its end."""
        return replace(self, parts=(*self.parts, *parts))

    @cached_property
    def _first_shards(self) -> list[int]:
        return [0, *accumulate(-(-part.rows // self.shard_size) for part in self.parts)]

    @cached_property
    def _first_ids(self) -> list[int]:
        return [0, *accumulate(0 if part.retry else part.rows for part in self.parts)]

    @cached_property
    def _planned(self) -> tuple[list[int], list[int]]:
        """The parts that list images for the first time, and the first id of each."""
        parts = [index for index, part in enumerate(self.parts) if not part.retry]
        return parts, [self._first_ids[index] for index in parts]

    def to_json(self) -> dict[str, Any]:
        """As stored in `run.json`."""
        return {
            "images": self.images,
            "shards": self.shards,
            "shard_size": self.shard_size,
            "digest": self.digest,
            "parts": [{"name": part.name, "rows": part.rows} for part in self.parts],
        }

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Manifest:
        """From `run.json`, without later additions.

        Raises:
            ValueError, KeyError, TypeError: it is not what `to_json` gave.
        """
        parts = tuple(Part(part["name"], part["rows"]) for part in stored["parts"])
        shard_size = stored["shard_size"]
        if not parts or not all(
            type(number) is int and number > 0 for number in (shard_size, *(p.rows for p in parts))
        ):
            raise ValueError("shard_size and the rows of the manifest's parts must be numbers above 0")
        planned = cls(shard_size, stored["digest"], parts)
        for name, number in (("images", planned.images), ("shards", planned.shards)):
            if stored.get(name, number) != number:
                raise ValueError(f"the manifest has {stored[name]} {name} by its record, and {number} by its parts")
        return planned
