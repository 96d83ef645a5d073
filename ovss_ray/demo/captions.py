"""A small grammar that says what is visible in a scene."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Thing:
    """One shape or ground of a scene; `colour` and `size` are words, empty for grounds."""

    name: str
    colour: str = ""
    size: str = ""

    @property
    def is_ground(self) -> bool:
        return not self.colour


_SINGLE = ("{}", "{}.", "a photo of {}", "there is {}", "{} can be seen", "an image of {}", "a picture that shows {}")
_PLACE = ("{} on {}", "{} in front of {}", "{} over {}", "{} lying on {}", "a photo of {} on {}", "there is {} on {}")
_PLURALS = {"cross": "crosses"}
_COUNTS = {2: "two", 3: "three", 4: "four"}


def describe(things: Sequence[Thing], rng: np.random.Generator, *, adjectives: float = 0.3) -> str:
    """One sentence that names every given thing and nothing else.

    Args:
        things: what to name, in any order; at least one.
        rng: picks the wording.
        adjectives: probability that colours and sizes are mentioned.
    """
    detailed = rng.random() < adjectives
    shapes = _noun_phrases([thing for thing in things if not thing.is_ground], detailed)
    grounds = list(dict.fromkeys(thing.name for thing in things if thing.is_ground))
    rng.shuffle(shapes)
    rng.shuffle(grounds)
    if shapes and grounds:
        pattern = _PLACE[rng.integers(len(_PLACE))]
        return pattern.format(_enumerate(shapes), _enumerate(grounds))
    pattern = _SINGLE[rng.integers(len(_SINGLE))]
    return pattern.format(_enumerate(shapes or grounds))


def _noun_phrases(shapes: Sequence[Thing], detailed: bool) -> list[str]:
    if detailed:
        return [
            f"{_article(thing.size or thing.colour)} {thing.size} {thing.colour} {thing.name}".replace("  ", " ")
            for thing in shapes
        ]
    counts: dict[str, int] = {}
    for thing in shapes:
        counts[thing.name] = counts.get(thing.name, 0) + 1
    return [
        f"a {name}" if count == 1 else f"{_COUNTS.get(count, 'many')} {_PLURALS.get(name, name + 's')}"
        for name, count in counts.items()
    ]


def _article(word: str) -> str:
    return "an" if word[0] in "aeiou" else "a"


def _enumerate(phrases: Sequence[str]) -> str:
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + " and " + phrases[-1]
