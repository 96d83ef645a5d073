"""The classes of a run: names, query strings, prompt templates and the background rule."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from functools import cache, cached_property
from importlib import resources
from pathlib import Path
from typing import Any, cast

from pydantic import TypeAdapter, ValidationError

from ovss_ray.errors import SettingError, nearest
from ovss_ray.parsing import load_json
from ovss_ray.vocabularies.entries import (
    ClassList,
    Entry,
    parse_inline,
    parse_lines,
    parse_table,
    parse_value,
    parse_yaml,
)
from ovss_ray.vocabularies.files import read_text
from ovss_ray.vocabularies.notation import LOOKS_LIKE_JSON, class_text, refuse_other_notations

__all__ = [
    "Vocabulary",
    "VocabularyClass",
    "describe_vocabulary",
    "load_vocabulary",
    "shipped_vocabularies",
    "template_sets",
]

DEFAULT_TEMPLATES = "imagenet_80"
MAX_CLASSES = 65535
"""Class ids are stored as uint16 at most, and 65535 means "no label"."""

SHOWN_CLASSES = 8

_COMBINED_SETS = {"maskclip_85": ("imagenet_80", "maskclip_5")}
_TEXT_ENDINGS = (".txt", ".yaml", ".yml")
_JSON_LINES = ("jsonl", "ndjson")
_FILE_ENDINGS = (*_TEXT_ENDINGS, ".csv", ".tsv", ".json", ".jsonl", ".ndjson")


@dataclass(frozen=True)
class VocabularyClass:
    """One class: its id in the label maps, its name, the strings put to the text tower, its RGB colour."""

    id: int
    name: str
    queries: tuple[str, ...]
    color: tuple[int, int, int]


@dataclass(frozen=True)
class Vocabulary:
    """The classes of a run in id order (0..C-1), the prompt templates and the background rule.

    `background` is the id of the class that pixels below the confidence threshold fall to; None leaves such pixels
    unlabelled (`ignore_index`).
    """

    name: str
    classes: tuple[VocabularyClass, ...]
    templates: tuple[str, ...]
    background: int | None

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in id order."""
        return tuple(item.name for item in self.classes)

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @cached_property
    def queries(self) -> tuple[str, ...]:
        """All query strings, class by class."""
        return tuple(query for item in self.classes for query in item.queries)

    @cached_property
    def query_class(self) -> tuple[int, ...]:
        """The class id of each of `queries`; never decreasing."""
        return tuple(item.id for item in self.classes for _ in item.queries)

    @property
    def label_dtype(self) -> str:
        """The NumPy dtype of a label map: "uint8" or, with more than 255 classes, "uint16"."""
        return "uint8" if self.num_classes <= 255 else "uint16"

    @property
    def ignore_index(self) -> int:
        """The value of a pixel without a label: the largest of `label_dtype`."""
        return 255 if self.num_classes <= 255 else 65535

    def to_json(self) -> str:
        """The canonical text: equal vocabularies give equal text."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Vocabulary:
        """The inverse of `to_json`; raises `SettingError` for any other text."""
        try:
            read = _stored_vocabulary().validate_json(text, strict=True)
        except ValidationError as error:
            wrong = error.errors()[0]
            reason = ": ".join([".".join(map(str, wrong["loc"])), wrong["msg"]] if wrong["loc"] else [wrong["msg"]])
            raise SettingError(f"the stored vocabulary cannot be read: {reason}") from None
        ids = range(len(read.classes))
        whole = ids and [item.id for item in read.classes] == list(ids) and all(item.queries for item in read.classes)
        colors = all(0 <= channel <= 255 for item in read.classes for channel in item.color)
        if not whole or not colors or read.background not in (None, *ids):
            raise SettingError("the stored vocabulary cannot be read: its classes, ids or colors contradict each other")
        return read


@cache
def _stored_vocabulary() -> TypeAdapter[Vocabulary]:
    return TypeAdapter(Vocabulary)


Source = str | os.PathLike[str] | Sequence[Any] | Mapping[str, Any] | Vocabulary


def load_vocabulary(
    source: Source,
    *,
    templates: str | os.PathLike[str] | Sequence[str] | None = None,
    background: str | int | None = None,
    variant: str | None = None,
) -> Vocabulary:
    """Loads the classes to look for.

    Args:
        source: "cat,dog,grass", the name of a shipped vocabulary ("voc21", or "voc21:clearclip" for a variant), a path
            or URI of a .txt, .csv, .tsv, .json or .yaml file, a list of names, a mapping name -> synonyms, or a
            `Vocabulary`. A name in text or in a list may have synonyms behind a colon ("cat: kitten; tabby"); one that
            holds a colon or comma of its own stands in quotation marks. Keys of mappings are taken as they are.
        templates: a set of `template_sets()`, a .txt or .yaml file of templates, one string with "{}", a JSON text with
            a list of such strings, or a list of them; None takes the vocabulary file's own, or "imagenet_80".
        background: name or id of the class that pixels below the confidence threshold fall to; None takes the
            vocabulary file's own rule, or leaves such pixels unlabelled.
        variant: a named set of synonyms of a shipped vocabulary.

    Raises:
        SettingError: the source, a class, the templates, the background or the variant cannot be used.
    """
    if isinstance(source, Vocabulary):
        chosen = _load_templates(templates) if templates is not None else source.templates
        ground = _find_background(background, source.classes, source.name)
        return replace(source, templates=chosen, background=source.background if ground is None else ground)
    name, origin, listed, shipped = _read_source(source, variant)
    if not listed.entries:
        raise SettingError(f"{origin} names no class; write at least one")
    if len(listed.entries) > MAX_CLASSES:
        raise SettingError(f"{origin} names {len(listed.entries)} classes; {MAX_CLASSES} is the limit")
    if not shipped:
        _refuse_duplicates(listed.entries)
    own_background = listed.background if background is None else background
    rule = _find_background(own_background, listed.entries, origin)
    wanted = templates if templates is not None else listed.templates
    return Vocabulary(
        name=name,
        classes=_number(listed.entries, rule),
        templates=_load_templates(DEFAULT_TEMPLATES if wanted is None else wanted),
        background=rule,
    )


def describe_vocabulary(vocabulary: Vocabulary) -> str:
    """A vocabulary in one line, as it was understood: number and names of the classes, synonyms, background, templates.

    >>> describe_vocabulary(load_vocabulary("cat: kitten,grass", background="grass", templates="single"))
    '2 classes (custom): cat, grass; 1 with other queries (cat: cat, kitten); background grass; 1 template'
    """
    listed = class_text(vocabulary.names[:SHOWN_CLASSES], ", ")
    if vocabulary.num_classes > SHOWN_CLASSES:
        listed += f", ..., {class_text(vocabulary.names[-1:])}"
    parts = [f"{_counted(vocabulary.num_classes, 'class', 'classes')} ({vocabulary.name}): {listed}"]
    others = [item for item in vocabulary.classes if item.queries != (item.name,)]
    if others:
        first = others[0]
        shown = class_text(first.queries[:4], ", ") + (", ..." if len(first.queries) > 4 else "")
        parts.append(f"{len(others):,} with other queries ({first.name}: {shown})")
    ground = (
        "no background" if vocabulary.background is None else f"background {vocabulary.names[vocabulary.background]}"
    )
    return "; ".join([*parts, ground, _counted(len(vocabulary.templates), "template", "templates")])


def _counted(count: int, one: str, many: str) -> str:
    return f"{count:,} {one if count == 1 else many}"


def shipped_vocabularies() -> tuple[str, ...]:
    """The names of the vocabularies that come with the package."""
    folder = resources.files("ovss_ray.vocabularies")
    names = (item.name for item in folder.iterdir() if item.name.endswith(".yaml"))
    return tuple(sorted(name[: -len(".yaml")] for name in names if name != "templates.yaml"))


def template_sets() -> tuple[str, ...]:
    """The names of the template sets that come with the package."""
    return tuple(sorted([*_shipped_templates(), *_COMBINED_SETS]))


def _read_source(source: Source, variant: str | None) -> tuple[str, str, ClassList, bool]:
    """Returns the vocabulary's name, how messages call it, what it says and whether it is a shipped one."""
    if isinstance(source, Mapping | list | tuple):
        return "custom", "the vocabulary", parse_value(source, "the vocabulary", variant), False
    if not isinstance(source, str | os.PathLike):
        raise SettingError(f"the vocabulary is a {type(source).__name__}; give text, a path, a list or a mapping")
    text = os.fspath(source).strip()
    if not text:
        raise SettingError("the vocabulary is empty; write classes such as 'cat,dog,grass' or give a file")
    head, colon, tail = text.partition(":")
    if head in shipped_vocabularies() and (not colon or re.fullmatch(r"\w+", tail)):
        return _read_shipped(head, tail or variant)
    if _is_path(source, text):
        return _read_file(text, variant)
    return _read_inline(text, variant)


