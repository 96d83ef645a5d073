"""Class lists in tables: CSV and TSV files with a line of headings."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from difflib import get_close_matches

from ovss_ray.errors import SettingError

_NAMES = {
    "name": ("name", "class", "class_name", "label"),
    "synonyms": ("synonyms",),
    "id": ("id",),
    "color": ("color",),
}
"""The columns that are read, under the headings that they may have; others are left alone."""

_DELIMITERS = ",;\t"
_SEPARATOR_LINE = re.compile(r"\s*sep=[,;\t]?\s*", re.IGNORECASE)
"""What Excel is told the delimiter by, before the headings."""


def read_rows(text: str, origin: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The rows of a table: their place, for messages, and the cells of the columns `name`, `synonyms`, `id`, `color`.

    The delimiter is the comma, semicolon or tab that the headings are separated by. Blank rows are left out.

    Raises:
        SettingError: there are no headings, or none of the names of classes; a row has more cells than headings.
    """
    lines = io.StringIO(text, newline="")
    first = next((line for line in text.splitlines() if line.strip() and not _SEPARATOR_LINE.fullmatch(line)), "")
    delimiter = max(_DELIMITERS, key=first.count)
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        begun = (row for row in rows if any(row) and not _SEPARATOR_LINE.fullmatch(delimiter.join(row)))
        headings = [cell.strip().casefold() for cell in next(begun, [])]
        columns = _columns(headings, first, origin)
        for row in rows:
            if not any(cell.strip() for cell in row):
                continue
            place = f"{origin}, line {rows.line_num}"
            if len(row) > len(headings):
                raise SettingError(
                    f"{place}: there are {len(row)} cells under {len(headings)} headings; put quotation marks around a "
                    "cell with a delimiter in it"
                )
            yield place, {name: row[index] for name, index in columns.items() if index < len(row)}
    except csv.Error as error:
        raise SettingError(f"{origin}, line {rows.line_num}: {error}") from None


def _columns(headings: list[str], first: str, origin: str) -> dict[str, int]:
    found = {}
    for name, accepted in _NAMES.items():
        index = next((headings.index(heading) for heading in accepted if heading in headings), None)
        if index is not None:
            found[name] = index
    if "name" not in found:
        raise SettingError(
            f"{origin} must begin with a line of headings, with a column 'name' and, if wanted, 'synonyms'; it begins "
            f"with {first.strip()[:60]!r} (a file with one class a line and no headings is a .txt file)"
        )
    for heading in headings:
        close = get_close_matches(heading, ["synonyms", "color"], 1, 0.8)
        if close and heading not in found:
            raise SettingError(f"{origin}, line 1: there is a column {heading!r}; did you mean {close[0]!r}?")
    return found
