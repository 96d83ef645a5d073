"""Images of an evaluation beside their labels and their ground truth."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from ovss_ray.errors import ImageError, OvssError
from ovss_ray.evaluation.classes import match_classes
from ovss_ray.evaluation.confusion import Counts
from ovss_ray.evaluation.ground_truth.errors import AnnotationError
from ovss_ray.evaluation.ground_truth.truth import GroundTruth
from ovss_ray.evaluation.table import ImageScores
from ovss_ray.images.parallel import flat_map_ordered
from ovss_ray.labels.reading import Run
from ovss_ray.report.page import (
    Block,
    Color,
    Gallery,
    Legend,
    NoPicture,
    Part,
    Picture,
    RgbImage,
    Swatch,
    paint_labels,
)

LONGEST_SIDE = 360
"""Pictures are shrunk to this many pixels, so that a page with dozens of them stays small."""

_NO_CLASS: Color = (255, 255, 255)
_LEGEND_CLASSES = 14
_SMALLEST_SHARE = 0.005
_FETCHES = 8

ClassIds = npt.NDArray[np.int32]


@dataclass(frozen=True, eq=False)
class ShownImage:
    """One image, shrunk; where a part cannot be read, there is the reason instead.

    Attributes:
        name: what the ground truth calls it.
        image: uint8 [h, w, 3].
        labels: [h, w] class ids of the ground truth, C where there is none.
        truth: [h, w] likewise; C where it does not count.
        cells: [n, 3] true class, labelled class, pixels, of the full size; empty unless both were read.
    """

    name: str
    image: RgbImage | str
    labels: ClassIds | str
    truth: ClassIds | str
    cells: Counts


def class_galleries(
    run: Run,
    truth: GroundTruth,
    images: ImageScores,
    class_ids: Sequence[int],
    *,
    worst: int,
    best: int,
) -> tuple[Part, ...]:
    """For each class the images where it came out worst, then those where it came out best.

    Args:
        run: gives the labels and the images.
        truth: the ground truth.
        images: the scores of `run` against `truth`.
        class_ids: of the ground truth.
        worst, best: how many images of each kind.
    """
    wanted = {class_id: (images.worst(class_id, worst), images.best(class_id, best)) for class_id in class_ids}
    ids = sorted({image_id for pair in wanted.values() for group in pair for image_id in group})
    names = dict(zip(images.image_ids.tolist(), images.names, strict=True))
    shown = _read(run, truth, {image_id: names[image_id] for image_id in ids})
    positions = {image_id: row for row, image_id in enumerate(images.image_ids.tolist()) if image_id in shown}
    parts = []
    for class_id, (low, high) in wanted.items():
        iou = images.image_iou(class_id)
        ranked = [("worst", image_id) for image_id in low]
        ranked += [("best", image_id) for image_id in high if image_id not in low]
        rows = [(f"{kind}, IoU {100 * iou[positions[image_id]]:.1f} %", shown[image_id]) for kind, image_id in ranked]
        parts.append(_part(class_id, truth, rows))
    return tuple(parts)


def _part(class_id: int, truth: GroundTruth, rows: Sequence[tuple[str, ShownImage]]) -> Part:
    entries = truth.vocabulary.classes
    colors = [entry.color for entry in entries]
    swatches = [
        Swatch("no class", _NO_CLASS) if found == len(entries) else Swatch(entries[found].name, entries[found].color)
        for found in _visible([image for _, image in rows])
    ]
    gallery = Gallery(
        ("image", "labels", "ground truth"),
        tuple(_row(class_id, truth.vocabulary.names, colors, remark, image) for remark, image in rows),
    )
    blocks: tuple[Block, ...] = (Legend(tuple(swatches)), gallery)
    return Part(entries[class_id].name, blocks)


def _row(
    class_id: int, names: Sequence[str], colors: Sequence[Color], remark: str, shown: ShownImage
) -> tuple[Picture | NoPicture, ...]:
    went, there = _notes(class_id, names, shown.cells)
    photo = (
        NoPicture(f"{shown.name}: {shown.image}")
        if isinstance(shown.image, str)
        else Picture(shown.image, f"image {shown.name}", f"{shown.name}: {remark}", is_photo=True)
    )
    maps = ((shown.labels, f"labels of {shown.name}", went), (shown.truth, f"ground truth of {shown.name}", there))
    painted = (
        NoPicture(ids) if isinstance(ids, str) else Picture(paint_labels(ids, colors, unlabelled=_NO_CLASS), text, note)
        for ids, text, note in maps
    )
    return (photo, *painted)


def _notes(class_id: int, names: Sequence[str], cells: Counts) -> tuple[str, str]:
    """What became of the class in an image, and how much of it there is."""
    if not len(cells):
        return "", ""
    true, labelled, pixels = cells.T
    name, there = names[class_id], true == class_id
    share = pixels[there].sum() / pixels.sum()
    if share:
        went = _most(labelled[there], pixels[there], names)
        return f"{name} is labelled {went}", f"{name}: {100 * share:.1f}\N{NO-BREAK SPACE}% of the pixels"
    here = labelled == class_id
    return f"labelled {name}, but truly {_most(true[here], pixels[here], names)}", f"no {name}"


def _most(class_ids: Counts, pixels: Counts, names: Sequence[str]) -> str:
    """The three most frequent classes with their shares."""
    order = np.argsort(-pixels, kind="stable")[:3]
    shares = 100 * pixels[order] / pixels.sum()
    called = [(*names, "nothing")[found] for found in class_ids[order]]
    return ", ".join(
        f"{name} {share:.0f}\N{NO-BREAK SPACE}%" for name, share in zip(called, shares, strict=True) if share >= 1
    )


def _visible(shown: Iterable[ShownImage]) -> list[int]:
    """The ids that cover a part of any map that can be seen, largest first."""
    largest: dict[int, float] = {}
    for image in shown:
        for ids in (image.labels, image.truth):
            if not isinstance(ids, str):
                found, pixels = np.unique(ids, return_counts=True)
                for class_id, share in zip(found.tolist(), (pixels / ids.size).tolist(), strict=True):
                    largest[class_id] = max(largest.get(class_id, 0.0), share)
    seen = sorted(
        (class_id for class_id, share in largest.items() if share >= _SMALLEST_SHARE), key=lambda c: -largest[c]
    )
    return seen[:_LEGEND_CLASSES]


def _read(run: Run, truth: GroundTruth, names: Mapping[int, str]) -> dict[int, ShownImage]:
    """The images with these ids; their bytes are fetched a few at a time."""
    match = match_classes(run.vocabulary, truth.vocabulary)
    shown = {}
    for image_id, photo in _photos(run, sorted(names)):
        name = names[image_id]
        true: ClassIds | str
        labels: ClassIds | str
        cells: Counts = np.zeros((0, 3), np.int64)
        try:
            read = truth.read(name)
            true = np.where(read == truth.ignore_index, truth.vocabulary.num_classes, read).astype(np.int32)
        except (AnnotationError, OvssError) as error:
            read, true = None, str(error)
        try:
            stored = run.label_map(image_id)
            labels = match.apply(stored if read is None else truth.aligned(stored, read))
        except OvssError as error:
            labels = str(error)
        if not isinstance(true, str) and not isinstance(labels, str):
            cells = _cells(labels, true, truth.vocabulary.num_classes)
        shown[image_id] = ShownImage(name, photo, _shrunk_ids(labels), _shrunk_ids(true), cells)
    return shown


def _photos(run: Run, image_ids: Sequence[int]) -> Iterator[tuple[int, RgbImage | str]]:
    def load(image_id: int) -> list[tuple[int, RgbImage | str]]:
        try:
            return [(image_id, _shrunk(run.image(image_id)))]
        except (ImageError, OvssError) as error:
            status = f"{error.status}, " if isinstance(error, ImageError) else ""
            return [(image_id, f"image {image_id} cannot be shown: {status}{error}")]

    return flat_map_ordered(load, image_ids, threads=_FETCHES)


def _cells(labels: ClassIds, true: ClassIds, num_classes: int) -> Counts:
    counted = true < num_classes
    pairs, pixels = np.unique(true[counted].astype(np.int64) * (num_classes + 1) + labels[counted], return_counts=True)
    return np.stack([*np.divmod(pairs, num_classes + 1), pixels], axis=1).astype(np.int64)


def _shrunk(pixels: RgbImage) -> RgbImage:
    image = Image.fromarray(pixels)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _shrunk_ids(ids: ClassIds | str) -> ClassIds | str:
    """Nearest pixels: ids don't mix."""
    if isinstance(ids, str):
        return ids
    height, width = ids.shape
    factor = max(height, width, LONGEST_SIDE) / LONGEST_SIDE
    rows, columns = (
        ((np.arange(max(1, round(size / factor))) + 0.5) * size / max(1, round(size / factor))).astype(int)
        for size in (height, width)
    )
    return ids[np.ix_(rows, columns)]
