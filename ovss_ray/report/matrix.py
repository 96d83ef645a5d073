"""A picture of a confusion matrix that can be read with twenty classes and with two hundred."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np
import numpy.typing as npt

from ovss_ray.evaluation.confusion import Counts
from ovss_ray.report.page import data_uri

MOST_CLASSES = 180
"""Of more classes, only those with the most true pixels have a row."""

_RIGHT, _WRONG = (47, 140, 110), (208, 64, 52)
_LONGEST_NAME = 26
_SMALLEST_HINT = 0.01
_AXES = "true ↓ label →"
_NO_PREDICTION, _OTHER_CLASSES = "no label", "other classes"


@dataclass(frozen=True, eq=False)
class ConfusionPicture:
    """Where the pixels of each true class went, as a page block.

    Attributes:
        shares: [R, K] in 0..1: of the true pixels of the row's class, those labelled as the column's; NaN rows are
            classes that are never true.
        rows: names of the R true classes.
        columns: names of the K labels; the first R are the same classes.
    """

    shares: npt.NDArray[np.float64]
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def html(self) -> str:
        cell, font = _sizes(len(self.rows))
        left = max(_width(self.rows, font), _width((_AXES,), font))
        top = _width(self.columns, font)
        height, width = len(self.rows) * cell, len(self.columns) * cell
        parts = [
            f'<image x="{left}" y="{top}" width="{width}" height="{height}" preserveAspectRatio="none" '
            f'style="image-rendering:pixelated" href="{data_uri(self._painted())}"/>',
            *_grid(left, top, len(self.rows), len(self.columns), cell),
            *self._names(left, top, cell),
            *self._values(left, top, cell),
        ]
        box = f'width="{left + width + 1}" height="{top + height + 1}"'
        label = "Confusion matrix: rows are true classes, columns are labels"
        return (
            f'<div class="scroll"><svg role="img" aria-label="{label}" {box} font-size="{font}" fill="var(--ink)" '
            f'style="display:block">{"".join(parts)}</svg></div>'
        )

    def _painted(self) -> npt.NDArray[np.uint8]:
        """[R, K, 4]: one pixel per cell, green where it is right, red where not, the stronger the larger its share."""
        right = np.eye(*self.shares.shape, dtype=np.bool_)
        painted = np.zeros((*self.shares.shape, 4), np.uint8)
        painted[..., :3] = np.where(right[..., None], _RIGHT, _WRONG)
        painted[..., 3] = np.rint(255 * np.sqrt(np.nan_to_num(self.shares)))  # the root shows small shares too
        return painted

    def _names(self, left: int, top: int, cell: int) -> Iterator[str]:
        yield f'<text x="{left - 6}" y="{top - 6}" text-anchor="end" fill="var(--soft)">{_AXES}</text>'
        for index, name in enumerate(self.rows):
            y = top + (index + 0.5) * cell
            yield f'<text x="{left - 6}" y="{y:g}" text-anchor="end" dominant-baseline="central">{_short(name)}</text>'
        for index, name in enumerate(self.columns):
            turned = f"translate({left + (index + 0.5) * cell:g},{top - 6}) rotate(-90)"
            yield f'<text transform="{turned}" dominant-baseline="central">{_short(name)}</text>'

    def _values(self, left: int, top: int, cell: int) -> Iterator[str]:
        """Each share that can be seen: as a number where there is room, and in a hint of the pointer."""
        for row, column in np.argwhere(self.shares >= _SMALLEST_HINT).tolist():
            share = 100 * self.shares[row, column]
            x, y = left + column * cell, top + row * cell
            hint = f"<title>{escape(self.rows[row])} labelled {escape(self.columns[column])}: {share:.1f} %</title>"
            yield f'<rect x="{x}" y="{y}" width="{cell}" height="{cell}" fill-opacity="0">{hint}</rect>'
            if cell >= 28:
                yield (
                    f'<text x="{x + cell / 2:g}" y="{y + cell / 2:g}" text-anchor="middle" dominant-baseline="central" '
                    f'pointer-events="none">{share:.0f}</text>'
                )


def confusion_picture(counts: Counts, names: Sequence[str]) -> ConfusionPicture:
    """The picture of a confusion matrix.

    Args:
        counts: [C, C + 1] as in `ConfusionMatrix`.
        names: of the C classes; of more than `MOST_CLASSES` those with the most true pixels are shown, in id order,
            and the others are one column.
    """
    true = counts.sum(axis=1)
    shown = np.sort(np.argsort(-true, kind="stable")[:MOST_CLASSES])
    kept = counts[shown]
    columns = [kept[:, shown]]
    labels = [names[index] for index in shown]
    rows = tuple(labels)
    if len(shown) < len(names):
        columns.append(kept[:, :-1].sum(axis=1, keepdims=True) - columns[0].sum(axis=1, keepdims=True))
        labels.append(_OTHER_CLASSES)
    if kept[:, -1].any():
        columns.append(kept[:, -1:])
        labels.append(_NO_PREDICTION)
    with np.errstate(invalid="ignore"):
        shares = np.hstack(columns) / true[shown, None]
    return ConfusionPicture(shares, rows, tuple(labels))


def _sizes(classes: int) -> tuple[int, int]:
    """Side of a cell and size of the letters, in CSS pixels."""
    if classes <= 25:
        return 30, 12
    return (16, 11) if classes <= 90 else (11, 9)


def _width(names: Sequence[str], font: int) -> int:
    """Room for the longest name."""
    return round(0.58 * font * max((len(_cut(name)) for name in names), default=0)) + 14


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


def _short(name: str) -> str:
    full = f"<title>{escape(name)}</title>" if _cut(name) != name else ""
    return escape(_cut(name)) + full


def _grid(left: int, top: int, rows: int, columns: int, cell: int) -> Iterator[str]:
    """Thin lines that lead the eye from a name to its cells: all of them, or every fifth if cells are small."""
    step = 1 if cell >= 28 else 5
    lines = [f"M{left} {top + row * cell}h{columns * cell}" for row in (*range(0, rows, step), rows)]
    lines += [f"M{left + column * cell} {top}v{rows * cell}" for column in (*range(0, columns, step), columns)]
    yield f'<path d="{"".join(lines)}" stroke="var(--line)" fill="none"/>'
