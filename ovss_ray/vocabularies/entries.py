"""Reading class lists from text, tables, YAML, JSON and Python values into `Entry` records that know where they stand.

* A text file (or a string of several lines): one class a line, as `notation.py` says, or `name, synonym, synonym`;
  `#` starts a comment. On the command line: classes separated by commas. In a list: one class an item.
* A table (CSV, TSV) with the columns `name` and `synonyms`, or a list of objects `{name, synonyms}`.
* A mapping `name: synonyms`. Where all keys are numbers they are the ids: `0: name, synonym`, in any order.
* YAML or JSON: a list or a mapping as above, alone or under `classes` beside `name`, `background` and `templates`.
* The form of the shipped lists: a list of objects `{id, name, synonyms, color}` under `classes`. In this form alone the
  name is a query only where no synonyms are given; in all others it always is. `variants` replace synonyms of some
  classes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

import yaml

from ovss_ray.errors import SettingError, nearest
from ovss_ray.parsing import load_yaml
from ovss_ray.vocabularies.notation import (
    SYNONYM_SEPARATORS,
    parse_class,
    parse_synonyms,
    split_unquoted,
    unquote,
    without_comment,
)
from ovss_ray.vocabularies.tables import read_rows

PLACE = ""
"""The key under which a row of a table keeps its place; no column has this name."""

_FIELDS = {"id", "name", "class", "class_name", "label", "category", "synonyms", "queries", "color"}
"""Keys that tell a field of an object from a class that an object of one key names."""

_OTHER_TOOLS = ("names", "class_names", "categories", "id2label")
"""Keys under which other tools keep classes: lists of YOLO, COCO and the models of transformers."""

MAX_NAME_LENGTH = 200
"""Characters of a class name or query; anything longer is a file of another kind, not a name."""


@dataclass(frozen=True)
class Entry:
    """One class as written: its place (for messages), name, queries and colour (None: choose one)."""

    place: str
    name: str
    queries: tuple[str, ...]
    color: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class ClassList:
    """Everything a vocabulary file says."""

    entries: tuple[Entry, ...]
    name: str | None = None
    background: str | None = None
    templates: Any = None
    variants: tuple[str, ...] = field(default=())


class _Located(str):
    """A YAML scalar that remembers its line."""

    line: int


class _Loader(yaml.BaseLoader):
    """Keeps every scalar as written: `no` stays "no", `1` stays "1"."""


def _construct_scalar(loader: _Loader, node: yaml.ScalarNode) -> _Located:
    text = _Located(loader.construct_scalar(node))
    text.line = node.start_mark.line + 1
    return text


def _construct_mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Any, Any]:
    mapping: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: a key must be a plain name")
        mapping[key] = loader.construct_object(value_node, deep=True)
    return mapping


_Loader.add_constructor("tag:yaml.org,2002:str", _construct_scalar)
_Loader.add_constructor("tag:yaml.org,2002:map", _construct_mapping)
for _tag in ("null", "bool", "int", "float", "timestamp", "value", "merge"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_tag}", _construct_scalar)


def parse_yaml(text: str, origin: str) -> Any:
    """Parses YAML into lists, mappings and strings that remember their line; raises `SettingError`."""
    return load_yaml(text, origin, _Loader)


def parse_lines(text: str, origin: str) -> ClassList:
    """Reads one class a line: `name`, `name: synonym, synonym` or `name, synonym, synonym`."""
    entries = []
    for number, raw in enumerate(text.splitlines(), start=1):
        line = without_comment(raw).strip()
        if not line:
            continue
        place = f"{origin}, line {number}"
        before_colon, *behind = split_unquoted(line, ":")
        head, *others = split_unquoted(before_colon, SYNONYM_SEPARATORS)
        if behind and others:
            raise SettingError(f"{place}: write 'name: synonym, synonym' or 'name, synonym, synonym', not both")
        listed = ":".join(behind) or ",".join(others)
        entries.append(_named_entry(place, unquote(head, place), parse_synonyms(listed, place)))
    return ClassList(entries=_by_id(entries))


def parse_table(text: str, origin: str) -> ClassList:
    """Reads a table (CSV, TSV): a line of headings, then one class a row; see `tables.py`."""
    items = [{**row, PLACE: place} for place, row in read_rows(text, origin)]
    return ClassList(entries=tuple(_added_entry(item, index, origin) for index, item in enumerate(items)))


def parse_inline(text: str, origin: str) -> ClassList:
    """Reads classes separated by commas, as the command line has them."""
    items = split_unquoted(text, ",")
    if len(items) > 1 and not items[-1].strip():
        items.pop()
    return parse_value(items, origin)


def parse_value(value: Any, origin: str, variant: str | None = None) -> ClassList:
    """Reads parsed YAML, or a Python list or mapping, in the simple or in the shipped form."""
    if isinstance(value, Mapping) and "classes" in value:
        known = {"name", "background", "templates", "classes", "variants"}
        described = _classes(value["classes"], origin, _variant_queries(value, origin, variant))
        _refuse_misspelt_keys(value, known, origin)
        return ClassList(
            entries=described,
            name=_optional_text(value.get("name")),
            background=_optional_text(value.get("background")),
            templates=value.get("templates"),
            variants=tuple(value.get("variants") or ()),
        )
    if variant is not None:
        raise SettingError(f"{origin} has no variants, so variant '{variant}' cannot be chosen")
    return ClassList(entries=_classes(value, origin, None))


def _classes(value: Any, origin: str, replaced: Mapping[int, tuple[str, ...]] | None) -> tuple[Entry, ...]:
    """`replaced` has the synonyms of a variant by class, in the form of the shipped lists; None is any other form."""
    if isinstance(value, Mapping):
        return _by_id([_keyed_entry(key, item, _place(origin, key)) for key, item in value.items()])
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise SettingError(f"{origin}: the classes must be a list of names or a mapping name: synonyms")
    entries = []
    for index, item in enumerate(value):
        if isinstance(item, Mapping):
            if len(item) == 1 and not _FIELDS.intersection(item):
                [(key, synonyms)] = item.items()  # what YAML makes of `- cat: kitten`
                entries.append(_keyed_entry(key, synonyms, _place(origin, key, index)))
            elif replaced is None:
                entries.append(_added_entry(item, index, origin))
            else:
                entries.append(_described_entry(item, index, origin, replaced.get(index)))
        elif isinstance(item, str):
            place = _place(origin, item, index)
            entries.append(_named_entry(place, *parse_class(item, place)))
        else:
            raise SettingError(f"{origin}, class {index + 1}: {item!r} is not a name")
    if any(isinstance(item, Mapping) and _FIELDS.intersection(item) for item in value):
        return tuple(entries)  # what an object calls its name is one, be it a number
    return _by_id(entries)


def _keyed_entry(key: Any, value: Any, place: str) -> Entry:
    """A class of a mapping from names to synonyms."""
    if isinstance(value, Iterable) and key in _OTHER_TOOLS and not isinstance(value, str):
        raise SettingError(f"{place}: '{key}' would be a class; if classes stand under it, call it 'classes'")
    return _named_entry(place, str(key), _synonyms(value, place))


def _by_id(entries: Sequence[Entry]) -> tuple[Entry, ...]:
    """Classes in their order or, where all are written as `0: cat, kitten`, in that of the ids before their names."""
    if not any(len(entry.queries) > 1 for entry in entries):
        return tuple(entries)  # numbers without names behind them are names
    if not all(entry.name.isascii() and entry.name.isdecimal() for entry in entries):
        return tuple(entries)
    by_id: dict[int, Entry] = {}
    for entry in entries:
        number = int(entry.name)
        if len(entry.queries) == 1:
            raise SettingError(f"{entry.place}: the id {entry.name} has no name; write '{entry.name}: name'")
        if number in by_id:
            raise SettingError(f"{entry.place}: the id {number} is given twice; remove one")
        by_id[number] = replace(entry, name=entry.queries[1], queries=entry.queries[1:])
    if max(by_id) != len(by_id) - 1:
        odd = min(number for number in by_id if number >= len(by_id))
        raise SettingError(
            f"{by_id[odd].place}: the id of '{by_id[odd].name}' is {odd}, but ids run from 0 to {len(by_id) - 1} where "
            f"there are {len(by_id)} of them; number the classes so, or give their names alone (or "
            f'{{"name": "{odd}", "synonyms": ...}} for a class that is called by its number)'
        )
    return tuple(by_id[number] for number in range(len(by_id)))


def _described_entry(item: Mapping[str, Any], index: int, origin: str, replacement: tuple[str, ...] | None) -> Entry:
    name, place = _checked_fields(item, index, origin, strict=True)
    queries = replacement or _synonyms(item.get("synonyms"), place) or (name,)
    cleaned = tuple(_clean(query, place, "query") for query in queries)
    return Entry(place, _clean(name, place, "class name"), cleaned, _color(item.get("color"), place))


def _added_entry(item: Mapping[str, Any], index: int, origin: str) -> Entry:
    """A class whose synonyms are queries beside its name; fields of no meaning here are left alone."""
    name, place = _checked_fields(item, index, origin, strict=False)
    named = _named_entry(place, name, _synonyms(item.get("synonyms"), place))
    return replace(named, color=_color(item.get("color"), place))


def _checked_fields(item: Mapping[str, Any], index: int, origin: str, *, strict: bool) -> tuple[str, str]:
    """The name and the place of a class, of whose fields `id` and the spelling of the others were checked."""
    name = item.get("name", "")
    if "name" not in item and PLACE not in item:
        raise SettingError(f"{_place(origin, None, index)}: there is no 'name' among its fields ({', '.join(item)})")
    place = item.get(PLACE) or _place(origin, name, index)
    _refuse_misspelt_keys(item, {"id", "name", "synonyms", "color", "source_id"}, place, strict)
    if item.get("id") not in (None, "") and str(item["id"]).strip() != str(index):
        raise SettingError(
            f"{place}: the id is {item['id']}, but ids run 0, 1, 2, ... in order; it must be {index}, or leave ids out"
        )
    return "" if name is None else str(name), place


def _named_entry(place: str, name: str, synonyms: Iterable[str]) -> Entry:
    clean = _clean(name, place, "class name")
    others = [_clean(synonym, place, "query") for synonym in synonyms]
    # The name is a query of its own; a file that repeats it among the synonyms means the same thing.
    return Entry(place, clean, (clean, *(query for query in others if query != clean)))


def _variant_queries(value: Mapping[str, Any], origin: str, variant: str | None) -> dict[int, tuple[str, ...]]:
    variants = value.get("variants") or {}
    if variant is None:
        return {}
    if variant not in variants:
        raise SettingError(
            f"{origin} has no variant '{variant}', only {', '.join(variants) or 'none'}{nearest(variant, variants)}"
        )
    chosen = variants[variant] or {}
    return {int(key): tuple(str(query) for query in queries) for key, queries in chosen.items()}


def _refuse_misspelt_keys(item: Mapping[str, Any], known: set[str], place: str, strict: bool = False) -> None:
    """Shipped files carry more fields about the data set than a vocabulary needs, so only near misses are refused."""
    for key in item:
        if key not in known and key != PLACE and (strict or get_close_matches(str(key), sorted(known), 1, 0.8)):
            raise SettingError(f"{place}: unknown field '{key}'{nearest(str(key), known)}")


def _synonyms(value: Any, place: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        return tuple(parse_synonyms(value, place)) if value not in ("null", "~") else ()
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        synonyms = tuple(value)
        if all(isinstance(item, str) for item in synonyms):
            return synonyms
    raise SettingError(f"{place}: the synonyms must be a list of strings, not {str(value)[:60]!r}")


def _clean(text: str, place: str, what: str) -> str:
    clean = " ".join(str(text).split())
    if not clean:
        raise SettingError(f"{place}: the {what} is empty; write a name or remove the entry")
    if any("\ud800" <= character <= "\udfff" for character in clean):
        raise SettingError(f"{place}: the {what} {clean!r} is no valid Unicode text; write it in UTF-8")
    if len(clean) > MAX_NAME_LENGTH:
        raise SettingError(
            f"{place}: the {what} '{clean[:30]}...' has {len(clean)} characters; {MAX_NAME_LENGTH} is the limit"
        )
    return clean


def _color(value: Any, place: str) -> tuple[int, int, int] | None:
    if value is None:
        return None
    if isinstance(value, str) and value.strip() in ("", "null", "~"):
        return None
    try:
        if isinstance(value, str):  # "#ff8000", "255,128,0", "255 128 0", "(255, 128, 0)"
            code = re.fullmatch(r"#([0-9a-fA-F]{2})([0-9a-fA-F]{2})([0-9a-fA-F]{2})", value.strip())
            value = [int(part, 16) for part in code.groups()] if code else re.split(r"[\s,;]+", value.strip(" ()[]"))
        red, green, blue = (int(channel) for channel in value)
    except (TypeError, ValueError):
        raise SettingError(f"{place}: the color must be three numbers, 0 to 255, or such as #ff8000") from None
    if not all(0 <= channel <= 255 for channel in (red, green, blue)):
        raise SettingError(f"{place}: the color must be three numbers, 0 to 255, or such as #ff8000")
    return red, green, blue


def _optional_text(value: Any) -> str | None:
    return None if value is None or str(value) in ("", "null", "~", "None") else str(value)


def _place(origin: str, located: Any, index: int | None = None) -> str:
    line = getattr(located, "line", None)
    if line is not None:
        return f"{origin}, line {line}"
    return origin if index is None else f"{origin}, class {index + 1}"
