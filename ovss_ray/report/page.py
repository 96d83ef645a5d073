"""One self-contained HTML page out of blocks: figures, tables, legends, picture rows.

The page loads nothing: style and pictures are inside the file, so it can be mailed, archived and read offline. All text
is escaped. A new kind of block is a frozen dataclass with an `html()` method.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

RgbImage = npt.NDArray[np.uint8]
Color = tuple[int, int, int]

_LONG_TEXT = 36  # characters; longer cells of tables are broken into lines
_FEW_BARS = 2  # tables with more of them side by side get short ones


class Block(Protocol):
    """A part of a page."""

    def html(self) -> str: ...


@dataclass(frozen=True)
class Text:
    """Paragraphs, separated by blank lines."""

    text: str

    def html(self) -> str:
        return "".join(f"<p>{escape(part.strip())}</p>" for part in self.text.split("\n\n"))


@dataclass(frozen=True)
class Figures:
    """A row of large numbers, each a (value, caption) pair."""

    items: tuple[tuple[str, str], ...]

    def html(self) -> str:
        cells = (f"<div><b>{escape(value)}</b><span>{escape(caption)}</span></div>" for value, caption in self.items)
        return f'<div class="figures">{"".join(cells)}</div>'


@dataclass(frozen=True)
class Bar:
    """A table cell: a share from 0 to 1 as a bar with its percentage."""

    share: float

    def html(self) -> str:
        if not np.isfinite(self.share):
            return '<span class="none">none</span>'
        percent = 100.0 * min(max(self.share, 0.0), 1.0)
        return f'<div class="bar"><i style="width:{percent:.1f}%"></i></div><span>{percent:.1f}</span>'


@dataclass(frozen=True)
class Swatch:
    """A table cell or legend entry: a name with its colour."""

    name: str
    color: Color

    def html(self) -> str:
        red, green, blue = self.color
        return f'<i class="swatch" style="background:rgb({red},{green},{blue})"></i>{escape(self.name)}'


@dataclass(frozen=True)
class Table:
    """A table; a cell is a string or a cell block."""

    header: tuple[str, ...]
    rows: tuple[tuple[str | Bar | Swatch, ...], ...]

    def __post_init__(self) -> None:
        wrong = next((row for row in self.rows if len(row) != len(self.header)), None)
        if wrong is not None:
            raise ValueError(f"a row has {len(wrong)} cells under {len(self.header)} headings: {wrong}")

    def html(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.header)
        body = "".join(f"<tr>{''.join(map(_cell, row))}</tr>" for row in self.rows)
        bars = max((sum(isinstance(cell, Bar) for cell in row) for row in self.rows), default=0)
        kind = ' class="dense"' if bars > _FEW_BARS else ""
        return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(cell: str | Bar | Swatch) -> str:
    if isinstance(cell, Bar):
        return f'<td class="share">{cell.html()}</td>'
    if isinstance(cell, str) and len(cell) > _LONG_TEXT:
        return f'<td class="long">{escape(cell)}</td>'
    return f"<td>{escape(cell) if isinstance(cell, str) else cell.html()}</td>"


@dataclass(frozen=True)
class Legend:
    """Names and the colours they have in the pictures."""

    swatches: tuple[Swatch, ...]

    def html(self) -> str:
        return f'<ul class="legend">{"".join(f"<li>{swatch.html()}</li>" for swatch in self.swatches)}</ul>'


@dataclass(frozen=True)
class Picture:
    """An RGB image, uint8 [H, W, 3], with the text that stands for it and, if wanted, a line below.

    A photo is stored as JPEG, a tenth of the size; anything else exactly.
    """

    image: RgbImage
    description: str
    note: str = ""
    is_photo: bool = False

    def html(self) -> str:
        note = f"<figcaption>{escape(self.note)}</figcaption>" if self.note else ""
        source = data_uri(self.image, "JPEG" if self.is_photo else "PNG")
        return f'<figure><img src="{source}" alt="{escape(self.description)}">{note}</figure>'


@dataclass(frozen=True)
class NoPicture:
    """The place of a picture that cannot be shown, with the reason."""

    reason: str

    def html(self) -> str:
        return f'<figure class="no-picture">{escape(self.reason)}</figure>'


@dataclass(frozen=True)
class Gallery:
    """Rows of pictures side by side, under headings."""

    header: tuple[str, ...]
    rows: tuple[tuple[Picture | NoPicture, ...], ...]

    def html(self) -> str:
        head = "".join(f"<h3>{escape(name)}</h3>" for name in self.header)
        body = "".join(picture.html() for row in self.rows for picture in row)
        return f'<div class="gallery" style="--columns:{len(self.header)}">{head}{body}</div>'


@dataclass(frozen=True)
class Warnings:
    """Sentences that nobody should miss; nothing if there are none."""

    sentences: tuple[str, ...]

    def html(self) -> str:
        items = "".join(f"<li>{escape(sentence)}</li>" for sentence in self.sentences)
        return f'<ul class="warnings">{items}</ul>' if items else ""


@dataclass(frozen=True)
class Part:
    """A smaller heading and the blocks under it, inside a section."""

    heading: str
    blocks: tuple[Block, ...]

    def html(self) -> str:
        return f'<h3 class="part">{escape(self.heading)}</h3>{"".join(block.html() for block in self.blocks)}'


@dataclass(frozen=True)
class Section:
    """A heading and the blocks under it."""

    heading: str
    blocks: tuple[Block, ...]

    def html(self) -> str:
        return f"<section><h2>{escape(self.heading)}</h2>{''.join(block.html() for block in self.blocks)}</section>"


def render_page(title: str, lead: str, blocks: Sequence[Block], *, footer: str = "") -> str:
    """The text of the page.

    Args:
        title: heading and window title.
        lead: one or two sentences under the title.
        blocks: what follows, usually `Section`s.
        footer: a line at the end: where the figures come from.
    """
    body = "".join(block.html() for block in blocks)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f'<body><main><header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p></header>\n'
        f"{body}\n<footer>{escape(footer)}</footer></main></body></html>\n"
    )


def data_uri(image: npt.NDArray[np.uint8], kind: Literal["PNG", "JPEG"] = "PNG") -> str:
    """A picture, [H, W, 3] or with alpha [H, W, 4], as a file inside a URI."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format=kind, optimize=True)
    return f"data:image/{kind.lower()};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def paint_labels(
    labels: npt.NDArray[np.integer], colors: Sequence[Color], *, unlabelled: Color = (128, 128, 128)
) -> RgbImage:
    """A label map [H, W] as an RGB picture [H, W, 3]; ids without a colour are painted `unlabelled`."""
    palette = np.array([*colors, unlabelled], dtype=np.uint8)
    return palette[np.minimum(labels.astype(np.int64), len(colors))]