def _read_shipped(name: str, variant: str | None) -> tuple[str, str, ClassList, bool]:
    text = (resources.files("ovss_ray.vocabularies") / f"{name}.yaml").read_text("utf-8")
    listed = parse_value(parse_yaml(text, name), f"the vocabulary {name}", variant)
    return f"{name}:{variant}" if variant else name, f"the vocabulary {name}", listed, True


def _read_file(path: str, variant: str | None) -> tuple[str, str, ClassList, bool]:
    text = read_text(path, "vocabulary file")
    stem = Path(path.rsplit("/", 1)[-1]).stem
    ending = path.lower().rpartition(".")[2]
    if ending in ("yaml", "yml"):
        listed = parse_value(parse_yaml(text, path), path, variant)
    elif ending == "json":
        listed = parse_value(load_json(text, path), path, variant)
    elif ending in _JSON_LINES:
        lines = enumerate(text.split("\n"), start=1)  # not at U+2028, which JSON leaves as it is
        items = [load_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]
        listed = parse_value(items, path, variant)
    elif variant is not None:
        raise SettingError(f"{path} is a text file, which has no variants; leave out variant '{variant}'")
    elif ending in ("csv", "tsv"):
        listed = parse_table(text, path)
    else:
        refuse_other_notations(text, path)
        listed = parse_lines(text, path)
    return listed.name or stem, path, listed, False


