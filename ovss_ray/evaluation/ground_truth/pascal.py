"""PASCAL VOC 2012 and PASCAL Context."""

from __future__ import annotations

import json
import re
import zlib
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import numpy as np

from ovss_ray.errors import InputError
from ovss_ray.evaluation.ground_truth.errors import DamagedAnnotationError
from ovss_ray.evaluation.ground_truth.ids import Values, digest
from ovss_ray.evaluation.ground_truth.pixels import MAX_PIXELS, Decoder, read_indices, read_mat
from ovss_ray.evaluation.ground_truth.place import AnnotationFiles, DataRoot, Found, Layout
from ovss_ray.evaluation.ground_truth.rle import decode_mask
from ovss_ray.evaluation.ground_truth.truth import Annotations
from ovss_ray.vocabularies.source_ids import load_source_ids

_PNG = r"(?P<name>[^/]+)\.png"
_VOC = Layout("VOCdevkit/VOC2012/SegmentationClass", _PNG, "<id>.png")
_CONTEXT_PNG = Layout("VOCdevkit/VOC2010/SegmentationClassContext", _PNG, "<id>.png")
_CONTEXT_JSON = Layout("VOCdevkit/VOC2010", r"(?P<name>trainval_merged)\.json", "trainval_merged.json", bare=True)
_CONTEXT_MAT = Layout("VOCdevkit/VOC2010/trainval", r"(?P<name>[^/]+)\.mat", "<id>.mat", bare=True)
_TIFF = r"(?P<name>[^/]+)\.tiff?"
_CONTEXT_TIFFS = (
    Layout("VOCdevkit/VOC2010/annotations_detectron2/pc459_val", _TIFF, "<id>.tif", bare=True),
    Layout("pascal_ctx_d2/annotations_ctx459/validation", _TIFF, "<id>.tif", bare=True),
)


def open_voc(root: DataRoot, benchmark: str, split: str) -> Annotations:
    """VOC 2012 with (`voc21`) or without (`voc20`) background."""
    found = root.find([_VOC], f"ground truth of {benchmark}")
    listed = voc_list(root, split)
    ignored = {255: 255} if benchmark == "voc21" else {0: 255, 255: 255}
    return _listed(root, found, read_indices, load_source_ids(benchmark) | ignored, listed)


def voc_list(root: DataRoot, split: str) -> frozenset[str]:
    """The ids of a split of the segmentation challenge."""
    return _read_list(root, "VOCdevkit/VOC2012/ImageSets/Segmentation", split)


def open_context(root: DataRoot, benchmark: str, split: str) -> Annotations:
    """PASCAL Context with (`context60`) or without (`context59`) background, from PNGs or from the JSON file."""
    found = root.find([_CONTEXT_PNG, _CONTEXT_JSON], f"ground truth of {benchmark}")
    listed = context_list(root, split)
    if found.layout is _CONTEXT_JSON:
        source = read_merged(root, found.files["trainval_merged"], listed)
        return Annotations(source, {0: 255} | load_source_ids(benchmark), listed=listed)
    # The PNGs number the 60 classes from 0 on, background first.
    ids = dict(enumerate(range(60))) if benchmark == "context60" else dict(enumerate([255, *range(59)]))
    return _listed(root, found, read_indices, ids | {255: 255}, listed)


def open_context459(root: DataRoot, benchmark: str, split: str) -> Annotations:
    """PASCAL Context with all 459 classes, from the MATLAB files or from 16-bit TIFFs."""
    found = root.find([_CONTEXT_MAT, *_CONTEXT_TIFFS], f"ground truth of {benchmark}")
    listed = context_list(root, split)
    if found.layout is _CONTEXT_MAT:
        return _listed(root, found, read_mat, {0: 65535} | load_source_ids(benchmark), listed)
    return _listed(root, found, read_indices, dict(enumerate(range(459))) | {65535: 65535}, listed)


def _listed(
    root: DataRoot, found: Found, decode: Decoder, ids: Mapping[int, int], listed: frozenset[str]
) -> Annotations:
    files = {name: file for name, file in found.files.items() if name in listed}
    return Annotations(AnnotationFiles(root, files, decode), ids, listed=listed)


def context_list(root: DataRoot, split: str) -> frozenset[str]:
    """The ids of a split of PASCAL Context."""
    if split != "val":
        return _read_list(root, "VOCdevkit/VOC2010/ImageSets/SegmentationContext", split)
    text = (resources.files(__package__) / "context_val.txt").read_text("utf-8")  # which no archive holds
    return frozenset(text.split())


def _read_list(root: DataRoot, folder: str, split: str) -> frozenset[str]:
    """The ids in a list of the devkit."""
    layout = Layout(folder, rf"(?P<name>{re.escape(split)})\.txt", f"{split}.txt")
    file = root.find([layout], f"list of the split '{split}'").files[split]
    try:
        text = root.read(file).decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{root.place(file)} is no list of image ids: it is not UTF-8 text") from None
    return frozenset(line.split()[0] for line in text.splitlines() if line.strip())


@dataclass(frozen=True, eq=False)
class MergedContext:
    """The annotations of `trainval_merged.json` ("PASCAL in Detail"): run-length encoded masks, painted in file order.

    Attributes:
        file: its place, for messages.
        images: name -> zlib-compressed JSON [height, width, [[category id, mask], ...]],
            small enough to travel to other processes.
        contents: digest of all of it.
    """

    file: str
    images: Mapping[str, bytes]
    contents: str

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.images))

    def values(self, name: str) -> Values:
        height, width, masks = json.loads(zlib.decompress(self.images[name]))
        where = self.place(name)
        if not (isinstance(height, int) and isinstance(width, int) and 0 < height * width <= MAX_PIXELS and height > 0):
            raise DamagedAnnotationError(f"{where}: {width} x {height} is no size of an image")
        values = np.zeros((height, width), np.uint16)
        for category, segmentation in masks:
            mask = decode_mask(segmentation, where)
            if mask.shape != values.shape or not isinstance(category, int) or not 0 <= category <= 65535:
                raise DamagedAnnotationError(f"{where}: a mask is of another size than the image, or of no category")
            values[mask] = category
        return values

    def place(self, name: str) -> str:
        return f"image {name} of {self.file}"

    def identity(self) -> dict[str, Any]:
        return {"file": "trainval_merged.json", "contents": self.contents}


def read_merged(root: DataRoot, file: str, listed: frozenset[str]) -> MergedContext:
    """Take the listed images out of the JSON file; raises `InputError` if it is another file."""
    place = root.place(file)
    try:
        merged = json.loads(root.read(file))
        images = {image["image_id"]: image for image in merged["images"]}
        masks = defaultdict(list)
        for mask in merged["annos_segmentation"]:
            masks[mask["image_id"]].append([mask["category_id"], mask["segmentation"]])
        texts = {
            name: json.dumps([image["height"], image["width"], masks[key]])
            for key, image in images.items()
            if (name := image["file_name"].rpartition(".")[0]) in listed
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{place} is not the annotation file of PASCAL in Detail, or is cut off: {error!r}; download it again"
        ) from error
    packed = {name: zlib.compress(text.encode(), 1) for name, text in texts.items()}
    return MergedContext(place, packed, digest(sorted(texts.items())))
