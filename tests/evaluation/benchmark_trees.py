"""The benchmarks as their archives lay them out, pictures included, two images of a split and what is no part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tests.evaluation.label_files import (
    Labels,
    object_class_image,
    save_grey,
    save_indexed,
    save_lines,
    save_mat,
    save_rgb,
)

HEIGHT, WIDTH = 40, 52

Save = Callable[[Path, Labels], None]


@dataclass(frozen=True)
class Tree:
    """Where the two images of a split lie, and what the values in their annotations mean.

    Attributes:
        image, label: places with {} for the name.
        names: of the two images.
        ids: value -> class id, or None where the pixel does not count.
        others: further files with a picture, which are not of the split.
        lists: further text files.
        save: writes the values of an annotation.
    """

    image: str
    label: str
    names: tuple[str, str]
    ids: Mapping[int, int | None]
    others: tuple[str, ...] = ()
    lists: Mapping[str, tuple[str, ...]] | None = None
    save: Save = save_grey

    def write(self, root: Path, rng: np.random.Generator) -> dict[str, Labels]:
        """Returns the values of each annotation."""
        values = {}
        for place in [self.image.format(name) for name in self.names] + list(self.others):
            save_photo(root / place, rng)
        for name in self.names:
            coarse = rng.choice(list(self.ids), (4, 4)).astype(np.uint16 if max(self.ids) > 255 else np.uint8)
            values[name] = coarse.repeat(HEIGHT // 4, 0).repeat(WIDTH // 4, 1)
            self.save(root / self.label.format(name), values[name])
        for place, lines in (self.lists or {}).items():
            save_lines(root / place, list(lines))
        return values

    def truth(self, values: Labels) -> Labels:
        """Class ids, -1 where pixels do not count."""
        known = {value: -1 if class_id is None else class_id for value, class_id in self.ids.items()}
        return np.array([[known[int(value)] for value in row] for row in values])


def save_photo(path: Path, rng: np.random.Generator) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    coarse = Image.fromarray(rng.integers(0, 255, (5, 6, 3), dtype=np.uint8))
    coarse.resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC).save(path)


def save_object_classes(path: Path, values: Labels) -> None:
    save_rgb(path, object_class_image(values, np.random.default_rng(0)))


_VOC12, _VOC10 = "VOCdevkit/VOC2012", "VOCdevkit/VOC2010"
_VOC_NAMES, _CONTEXT_NAMES = ("2007_000033", "2007_000042"), ("2008_000002", "2008_000003")
_COCO_NAMES = ("000000000139", "000000000285")
_COCO_OTHERS = ("train2017/000000000009.jpg", "val2017/readme.png")
_VOC_LISTS = {
    f"{_VOC12}/ImageSets/Segmentation/val.txt": _VOC_NAMES,
    f"{_VOC12}/ImageSets/Segmentation/train.txt": ("2007_000032",),
}
_VOC_OTHERS = (f"{_VOC12}/JPEGImages/2007_000032.jpg", f"{_VOC12}/JPEGImages/2012_004331.jpg")
_ADE_NAMES = ("ADE_val_00000001", "ADE_val_00000002")


def _voc(ids: Mapping[int, int | None]) -> Tree:
    return Tree(f"{_VOC12}/JPEGImages/{{}}.jpg", f"{_VOC12}/SegmentationClass/{{}}.png", _VOC_NAMES, ids, _VOC_OTHERS,
                _VOC_LISTS, save_indexed)  # fmt: skip


def _context(label: str, ids: Mapping[int, int | None], save: Save = save_grey) -> Tree:
    others = (f"{_VOC10}/JPEGImages/2008_000008.jpg",)
    return Tree(f"{_VOC10}/JPEGImages/{{}}.jpg", f"{_VOC10}/{label}", _CONTEXT_NAMES, ids, others, save=save)


def _coco(ids: Mapping[int, int | None]) -> Tree:
    return Tree("val2017/{}.jpg", "stuffthingmaps_trainval2017/val2017/{}.png", _COCO_NAMES, ids, _COCO_OTHERS)


_FULL_ADE = "ADE20K_2021_17_01/images/ADE/validation/urban/street/{}"

TREES = {
    "voc21": _voc({0: 0, 8: 8, 12: 12, 255: None}),
    "voc20": _voc({0: None, 8: 7, 12: 11, 255: None}),
    "context60": _context("SegmentationClassContext/{}.png", {0: 0, 1: 1, 59: 59}),
    "context59": _context("SegmentationClassContext/{}.png", {0: None, 1: 0, 59: 58}),
    "context459": _context("trainval/{}.mat", {0: None, 1: 0, 459: 458}, save_mat),
    "coco_object": _coco({0: 1, 16: 16, 100: 0, 255: 0}),  # person, cat, stuff, unlabelled
    "coco_stuff": _coco({0: 0, 16: 15, 91: 80, 255: None}),
    "cityscapes": Tree(
        "leftImg8bit/val/frankfurt/{}_leftImg8bit.png",
        "gtFine/val/frankfurt/{}_gtFine_labelIds.png",
        ("frankfurt_000000_000294", "frankfurt_000000_000576"),
        {0: None, 7: 0, 24: 11, 26: 13},
        ("leftImg8bit/train/aachen/aachen_000000_000019_leftImg8bit.png",),
    ),
    "ade20k": Tree(
        "ADEChallengeData2016/images/validation/{}.jpg",
        "ADEChallengeData2016/annotations/validation/{}.png",
        _ADE_NAMES,
        {0: None, 1: 0, 3: 2, 150: 149},
        ("ADEChallengeData2016/images/training/ADE_train_00000001.jpg",),
    ),
    "ade847": Tree(
        f"{_FULL_ADE}.jpg",
        f"{_FULL_ADE}_seg.png",
        _ADE_NAMES,
        {0: None, 2978: 0, 312: 1},
        ("ADE20K_2021_17_01/images/ADE/training/urban/street/ADE_train_00000001.jpg",),
        save=save_object_classes,
    ),
}
