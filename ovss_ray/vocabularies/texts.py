"""One text for each class: definitions or synonyms that some methods read beside the queries."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from ovss_ray.errors import SettingError
from ovss_ray.parsing import load_json
from ovss_ray.vocabularies.entries import parse_yaml
from ovss_ray.vocabularies.files import read_text


def load_class_texts(source: str | os.PathLike[str] | Mapping[str, str]) -> dict[str, str]:
    """Loads texts by class name.

    Args:
        source: a mapping class name -> text, or the path or URI of a .yaml or .json file that holds one.

    Returns:
        class name -> text, with runs of white space made one space.

    Raises:
        SettingError: the file cannot be read, is no such mapping, or holds an empty text.
    """
    if isinstance(source, Mapping):
        return _checked(source, "the texts")
    if not isinstance(source, str | os.PathLike):
        raise SettingError(f"must be a mapping 'class name: text' or a file, not a {type(source).__name__}")
    path = os.fspath(source)
    if not path.lower().endswith((".yaml", ".yml", ".json")):
        raise SettingError(f"'{path}' is not the name of a .yaml or .json file of 'class name: text' lines")
    return _checked(_parsed(read_text(path, "file of class texts"), path), path)


def _parsed(text: str, path: str) -> Any:
    if not path.lower().endswith(".json"):
        return parse_yaml(text, path)
    return load_json(text, path)


def _checked(value: Any, origin: str) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise SettingError(f"{origin} must hold 'class name: text' lines")
    texts = {}
    for name, text in value.items():
        if not isinstance(name, str) or not isinstance(text, str):
            raise SettingError(f"{origin}: the text of '{name}' must be a string; put it in quotation marks")
        texts[str(name)] = " ".join(text.split())
        if not texts[str(name)]:
            raise SettingError(f"{origin}: the text of '{name}' is empty; write one or remove the line")
    return texts
