"""YAML and JSON that people write: plain values only, and one clear sentence for anything else."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import yaml

from ovss_ray.errors import SettingError

MAX_ALIASED_NODES = 100_000
"""How many more values a text may stand for, by its aliases, than it writes down: above, it is meant to fill memory."""

_TAG = "tag:yaml.org,2002:"
_PLAIN_TAGS = {_TAG + kind for kind in ("str", "map", "seq", "null", "bool", "int", "float", "timestamp", "merge")}

YamlLoader = type[yaml.SafeLoader] | type[yaml.BaseLoader]


def load_yaml(text: str, origin: str, loader: YamlLoader = yaml.SafeLoader) -> Any:
    """Parse one YAML document.

    Args:
        text: the document.
        origin: what it is called in the error, e.g. a file name.
        loader: makes values of it; tags are refused before, whatever it would do with them.

    Raises:
        SettingError: it is no YAML, nested too deeply, or has tags, repeated keys, or aliases that multiply.
    """
    try:
        reader = loader(text)
        try:
            node = reader.get_single_node()
            if node is None:
                return None
            _Check().size_of(node)
            return reader.construct_document(node)
        finally:
            reader.dispose()
    except yaml.YAMLError as error:
        raise SettingError(f"{origin} cannot be read as YAML: {_explain(error)}") from None
    except RecursionError:
        raise SettingError(f"{origin} cannot be read as YAML: it is nested too deeply") from None
    except (ValueError, OverflowError) as error:  # a date or a number that has the form of one and is none
        raise SettingError(f"{origin} cannot be read as YAML: {error}") from None


def load_json(text: str, origin: str, *, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Parse a JSON document.

    Args:
        text: the document.
        origin: what it is called in the error, e.g. a file name.
        pairs_hook: makes a value of the pairs of an object, in place of a dictionary.

    Raises:
        SettingError: it is no JSON, is nested too deeply, or repeats a key (unless a hook sees to that).
    """
    try:
        return json.loads(text, object_pairs_hook=pairs_hook or _unique)
    except RecursionError:
        raise SettingError(f"{origin} cannot be read as JSON: it is nested too deeply") from None
    except ValueError as error:
        raise SettingError(f"{origin} cannot be read as JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        repeated = next(key for key, count in Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"'{repeated}' is given twice; remove one")
    return values


class _Check:
    """What a YAML text may not have, found before values are made of it; nodes that aliases share are seen once."""

    def __init__(self) -> None:
        self._sizes: dict[int, int | None] = {}

    def size_of(self, node: yaml.Node) -> int:
        """The nodes that it stands for when every alias is written out."""
        known = self._sizes.get(id(node), 0)
        if known is None:
            raise _refusal(node, "an alias stands for something that contains it")
        if known:
            return known
        if node.tag not in _PLAIN_TAGS:
            raise _refusal(node, f"the tag '{node.tag.replace(_TAG, '!!')}' is not allowed; leave it out")
        self._sizes[id(node)] = None
        size = 1 + sum(map(self.size_of, _children(node)))
        if size - len(self._sizes) > MAX_ALIASED_NODES:
            raise _refusal(node, "its aliases multiply without end; write the values themselves")
        self._sizes[id(node)] = size
        return size


def _children(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        return list(node.value)
    if not isinstance(node, yaml.MappingNode):
        return []
    keys: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode):
            if key.value in keys and key.tag != f"{_TAG}merge":
                raise _refusal(key, f"'{key.value}' is given twice; remove one")
            keys.add(key.value)
    return [part for pair in node.value for part in pair]


def _refusal(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _explain(error: yaml.YAMLError) -> str:
    """What is wrong and in which line and column, without the parser's drawing of it."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return " ".join(str(error).split())
    mark = error.problem_mark
    return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"
