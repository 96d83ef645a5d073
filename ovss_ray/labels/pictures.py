"""Label maps as pictures for people: colours over the photo, and a legend that can be read at any size."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ovss_ray.errors import SettingError
from ovss_ray.labels.codecs import LabelMap
from ovss_ray.labels.fonts import Writer
from ovss_ray.vocabulary import Vocabulary

_OPACITY = 0.55
_STRIP_PIXELS = 1 << 20
_SMALLEST_SIDE = 256  # smaller pictures are enlarged
_LONGEST_ENLARGED = 4096
_LETTERS = (13, 220)  # px, for a picture of up to 500 px and from 8,000 px
_LONGEST_NAME = 15  # times the height of the letters
_MOST_ENTRIES = 120
_INK, _FAINT, _PAPER, _NO_LABEL = "#1f2328", "#6e7781", "white", (0, 0, 0)


def draw_labels(
    labels: LabelMap,
    vocabulary: Vocabulary,
    image: npt.NDArray[np.uint8] | None = None,
    *,
    legend: bool = True,
    max_side: int | None = None,
) -> Image.Image:
    """A label map in the colours of its classes.

    Args:
        labels: [H, W] class ids.
        vocabulary: the classes.
        image: uint8 [H, W, 3], shown through the colours; pixels without a label show it as it is, or black without
            it.
        legend: a list of the classes present with their shares, the largest first, beside the picture or below it.
            With it, pictures of less than 256 pixels are enlarged. Without it the picture has the size of the label
            map.
        max_side: longest side of the picture in pixels; a larger one is reduced, the legend comes on top.

    Raises:
        SettingError: if the image has another size or type, or `max_side` is below 1.
    """
    if image is not None and image.shape != (*labels.shape, 3):
        height, width = labels.shape
        raise SettingError(f"the image has shape {image.shape}, the label map is {height} x {width}")
    if image is not None and image.dtype != np.uint8:
        raise SettingError(f"the image is an array of {image.dtype}; give one of uint8, 0..255")
    if max_side is not None and (not isinstance(max_side, int) or max_side < 1):
        raise SettingError(f"max_side is {max_side!r}; give the longest side of the picture in pixels")
    entries = _entries(labels, vocabulary, _NO_LABEL if image is None else None) if legend else []
    width, height = _picture_size(labels.shape, legend, max_side)
    picture = Image.fromarray(
        _colored(_resized(labels, width, height), vocabulary, _resized_photo(image, width, height))
    )
    return _with_legend(picture, entries) if legend else picture


@dataclass(frozen=True)
class _Entry:
    color: tuple[int, int, int] | None  # None for an empty box
    name: str
    share: str
    has_box: bool = True


def _entries(labels: LabelMap, vocabulary: Vocabulary, no_label: tuple[int, int, int] | None) -> list[_Entry]:
    counts = np.zeros(vocabulary.num_classes + 1, np.int64)
    step = max(1, _STRIP_PIXELS // labels.shape[1])
    for top in range(0, len(labels), step):
        strip = np.minimum(labels[top : top + step], vocabulary.num_classes)
        counts += np.bincount(strip.ravel(), minlength=len(counts))
    unlabelled = int(counts[-1])
    order = [int(i) for i in np.argsort(-counts[:-1], kind="stable") if counts[i]]
    entries = [
        _Entry(vocabulary.classes[i].color, vocabulary.classes[i].name, _share(counts[i] / labels.size)) for i in order
    ]
    if len(entries) > _MOST_ENTRIES:
        rest = sum(int(counts[i]) for i in order[_MOST_ENTRIES - 1 :])
        more = _Entry(None, f"{len(entries) - _MOST_ENTRIES + 1} more", _share(rest / labels.size), has_box=False)
        entries = [*entries[: _MOST_ENTRIES - 1], more]
    if unlabelled:
        entries.append(_Entry(no_label, "(no label)", _share(unlabelled / labels.size)))
    return entries


def _share(fraction: float) -> str:
    return f"{fraction:.1%}" if fraction >= 0.0005 else "<0.1%"


def _picture_size(shape: tuple[int, ...], legend: bool, max_side: int | None) -> tuple[int, int]:
    height, width = shape
    longest, shortest = max(shape), min(shape)
    if legend and longest < _SMALLEST_SIDE:
        factor = _SMALLEST_SIDE // longest
    elif legend and shortest < 8:
        factor = max(1, min(8 // shortest, _LONGEST_ENLARGED // longest))
    else:
        factor = 1
    width, height = factor * width, factor * height
    if max_side is not None and max(width, height) > max_side:
        scale = max_side / max(width, height)
        width, height = max(1, round(scale * width)), max(1, round(scale * height))
    return width, height


def _resized(labels: LabelMap, width: int, height: int) -> LabelMap:
    """By the nearest pixel."""
    if labels.shape == (height, width):
        return labels
    rows = ((np.arange(height) + 0.5) * labels.shape[0] / height).astype(np.intp)
    columns = ((np.arange(width) + 0.5) * labels.shape[1] / width).astype(np.intp)
    resized: LabelMap = labels[rows[:, None], columns]
    return resized


def _resized_photo(image: npt.NDArray[np.uint8] | None, width: int, height: int) -> npt.NDArray[np.uint8] | None:
    if image is None or image.shape[:2] == (height, width):
        return image
    how = Image.Resampling.NEAREST if height > image.shape[0] else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((width, height), how))


def _colored(labels: LabelMap, vocabulary: Vocabulary, image: npt.NDArray[np.uint8] | None) -> npt.NDArray[np.uint8]:
    palette = np.array([*(item.color for item in vocabulary.classes), _NO_LABEL], np.uint8)
    colored = np.empty((*labels.shape, 3), np.uint8)
    step = max(1, _STRIP_PIXELS // labels.shape[1])
    for top in range(0, len(labels), step):  # no float copy of a large picture
        strip = np.minimum(labels[top : top + step], vocabulary.num_classes)
        colors = palette[strip]
        if image is not None:
            opacity = np.where(strip < vocabulary.num_classes, np.float32(_OPACITY), np.float32(0))[..., None]
            colors = np.rint(opacity * colors + (1 - opacity) * image[top : top + step]).astype(np.uint8)
        colored[top : top + step] = colors
    return colored


@dataclass(frozen=True)
class _Layout:
    """Where the entries of a legend go; sizes in pixels."""

    columns: int
    rows: int
    column_width: int
    row_height: int
    margin: int
    beside: bool

    def size(self) -> tuple[int, int]:
        return self.columns * self.column_width + 2 * self.margin, self.rows * self.row_height + 2 * self.margin


def _with_legend(picture: Image.Image, entries: list[_Entry]) -> Image.Image:
    if not entries:
        return picture
    smallest, largest = _LETTERS
    wanted = max(math.sqrt(picture.width * picture.height) / 36, max(picture.size) / 110)
    letters = min(max(smallest, round(wanted)), largest)
    writer = Writer(letters)
    names = [writer.cut(entry.name, _LONGEST_NAME * letters) for entry in entries]
    share_width = max(writer.width(entry.share) for entry in entries)
    name_width = max(writer.width(name) for name in names)
    swatch, gap = letters, max(4, letters // 2)
    layout = _lay_out(
        picture, len(entries), column_width=swatch + gap + name_width + 2 * gap + share_width + 2 * gap, letters=letters
    )
    width, height = layout.size()
    if layout.beside:
        sheet = Image.new("RGB", (picture.width + width, max(picture.height, height)), _PAPER)
        left, top = picture.width + layout.margin, layout.margin
    else:
        sheet = Image.new("RGB", (max(picture.width, width), picture.height + height), _PAPER)
        left, top = layout.margin, picture.height + layout.margin
    sheet.paste(picture, (0, 0))
    draw = ImageDraw.Draw(sheet)
    for index, (entry, name) in enumerate(zip(entries, names, strict=True)):
        column, row = divmod(index, layout.rows)
        x, middle = left + column * layout.column_width, top + row * layout.row_height + layout.row_height // 2
        if entry.has_box:
            box = (x, middle - swatch // 2, x + swatch - 1, middle - swatch // 2 + swatch - 1)
            draw.rectangle(box, fill=entry.color, outline=_FAINT, width=max(1, letters // 20))
        writer.draw(draw, x + swatch + gap, middle, name, _INK)
        end = x + layout.column_width - 2 * gap
        writer.draw(draw, end - writer.width(entry.share), middle, entry.share, _FAINT)
    return sheet


def _lay_out(picture: Image.Image, entries: int, *, column_width: int, letters: int) -> _Layout:
    """Beside the picture or below it, whichever makes a sheet that is easier to show: with the shorter longest side."""
    row_height, margin = round(1.6 * letters), max(6, letters // 2)
    rows = min(entries, max(1, (picture.height - 2 * margin) // row_height))
    columns = math.ceil(entries / rows)
    beside = _Layout(columns, math.ceil(entries / columns), column_width, row_height, margin, True)
    columns = min(entries, max(1, (picture.width - 2 * margin) // column_width))
    below = _Layout(columns, math.ceil(entries / columns), column_width, row_height, margin, False)
    (beside_width, beside_height), (below_width, below_height) = beside.size(), below.size()
    longest_beside = max(picture.width + beside_width, picture.height, beside_height)
    longest_below = max(picture.width, below_width, picture.height + below_height)
    return beside if longest_beside <= longest_below else below
