"""Ground truth as the evaluation sees it: names of images, and a map of class ids for each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Protocol
from urllib.parse import urlsplit

from ovss_ray.evaluation.ground_truth.errors import MissingAnnotationError
from ovss_ray.evaluation.ground_truth.ids import IdTable, Values, digest
from ovss_ray.evaluation.ground_truth.shrinking import nearest, shrunk_size
from ovss_ray.images.members import split_member
from ovss_ray.labels.codecs import LabelMap
from ovss_ray.vocabulary import Vocabulary

READING_VERSION = 1
"""Changes whenever the same files give another truth; part of `GroundTruth.identity`."""


@dataclass(frozen=True, eq=False, repr=False)
class GroundTruth(ABC):
    """The annotated images of one split of a data set. Can be pickled: what it opens stays behind.

    Attributes:
        name: "voc21", or the name of the folder.
        vocabulary: the classes; its ids are what `read` gives.
        root: the place that was opened, a URI or an absolute path.
        expected_images: how many annotated images the published split has; None for a folder of one's own.
    """

    name: str
    vocabulary: Vocabulary
    root: str
    expected_images: int | None

    @property
    def ignore_index(self) -> int:
        """The value of pixels that do not count: 255, or 65535 with more than 255 classes."""
        return self.vocabulary.ignore_index

    @abstractmethod
    def names(self) -> tuple[str, ...]:
        """The annotated images that are there, sorted. Fewer than `expected_images` means that files are missing."""

    @abstractmethod
    def name_of(self, image_uri: str) -> str:
        """The name that belongs to an image of a run; need not be one of `names`."""

    @abstractmethod
    def read(self, name: str) -> LabelMap:
        """The truth of one image.

        Returns:
            [H, W] uint8, or uint16 with more than 255 classes: class ids and `ignore_index`, nothing else.

        Raises:
            MissingAnnotationError: there is none.
            UnknownIdsError: it has values that the data set does not define.
            DamagedAnnotationError: its file cannot be decoded.
            InputError: the store cannot be read at all.
        """

    def aligned(self, labels: LabelMap, truth: LabelMap) -> LabelMap:  # noqa: ARG002
        """The labels [H, W] of an image at the size of its truth, where the benchmark says how; else as they are.

        Only `ade847` does: its truth is shrunk, and the labels of the image at full size are shrunk alike (nearest).
        """
        return labels

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Everything that decides what `read` gives, ready for JSON; equal identities allow scores to be reused."""

    def __repr__(self) -> str:
        return f"GroundTruth({self.name!r}, {len(self.names())} images in {self.root!r})"


class AnnotationSource(Protocol):
    """Where the values of annotations come from, before they become class ids."""

    def names(self) -> tuple[str, ...]:
        """The images that are there, sorted."""

    def values(self, name: str) -> Values:
        """[H, W] integers, 0 or more, of one of `names`; raises `AnnotationError`."""

    def place(self, name: str) -> str:
        """The file of one of `names`, for messages."""

    def identity(self) -> dict[str, Any]:
        """How and where the values are found, ready for JSON."""


@dataclass(frozen=True, eq=False)
class Annotations:
    """What a data set has for one split.

    Attributes:
        source: gives the values in the files.
        ids: value -> class id or ignore index.
        otherwise: the id of all other values, where the data set defines one.
        listed: the images of the split by its list, where there is one.
    """

    source: AnnotationSource
    ids: Mapping[int, int]
    otherwise: int | None = None
    listed: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False, repr=False)
class MappedTruth(GroundTruth):
    """Ground truth that is read from a source and mapped to class ids by a table.

    Attributes:
        source: gives the values in the files.
        table: says what they mean.
        split: "val" ...; "" for a folder.
        listed: the images of the split by its list, where there is one; more than `names` if files are missing.
        image_suffix: what the names of images have behind the name in `names`, such as "_leftImg8bit".
        show: how a value of a file is written in messages.
        short_side: longer short sides of the labels are shrunk to this many pixels, see `aligned`.
    """

    source: AnnotationSource
    table: IdTable
    split: str = ""
    listed: frozenset[str] = frozenset()
    image_suffix: str = ""
    show: Callable[[int], str] = field(default=str)
    short_side: int | None = None

    def names(self) -> tuple[str, ...]:
        return self.source.names()

    def name_of(self, image_uri: str) -> str:
        parts = _inner_path(image_uri).split("/")
        parts[-1] = parts[-1].rpartition(".")[0] or parts[-1]
        parts[-1] = parts[-1].removesuffix(self.image_suffix)
        # Names may hold folders: the longest end of the path that is one of them.
        for depth in range(min(self._depth, len(parts)), 1, -1):
            name = "/".join(parts[-depth:])
            if name in self._names:
                return name
        return parts[-1]

    def read(self, name: str) -> LabelMap:
        if name not in self._names:
            raise MissingAnnotationError(self._why_missing(name))
        return self.table.apply(self.source.values(name), self.source.place(name), self.show)

    def aligned(self, labels: LabelMap, truth: LabelMap) -> LabelMap:
        height, width = labels.shape
        if self.short_side is None or labels.shape == truth.shape:
            return labels
        fits = shrunk_size(height, width, self.short_side) == truth.shape
        return nearest(labels, *truth.shape) if fits else labels

    def identity(self) -> dict[str, Any]:
        return {
            "ground_truth": self.name,
            "root": self.root,
            "split": self.split,
            "classes": digest(self.vocabulary.names),
            "ids": self.table.digest(),
            "source": self.source.identity(),
            "reading_version": READING_VERSION,
        }

    def _why_missing(self, name: str) -> str:
        if name in self.listed:
            return f"the annotation of {name} is missing, although the list of the split '{self.split}' has it"
        split = f"the split '{self.split}' of {self.name}" if self.split else self.name
        return f"{name} is not in {split}"

    @cached_property
    def _names(self) -> frozenset[str]:
        return frozenset(self.names())

    @cached_property
    def _depth(self) -> int:
        return max((name.count("/") + 1 for name in self._names), default=1)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_names", "_depth")}


def _inner_path(uri: str) -> str:
    member = split_member(uri)
    if member is not None:
        return member.name if member.kind == "tar" else uri.partition("::")[0]
    return urlsplit(uri).path if uri.startswith(("http://", "https://")) else uri.replace("\\", "/")
