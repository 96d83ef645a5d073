"""How classes are written in text: `name`, or `name: synonym, synonym`.

Synonyms are separated by commas, semicolons or bars. Where a comma begins the next class, as on the command line, the
other two are left. What stands in quotation marks, single or double, is taken as it is; a mark within is doubled.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ovss_ray.errors import SettingError

SYNONYM_SEPARATORS = ",;|"

LOOKS_LIKE_JSON = re.compile(r"""\[\s*["'\[{\]]|\{\s*["'}]""")
"""A list or an object at the beginning, and no name such as [red]."""

_HEADINGS = {"id", "name", "class", "synonyms", "color", "queries", "label"}

_QUOTED = r"""\s*(?:"(?:[^"]|"")*"|'(?:[^']|'')*')\s*"""
# Quotation marks count where a part begins and ends: in 24" or potter's wheel they are characters like any other.
_TOKEN = re.compile(rf"(?P<quoted>(?:^|(?<=[,;|:])){_QUOTED}(?=[,;|:#]|$))|(?P<stop>[,;|:])|[^,;|:]+")


def split_unquoted(text: str, separators: str) -> list[str]:
    """The parts between separators that stand outside quotation marks; the marks stay, for `unquote`.

    >>> split_unquoted('"hot dog, plain",dog', ",")
    ['"hot dog, plain"', 'dog']
    """
    parts = [""]
    for token in _TOKEN.finditer(text):
        if token["stop"] and token["stop"] in separators:
            parts.append("")
        else:
            parts[-1] += token[0]
    return parts


def unquote(text: str, place: str) -> str:
    """A part without its quotation marks; raises `SettingError` where one is not closed."""
    part = text.strip()
    if re.fullmatch(_QUOTED, part):
        return part[1:-1].replace(part[0] * 2, part[0])
    if part.startswith('"'):
        raise SettingError(f"{place}: the quotation mark in {part!r} is not closed, or something follows where it is")
    return part


def parse_class(text: str, place: str) -> tuple[str, list[str]]:
    """Name and synonyms of a class.

    >>> parse_class('cat: kitten; "cat, striped"', "")
    ('cat', ['kitten', 'cat, striped'])
    """
    head, *rest = split_unquoted(text, ":")
    return unquote(head, place), parse_synonyms(":".join(rest), place)


def parse_synonyms(text: str, place: str) -> list[str]:
    """The synonyms that a text lists; empty parts are left out."""
    return [unquote(part, place) for part in split_unquoted(text, SYNONYM_SEPARATORS) if part.strip()]


def without_comment(line: str) -> str:
    """A line up to a `#` that begins a part of it or stands behind white space, but not within quotation marks."""
    kept = ""
    for token in _TOKEN.finditer(line):
        comment = None if token["quoted"] else re.search(r"(?:^|\s)#", token[0])
        if comment:
            return kept + token[0][: comment.start()]
        kept += token[0]
    return kept


def refuse_other_notations(text: str, path: str) -> None:
    """Raise `SettingError` where a text file has the form of JSON, YAML or a table, which end in other letters."""
    first = next((line.strip() for line in text.splitlines() if line.strip()), "")
    headings = {part.strip().strip("\"'").casefold() for part in re.split("[,;\t]", first)}
    if LOOKS_LIKE_JSON.match(text.lstrip()):
        kind, ending = "JSON", ".json (.jsonl with one value a line)"
    elif first.startswith("- "):
        kind, ending = "YAML", ".yaml"
    elif len(headings) > 1 and headings & {"name", "class"} and headings <= _HEADINGS:
        kind, ending = "a table with headings", ".csv"
    else:
        return
    raise SettingError(f"{path} holds {kind} and would be read as one class a line; let its name end in {ending}")


def class_text(names: Sequence[str], separator: str = ",") -> str:
    """Names as one types them for `--classes`.

    >>> class_text(["hot dog, plain", "dog"])
    '"hot dog, plain",dog'
    """
    return separator.join(_quoted(name) if re.search(r"[,;|:\"'#]", name) else name for name in names)


def _quoted(name: str) -> str:
    doubled = name.replace('"', '""')
    return f'"{doubled}"'