def _read_inline(text: str, variant: str | None) -> tuple[str, str, ClassList, bool]:
    if variant is not None:
        raise SettingError(f"variants belong to shipped vocabularies; leave out variant '{variant}'")
    if "\n" in text:
        return "custom", "the class list", parse_lines(text, "the class list"), False
    if LOOKS_LIKE_JSON.match(text):
        return "custom", "the class list", parse_value(load_json(text, "the class list"), "the class list"), False
    if "," not in text:
        one_class = f"(one class of that name: '{text},')"
        misspelt = get_close_matches(text.partition(":")[0].lower(), shipped_vocabularies(), 1, 0.75)
        if misspelt:
            raise SettingError(f"there is no vocabulary '{text}'; did you mean '{misspelt[0]}'? {one_class}")
        if re.fullmatch(r"\S+\.[A-Za-z][A-Za-z0-9]{1,4}", text):
            raise SettingError(f"there is no vocabulary file {text}; check the path {one_class}")
    return "custom", "the class list", parse_inline(text, "the class list"), False


def _is_path(source: Source, text: str) -> bool:
    if isinstance(source, os.PathLike):
        return True
    if "\n" in text or text[0] in "\"'" or LOOKS_LIKE_JSON.match(text):
        return False
    if text.lower().endswith(_FILE_ENDINGS) or "://" in text:
        return True
    # Unlike `Path.exists` this answers no for a text too long to be a name.
    return "," not in text and ("/" in text or os.path.exists(text))  # noqa: PTH110


