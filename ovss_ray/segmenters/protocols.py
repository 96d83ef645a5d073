"""Published protocols: how each method was run on each benchmark, as data, in `protocols.yaml`.

Importing this costs nothing: neither a method nor torch is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from ovss_ray.errors import SettingError, nearest


@dataclass(frozen=True)
class Protocol:
    """How a method was run on a benchmark.

    Attributes:
        name: "method/benchmark", or "method/benchmark:variant".
        method: name of the method.
        benchmark: name of the benchmark, which is that of its vocabulary.
        classes: the vocabulary, as `load_vocabulary` takes it.
        templates: the prompt templates, as `load_vocabulary` takes them.
        settings: settings of the method; those left out have its defaults.
        source: where the values were read, with which model they were used, and what could not be taken over.
    """

    name: str
    method: str
    benchmark: str
    classes: str
    templates: str
    settings: Mapping[str, Any]
    source: str


def protocol_names() -> tuple[str, ...]:
    """The names of all protocols, method by method; imports no method."""
    return tuple(_protocols())


def load_protocol(name: str) -> Protocol:
    """The protocol of this name.

    Args:
        name: one of `protocol_names()`, as "sclip/voc21" or "naclip/voc21:pamr".

    Raises:
        SettingError: there is no such protocol.
    """
    known = _protocols()
    if name in known:
        return deepcopy(known[name])  # what a caller does to the settings stays with the caller
    method, _, benchmark = name.partition("/")
    of_method = [other.partition("/")[2] for other in known if other.partition("/")[0] == method]
    if of_method:
        raise SettingError(
            f"there is no protocol '{name}'; {method} has {', '.join(of_method)}{nearest(benchmark, of_method)}"
        )
    methods = list(dict.fromkeys(protocol.method for protocol in known.values()))
    raise SettingError(
        f"there is no protocol '{name}'; write method/benchmark with one of {', '.join(methods)}"
        f"{nearest(method, methods)}"
    )


@cache
def _protocols() -> dict[str, Protocol]:
    text = (resources.files("ovss_ray.segmenters") / "protocols.yaml").read_text("utf-8")
    return {
        protocol.name: protocol for key, entry in yaml.safe_load(text).items() for protocol in _of_entry(key, entry)
    }


def _of_entry(key: str, entry: Mapping[str, Any]) -> list[Protocol]:
    method, colon, variant = key.partition(":")
    return [
        Protocol(
            name=f"{method}/{benchmark}{colon}{variant}",
            method=method,
            benchmark=benchmark,
            classes=f"{benchmark}:{entry['names']}" if "names" in entry else benchmark,
            templates=entry["templates"],
            settings={**entry["settings"], **settings},
            source=entry["source"],
        )
        for benchmark, settings in entry["benchmarks"].items()
    ]