_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5d6b7c; --line: #dde3ea; --ground: #fbfcfd; --bar: #2f7d6d; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6ebf1; --soft: #97a5b5; --line: #303a46; --ground: #14191f; --bar: #58b7a3; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 48px 24px 64px; }
h1 { font-size: 2.1rem; line-height: 1.2; margin: 0 0 8px; letter-spacing: -0.01em; }
h2 { font-size: 1.25rem; margin: 0 0 12px; }
h3 { font-size: 0.85rem; font-weight: 600; color: var(--soft); margin: 0; }
.lead { font-size: 1.1rem; color: var(--soft); max-width: 46em; margin: 0; }
section { margin-top: 40px; }
h3.part { font-size: 1rem; color: var(--ink); margin: 28px 0 10px; }
.warnings { border-left: 4px solid #d9822b; padding: 2px 16px 2px 32px; margin: 24px 0 0; max-width: 60em; }
.warnings li { margin: 4px 0; }
.figures { display: flex; flex-wrap: wrap; gap: 16px 48px; margin-top: 32px; }
.figures b { display: block; font-size: 2.2rem; line-height: 1.15; font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); }
.scroll { overflow-x: auto; }
.scroll + .scroll { margin-top: 24px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: 5px 32px 5px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.long { white-space: normal; min-width: 18em; overflow-wrap: anywhere; }
.share span { display: inline-block; width: 3.2em; text-align: right; }
.bar { display: inline-block; width: 180px; height: 8px; border-radius: 4px; background: var(--line); }
.bar i { display: block; height: 100%; border-radius: 4px; background: var(--bar); }
.dense .bar { width: 90px; }
.dense th, .dense td { padding-right: 20px; }
.none { color: var(--soft); }
.swatch { display: inline-block; width: 14px; height: 14px; border-radius: 3px; margin-right: 8px; vertical-align: -2px;
  border: 1px solid var(--line); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: 6px 24px; padding: 0; margin: 0 0 16px; }
.gallery { display: grid; grid-template-columns: repeat(var(--columns), 1fr); gap: 10px; }
figure { margin: 0; }
img { width: 100%; display: block; border-radius: 4px; }
.no-picture { display: grid; place-items: center; min-height: 120px; padding: 12px; border: 1px dashed var(--line);
  border-radius: 4px; color: var(--soft); font-size: 0.85rem; overflow-wrap: anywhere; }
figcaption { font-size: 0.82rem; color: var(--soft); margin-top: 4px; }
footer { margin-top: 48px; font-size: 0.85rem; color: var(--soft); }
"""
