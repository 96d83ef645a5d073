"""Class lists in tables: CSV and TSV files with a line of headings."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from difflib import get_close_matches

from ovss_ray.errors import SettingError

_NAME_HEADINGS = ("name", "class_name", "label", "class")
"""What the column of names may be called; of several the first counts that holds more than numbers."""

_OTHER_HEADINGS = ("synonyms", "id", "color")
"""The other columns that are read; what stands under other headings is left alone."""

_DELIMITERS = ",;\t"
_SEPARATOR_LINE = re.compile(r"\s*sep=[,;\t]?\s*", re.IGNORECASE)
"""What Excel is told the delimiter by, before the headings."""


def read_rows(text: str, origin: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table: their place, for messages, and the cells of the columns `name`, `synonyms`, `id`, `color`.

    The delimiter is the comma, semicolon or tab that the headings are separated by. Blank rows are left out.

    Raises:
        SettingError: there are no headings, or none of the names of classes; there are only numbers under it; a row
            has more cells than headings.
    """
    lines = io.StringIO(text, newline="")
    first = next((line for line in text.splitlines() if line.strip() and not _SEPARATOR_LINE.fullmatch(line)), "")
    delimiter = max(_DELIMITERS, key=first.count)
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        begun = (row for row in rows if any(row) and not _SEPARATOR_LINE.fullmatch(delimiter.join(row)))
        headings = [cell.strip().casefold() for cell in next(begun, [])]
        _refuse_odd_headings(headings, first, origin)
        placed = []
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            place = f"{origin}, line {rows.line_num}"
            if len(row) > len(headings):
                raise SettingError(
                    f"{place}: there are {len(row)} cells under {len(headings)} headings; put quotation marks around a "
                    "cell with a delimiter in it"
                )
            placed.append((place, row))
    except csv.Error as error:
        raise SettingError(f"{origin}, line {rows.line_num}: {error}") from None
    columns = {name: headings.index(name) for name in _OTHER_HEADINGS if name in headings}
    columns["name"] = _name_column(headings, [row for _, row in placed], origin)
    for place, row in placed:
        yield place, {name: row[index] for name, index in columns.items() if index < len(row)}


def _refuse_odd_headings(headings: list[str], first: str, origin: str) -> None:
    if not set(_NAME_HEADINGS) & set(headings):
        raise SettingError(
            f"{origin} must begin with a line of headings, with a column 'name' and, if wanted, 'synonyms'; it begins "
            f"with {first.strip()[:60]!r} (a file with one class a line and no headings is a .txt file)"
        )
    for heading in headings:
        close = get_close_matches(heading, ["synonyms", "color"], 1, 0.8)
        if close and heading not in _OTHER_HEADINGS:
            raise SettingError(f"{origin}, line 1: there is a column {heading!r}; did you mean {close[0]!r}?")


def _name_column(headings: list[str], rows: list[list[str]], origin: str) -> int:
    candidates = [headings.index(heading) for heading in _NAME_HEADINGS if heading in headings]
    for index in candidates:
        cells = [row[index].strip() for row in rows if index < len(row)]
        if not cells or not all(cell.isdecimal() for cell in cells if cell):
            return index
    raise SettingError(
        f"{origin}: the column {headings[candidates[0]]!r} holds numbers only; put the names of the classes in a "
        "column 'name' (ids, 0, 1, 2, ... in order, may stand in a column 'id')"
    )
