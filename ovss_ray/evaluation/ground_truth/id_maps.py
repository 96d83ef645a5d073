"""What the values in the label files of a data set of one's own mean: numbers or colours to classes."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ovss_ray.errors import SettingError, nearest
from ovss_ray.evaluation.ground_truth.pixels import show_colour
from ovss_ray.parsing import load_json
from ovss_ray.vocabularies.entries import parse_yaml
from ovss_ray.vocabularies.files import read_text
from ovss_ray.vocabulary import Vocabulary

IdMapSource = Mapping[Any, Any] | str | os.PathLike[str]

_IGNORE = "ignore"
_COLOUR = re.compile(r"\(?\s*(\d{1,3})\s*,\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)?|#([0-9a-fA-F]{6})")
_NUMBERS = ("value", "id")
_NAMES = ("class", "name")
_CHANNELS = (("r", "red"), ("g", "green"), ("b", "blue"))


@dataclass(frozen=True)
class IdMap:
    """Value -> class id or ignore index; colours are numbers, red * 65536 + green * 256 + blue."""

    ids: Mapping[int, int]
    of_colours: bool


def load_id_map(source: IdMapSource, vocabulary: Vocabulary) -> IdMap:
    """Load an id map.

    Args:
        source: a mapping, or the path or URI of a .yaml, .json or .csv file that holds one. Its keys are numbers, or
            colours ("128,64,128", "#804080", a tuple); its values class ids, class names, or "ignore". A CSV file has a
            line of headings: `value,class`, or `r,g,b,class` in any order (`red`, `id`, `name` ... will do).
        vocabulary: the classes.

    Raises:
        SettingError: the file cannot be read, a key is neither number nor colour or is there twice, numbers and
            colours are mixed, or a value names no class.
    """
    if isinstance(source, Mapping):
        origin, pairs = "the id map", list(source.items())
    else:
        origin = os.fspath(source)
        pairs = _read_pairs(origin)
    if not pairs:
        raise SettingError(f"{origin} is empty; write lines such as '7: road' or '128,64,128: road'")
    ids: dict[int, int] = {}
    kinds = set()
    for key, value in pairs:
        number, is_colour = _parse_key(key, origin)
        if number in ids and is_colour in kinds:
            raise SettingError(f"{origin}: {show_colour(number) if is_colour else number} is given twice; remove one")
        kinds.add(is_colour)
        ids[number] = _parse_class(value, vocabulary, origin)
    if len(kinds) > 1:
        raise SettingError(f"{origin} mixes numbers and colours; an image has either")
    return IdMap(ids, of_colours=kinds.pop())


def _read_pairs(path: str) -> list[tuple[Any, Any]]:
    ending = path.lower().rpartition(".")[2]
    if ending not in ("yaml", "yml", "json", "csv"):
        raise SettingError(f"the id map {path} is not the name of a .yaml, .json or .csv file")
    text = read_text(path, "id map")
    if ending == "csv":
        return list(_rows(text, path))
    if ending == "json":
        pairs = load_json(text, path, pairs_hook=list)
        if isinstance(pairs, list) and all(isinstance(pair, tuple) for pair in pairs):
            return pairs
    else:
        value = parse_yaml(text, path)
        if isinstance(value, Mapping):
            return list(value.items())
    raise SettingError(f"{path} must hold lines such as '7: road' or '128,64,128: road'")


def _rows(text: str, path: str) -> Iterable[tuple[Any, Any]]:
    reader = csv.DictReader(io.StringIO(text), skipinitialspace=True)
    columns = {(column or "").strip().lower(): column for column in reader.fieldnames or ()}
    named = _column(columns, _NAMES)
    number = _column(columns, _NUMBERS)
    channels = [_column(columns, names) for names in _CHANNELS]
    if named is None or (number is None and None in channels):
        raise SettingError(f"{path} must begin with a line of headings: 'value,class', or 'r,g,b,class'")
    for row in reader:
        key = row[number] if number is not None else ",".join(str(row[channel]) for channel in channels)
        yield key, row[named]


def _column(columns: Mapping[str, str], names: Sequence[str]) -> str | None:
    return next((columns[name] for name in names if name in columns), None)


def _parse_key(key: Any, origin: str) -> tuple[int, bool]:
    """The number of a key, and whether it is a colour."""
    text = str(key).strip()
    if re.fullmatch(r"\d{1,5}", text) and int(text) <= 65535:
        return int(text), False
    colour = _COLOUR.fullmatch(text)
    if colour is None:
        raise SettingError(f"{origin}: '{text}' is neither a number from 0 to 65535 nor a colour such as '128,64,128'")
    if colour[4] is not None:
        return int(colour[4], 16), True
    red, green, blue = (int(channel) for channel in colour.groups()[:3])
    if max(red, green, blue) > 255:
        raise SettingError(f"{origin}: the colour '{text}' has a part over 255")
    return red << 16 | green << 8 | blue, True


def _parse_class(value: Any, vocabulary: Vocabulary, origin: str) -> int:
    text = "" if value is None else " ".join(str(value).split())
    if text in vocabulary.names:
        return vocabulary.names.index(text)
    if text == _IGNORE:
        return vocabulary.ignore_index
    if text.isdecimal() and int(text) < vocabulary.num_classes:
        return int(text)
    raise SettingError(
        f"{origin}: '{text}' is neither one of the classes of {vocabulary.name}, nor an id from 0 to "
        f"{vocabulary.num_classes - 1}, nor 'ignore'{nearest(text, vocabulary.names)}"
    )
