"""Text in pictures: Pillow's own font, and for characters that it lacks the fonts of the machine."""

from __future__ import annotations

import unicodedata
from functools import lru_cache
from itertools import groupby
from typing import Any

from PIL import ImageDraw, ImageFont

_Font = Any  # Pillow has two kinds, and the typed one has no public name for what both can do

# The usual ones of Linux, Windows and macOS, those with most characters first.
_CANDIDATES = (
    "DejaVuSans.ttf", "NotoSans-Regular.ttf", "Arial Unicode.ttf", "ARIALUNI.TTF", "arial.ttf",
    "NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "NotoSansSC-Regular.otf", "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf", "msyh.ttc", "PingFang.ttc", "Hiragino Sans GB.ttc", "malgun.ttf",
    "NotoSansArabic-Regular.ttf", "NotoSansHebrew-Regular.ttf", "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf", "FreeSans.ttf", "NotoEmoji-Regular.ttf", "Symbola.ttf", "seguiemj.ttf",
)  # fmt: skip
_NO_CHARACTER = "\U0010ffff"  # drawn as the box that stands for a missing character


class Writer:
    """Measures and draws single lines in one size.

    Args:
        size: height of the letters' box in pixels.
    """

    def __init__(self, size: int) -> None:
        self._size = size

    def width(self, text: str) -> int:
        """Pixels that a line takes."""
        return round(sum(_length(font, part) for font, part in self._parts(text)))

    def cut(self, text: str, width: int) -> str:
        """A line that fits, its end replaced by "…" if need be."""
        line = printable(text)
        if self.width(line) <= width:
            return line
        shortest, longest = 0, len(line)
        while shortest < longest:
            middle = (shortest + longest + 1) // 2
            if self.width(line[:middle].rstrip() + "…") <= width:
                shortest = middle
            else:
                longest = middle - 1
        return line[:shortest].rstrip() + "…"

    def draw(self, draw: ImageDraw.ImageDraw, x: int, middle: int, text: str, fill: str) -> None:
        """Draw a line that begins at `x`, its small letters centred on `middle`."""
        at = float(x)
        for font, part in self._parts(text):
            try:
                draw.text((at, middle), part, fill=fill, font=font, anchor="lm")
            except (OSError, ValueError, UnicodeError):  # Pillow without FreeType knows Latin letters only
                draw.text(
                    (at, middle - self._size // 2), part.encode("latin-1", "replace").decode("latin-1"), fill=fill
                )
            at += _length(font, part)

    def _parts(self, text: str) -> list[tuple[_Font, str]]:
        fonts = [_font_for(self._size, character) for character in text]
        grouped = groupby(zip(fonts, text, strict=True), key=lambda pair: id(pair[0]))
        return [(pairs[0][0], "".join(character for _, character in pairs)) for pairs in (list(g) for _, g in grouped)]


def printable(text: str) -> str:
    """One line: control characters and line breaks are spaces, and what joins emoji is left out."""
    kept = (" " if unicodedata.category(c) in ("Cc", "Zl", "Zp", "Cs") else c for c in text)
    return " ".join(
        "".join(c for c in kept if unicodedata.category(c) != "Cf" and not "\ufe00" <= c <= "\ufe0f").split()
    )


def _length(font: _Font, text: str) -> float:
    try:
        return float(font.getlength(text))
    except UnicodeError:
        return float(font.getlength("?" * len(text)))


@lru_cache(maxsize=4096)
def _font_for(size: int, character: str) -> _Font:
    """The first font that has a character; Pillow's own, with its box, if none has."""
    own = _own_font(size)
    if character.isascii() or _has(own, character):
        return own
    return next((font for name in _CANDIDATES if (font := _font(name, size)) and _has(font, character)), own)


@lru_cache(maxsize=16)
def _own_font(size: int) -> _Font:
    return ImageFont.load_default(size)


@lru_cache(maxsize=256)
def _font(name: str, size: int) -> _Font | None:
    try:
        return ImageFont.truetype(name, size)
    except (OSError, ImportError, ValueError):
        return None


def _has(font: _Font, character: str) -> bool:
    try:
        glyph, box = font.getmask(character), font.getmask(_NO_CHARACTER)
        return character.isspace() or (glyph.size, bytes(glyph)) != (box.size, bytes(box))
    except (OSError, ValueError, UnicodeError):  # a font of bitmaps, or of colours, in other sizes
        return False