def _refuse_duplicates(entries: Sequence[Entry]) -> None:
    names: dict[str, Entry] = {}
    queries: dict[str, Entry] = {}
    for entry in entries:
        earlier = names.setdefault(entry.name.casefold(), entry)
        if earlier is not entry:
            raise SettingError(f"{entry.place}: the class '{entry.name}' is given twice{_also(earlier)}; remove one")
        for query in entry.queries:
            holder = queries.setdefault(query.casefold(), entry)
            if holder is not entry:
                raise SettingError(
                    f"{entry.place}: '{query}' is a query of both '{holder.name}'{_also(holder)} and '{entry.name}'; "
                    "remove it from one of them"
                )
        if len({query.casefold() for query in entry.queries}) < len(entry.queries):
            raise SettingError(f"{entry.place}: the class '{entry.name}' repeats a query; remove the repetition")


def _also(entry: Entry) -> str:
    return f" (also {entry.place.rsplit(', ', 1)[-1]})" if ", " in entry.place else ""


def _find_background(
    background: str | int | None, classes: Sequence[Entry] | Sequence[VocabularyClass], origin: str
) -> int | None:
    if background is None:
        return None
    names = [item.name for item in classes]
    if isinstance(background, str) and background in names:
        return names.index(background)
    if str(background).isdecimal() and int(background) < len(names):
        return int(background)
    raise SettingError(
        f"the background '{background}' is neither a class of {origin} nor an id from 0 to {len(names) - 1}"
        f"{nearest(str(background), names)}"
    )


def _number(entries: Sequence[Entry], background: int | None) -> tuple[VocabularyClass, ...]:
    """Gives ids and, where the file has none, colours: black for the background, the VOC colours for the others."""
    classes = []
    rank = 0
    for index, entry in enumerate(entries):
        rank += index != background
        color = entry.color or ((0, 0, 0) if index == background else voc_color(rank))
        classes.append(VocabularyClass(index, entry.name, entry.queries, color))
    return tuple(classes)


def voc_color(index: int) -> tuple[int, int, int]:
    """Colour `index` of the PASCAL VOC colour map (0 is black), RGB 0..255."""
    channels = [0, 0, 0]
    for bit in range(7, -1, -1):
        for channel in range(3):
            channels[channel] |= (index >> channel & 1) << bit
        index >>= 3
    return channels[0], channels[1], channels[2]


def _load_templates(source: str | os.PathLike[str] | Sequence[str]) -> tuple[str, ...]:
    if isinstance(source, str) and source in template_sets():
        sets = _shipped_templates()
        return tuple(text for part in _COMBINED_SETS.get(source, (source,)) for text in sets[part])
    if isinstance(source, list | tuple):
        origin, templates = "the templates", [str(item) for item in source]
    else:
        path = os.fspath(cast("str | os.PathLike[str]", source))
        if LOOKS_LIKE_JSON.match(path):
            return _check_templates(
                _listed_templates(load_json(path, "the templates"), "the templates"), "the templates"
            )
        if "{}" in path:
            return _check_templates([path], "the templates")
        if not path.lower().endswith(_TEXT_ENDINGS):
            known = template_sets()
            raise SettingError(
                f"there is no template set '{path}', only {', '.join(known)}, or a .txt or .yaml file"
                f"{nearest(path, known)}"
            )
        origin, templates = path, _parse_templates(read_text(path, "template file"), path)
    return _check_templates(templates, origin)


def _parse_templates(text: str, path: str) -> list[str]:
    if path.lower().endswith(".txt"):
        return [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    value = parse_yaml(text, path)
    return _listed_templates(value.get("templates") if isinstance(value, Mapping) else value, path)


def _listed_templates(value: Any, origin: str) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise SettingError(f"{origin} must hold a list of templates such as 'a photo of a {{}}.'")
    return [str(item) for item in value]


def _check_templates(templates: Sequence[str], origin: str) -> tuple[str, ...]:
    if not templates:
        raise SettingError(f"{origin}: there is no template; write at least '{{}}'")
    for template in templates:
        if template.count("{}") != 1:
            raise SettingError(f"{origin}: the template '{template}' must hold '{{}}' exactly once")
    return tuple(templates)


@cache
def _shipped_templates() -> dict[str, tuple[str, ...]]:
    text = (resources.files("ovss_ray.vocabularies") / "templates.yaml").read_text("utf-8")
    sets = parse_yaml(text, "templates.yaml")["sets"]
    return {name: tuple(str(item) for item in value["templates"]) for name, value in sets.items()}
