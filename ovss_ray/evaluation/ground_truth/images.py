"""The images of a benchmark's split, where its archives lay them: of VOC 1449 of the 17,125 in the folder."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

from ovss_ray.errors import InputError
from ovss_ray.evaluation.ground_truth.benchmarks import published_images
from ovss_ray.evaluation.ground_truth.pascal import context_list, voc_list
from ovss_ray.evaluation.ground_truth.place import DataRoot, Layout
from ovss_ray.images.listing import list_images
from ovss_ray.images.references import ImageRef
from ovss_ray.images.splits import BenchmarkSplit
from ovss_ray.images.stores import StorageOptions

log = logging.getLogger(__name__)

_FOLDERS = {"train": "training", "val": "validation"}


@dataclass(frozen=True)
class _Images:
    layouts: Callable[[str], tuple[Layout, ...]]
    names: Callable[[DataRoot, str], frozenset[str]] | None = None  # None: all that the folder of the split holds


def _voc(_: str) -> tuple[Layout, ...]:
    return (Layout("VOCdevkit/VOC2012/JPEGImages", r"(?P<name>[^/]+)\.jpg", "<id>.jpg"),)


def _context(split: str) -> tuple[Layout, ...]:
    pattern = r"(?P<name>[^/]+)\.jpg"
    return (
        Layout("VOCdevkit/VOC2010/JPEGImages", pattern, "<id>.jpg"),
        Layout(f"pascal_ctx_d2/images/{_FOLDERS[split]}", pattern, "<id>.jpg"),
    )


def _coco(split: str) -> tuple[Layout, ...]:
    return (Layout(f"coco_stuff164k/images/{split}2017", r"(?P<name>\d{12})\.jpg", "<12 digits>.jpg"),)


def _cityscapes(split: str) -> tuple[Layout, ...]:
    pattern = r"[^/]+/(?P<name>[^/.][^/]*)_leftImg8bit\.png"
    return (Layout(f"cityscapes/leftImg8bit/{split}", pattern, "<city>/<name>_leftImg8bit.png", deep=True),)


def _ade20k(split: str) -> tuple[Layout, ...]:
    folder = f"ade/ADEChallengeData2016/images/{_FOLDERS[split]}"
    return (Layout(folder, rf"(?P<name>ADE_{split}_\d+)\.jpg", f"ADE_{split}_<8 digits>.jpg"),)


def _ade847(split: str) -> tuple[Layout, ...]:
    """Shrunk images are those of the published numbers."""
    shown = f"ADE_{split}_<8 digits>.jpg"
    shrunk = f"ADE20K_2021_17_01/images_detectron2/{_FOLDERS[split]}"
    full = f"ADE20K_2021_17_01/images/ADE/{_FOLDERS[split]}"
    return (
        Layout(shrunk, rf"(?P<name>ADE_{split}_[^/]+)\.jpg", shown),
        Layout(full, rf"(?:.*/)?(?P<name>ADE_{split}_[^/]+)\.jpg", f"<scene>/{shown}", deep=True),
    )


_IMAGES = {
    "voc21": _Images(_voc, voc_list),
    "voc20": _Images(_voc, voc_list),
    "context60": _Images(_context, context_list),
    "context59": _Images(_context, context_list),
    "context459": _Images(_context, context_list),
    "coco_object": _Images(_coco),
    "coco_stuff": _Images(_coco),
    "cityscapes": _Images(_cityscapes),
    "ade20k": _Images(_ade20k),
    "ade847": _Images(_ade847),
}


def list_split(
    split: BenchmarkSplit,
    *,
    limit: int | None = None,
    sample: float | None = None,
    storage_options: StorageOptions | None = None,
    **listing: Any,
) -> Iterator[ImageRef]:
    """List the images of a split, in the order of their folder.

    If some are not there, a warning says how many are; the evaluation names those that lack.

    Args:
        split: the benchmark, the split, and the root of the data set as for `open_ground_truth`; annotations need not
            be there.
        limit: stop after this many images.
        sample: as for `list_images`: contained in a sample of the whole folder.
        storage_options: see `open_store`.
        listing: other arguments of `list_images`.

    Raises:
        SettingError: there is no such benchmark or split.
        InputError: the store cannot be read, or no image is there; says what was looked for and what is there.
    """
    expected = published_images(split.benchmark, split.split)
    root = DataRoot.of(split.root, storage_options)
    known = _IMAGES[split.benchmark]
    found = root.find(known.layouts(split.split), f"images of {split.benchmark}")
    listed = None if known.names is None else known.names(root, split.split)
    files = [file for name, file in found.files.items() if listed is None or name in listed]
    folder = root.place(found.folder)
    if not files:
        raise InputError(f"none of the {len(found.files):,} images in {folder} is of the split '{split.split}'")
    if expected is not None and len(files) != expected:
        log.warning("%s has %s images of the split '%s' of %s, published are %s", folder, f"{len(files):,}",
                    split.split, split.benchmark, f"{expected:,}")  # fmt: skip
    basenames = {_basename(file) for file in files}
    everything = list_images(folder, sample=sample, storage_options=storage_options, **listing)
    images = (image for image in everything if _basename(image.uri) in basenames)
    first = next(images, None)
    if first is None:
        raise InputError(
            f"none of the {len(files):,} images of the split in {folder} is left by sample and extensions; widen them"
        )
    return islice(chain([first], images), limit)


def _basename(place: str) -> str:
    return place.rpartition("/")[2]
