"""The candidates: methods with their settings, as they are written and as a random search draws them."""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Any

from ovss_ray.errors import SettingError
from ovss_ray.parsing import load_yaml

_BETWEEN = re.compile(r",(?![^\[{]*[\]}])")  # a comma that stands in no [list] and no {mapping}
_DRAWS_PER_CANDIDATE = 50


@dataclass(frozen=True)
class Candidate:
    """A method and those of its settings that are not its defaults; both JSON-ready.

    >>> Candidate("naclip", {"sigma": 3.0, "crop": None}).name
    'naclip:sigma=3.0:crop=null'
    """

    method: str
    settings: Mapping[str, Any]

    @property
    def name(self) -> str:
        """As it may be written on the command line."""
        return ":".join([self.method, *(f"{name}={setting_text(value)}" for name, value in self.settings.items())])


@dataclass(frozen=True)
class SettledCandidate:
    """A candidate that was found to fit its model and the classes.

    Attributes:
        candidate: what it is called.
        settings: all of its settings.
        key: names it among others; equal for candidates that give equal labels.
    """

    candidate: Candidate
    settings: Mapping[str, Any]
    key: str

    @classmethod
    def of(
        cls, candidate: Candidate, settings: Mapping[str, Any], label_settings: Mapping[str, Any]
    ) -> SettledCandidate:
        """From all settings, and from those that change labels."""
        text = json.dumps([candidate.method, dict(label_settings)], sort_keys=True)
        method = re.sub(r"\W+", "_", candidate.method)
        return cls(candidate, settings, f"{method}-{hashlib.sha256(text.encode()).hexdigest()[:12]}")


def parse_candidates(texts: Sequence[str]) -> list[Candidate]:
    """Read what `--methods` says: "sclip,naclip:sigma=3:crop=0", once or several times.

    Raises:
        SettingError: nothing is there, or a part is neither a method nor name=value.
    """
    written = [part.strip() for text in texts for part in _BETWEEN.split(text)]
    candidates = [_parse(part) for part in written if part]
    if not candidates:
        raise SettingError("--methods names no method; write for example sclip,naclip,naclip:sigma=3")
    return candidates


def _parse(text: str) -> Candidate:
    first, *settings = re.split(r":(?=\w+=)", text)  # a method of one's own has a colon too: module:Class
    if not first or "=" in first:
        raise SettingError(f"--methods: {text!r} is not of the form method or method:setting=value")
    pairs = (pair.partition("=") for pair in settings)
    return Candidate(first, {name: load_yaml(value, f"--methods: the value of {name}") for name, _, value in pairs})


def draw_candidates(
    bases: Sequence[Candidate], grids: Mapping[str, Mapping[str, tuple[Any, ...]]], count: int, seed: int
) -> list[Candidate]:
    """Random search: candidates that differ from those written in the settings their methods declare.

    The bases take turns; what a base sets itself stays. Equal arguments draw equal candidates, and a larger `count`
    draws the same and more. Fewer than `count` come if the values allow no more.

    Args:
        bases: as written.
        grids: by method, the values of each setting to draw from (`SegmenterSettings.SEARCH`).
        count: how many to draw.
        seed: of the draws.

    Raises:
        SettingError: no method of the bases declares anything to search.
    """
    searchable = [base for base in bases if grids.get(base.method)]
    if not searchable:
        names = ", ".join(sorted({base.method for base in bases}))
        raise SettingError(f"--search: {names} declare no settings to search; leave it out, or name other methods")
    chance = random.Random(seed)
    drawn: dict[str, Candidate] = {}
    for base in islice(cycle(searchable), count * _DRAWS_PER_CANDIDATE):
        values = {name: chance.choice(grid) for name, grid in grids[base.method].items()}
        candidate = Candidate(base.method, {**values, **base.settings})
        drawn.setdefault(candidate.name, candidate)
        if len(drawn) == count:
            break
    return list(drawn.values())


def setting_text(value: Any) -> str:
    """A value as `--set name=value` reads it back."""
    return value if isinstance(value, str) and _reads_back(value) else json.dumps(value)


def _reads_back(text: str) -> bool:
    try:
        return bool(load_yaml(text, "the value") == text)
    except SettingError:
        return False
