"""Glob patterns over local paths and object keys alike: `*`, `?`, `[abc]`, `{jpg,png}`, `{000..499}` and `**`."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from ovss_ray.errors import SettingError

_RANGE = re.compile(r"\{(\d+)\.\.(\d+)(?:\.\.(\d+))?\}")
_BRACES = re.compile(rf"{_RANGE.pattern}|\{{([^{{}}]*,[^{{}}]*)\}}")
_WILDCARD = re.compile(r"[*?\[]")
_MAGIC = re.compile(rf"{_WILDCARD.pattern}|{_BRACES.pattern}")

# A range beside wildcards becomes one alternative per number of a regular expression.
_LARGEST_RANGE_IN_A_PATTERN = 10_000


def has_magic(path: str) -> bool:
    """Whether a path is a pattern and not a plain name."""
    return _MAGIC.search(path) is not None


def is_enumeration(path: str) -> bool:
    """Whether a path holds a range of numbers and no wildcard, so that it names certain files: `{000..499}.tar`."""
    return _RANGE.search(path) is not None and _WILDCARD.search(path) is None


def expand_braces(path: str) -> Iterator[str]:
    """The names that an enumeration stands for, in its order: `{00..02}.tar` is `00.tar`, `01.tar`, `02.tar`.

    As in a shell and in WebDataset: numbers are padded to the width of the padded end, `{8..0..2}` counts down by two,
    several braces give every combination.
    """
    pieces: list[Iterable[str]] = []
    position = 0
    for brace in _BRACES.finditer(path):
        pieces += [(path[position : brace.start()],), _alternatives(brace)]
        position = brace.end()
    pieces.append((path[position:],))
    return map("".join, itertools.product(*pieces))


def _alternatives(brace: re.Match[str]) -> list[str]:
    first, last, step, names = brace.groups()
    return str(names).split(",") if names is not None else _numbers(first, last, step)


def _numbers(first: str, last: str, step: str | None) -> list[str]:
    width = max((len(end) for end in (first, last) if end.startswith("0")), default=1)
    stride = max(int(step or 1), 1)
    down = int(last) < int(first)
    numbers = range(int(first), int(last) + (-1 if down else 1), -stride if down else stride)
    return [f"{number:0{width}d}" for number in numbers]


class GlobPattern:
    """A pattern split into the folder that is certain and the part that has to be matched.

    `*` and `?` stay within one folder name, `**` crosses folders: `photos/**/*.jpg` also finds `photos/a.jpg`.
    `{000..499}` stands for each of these numbers.

    Attributes:
        pattern: the whole pattern.
        base: the longest folder without wildcards, without a trailing slash ("" if there is none).
        literal: everything before the first wildcard; what an object store can be asked for as a prefix.
    """

    def __init__(self, pattern: str) -> None:
        match = _MAGIC.search(pattern)
        self.pattern = pattern
        self.literal = pattern[: match.start()] if match else pattern
        folder, slash, _ = self.literal.rpartition("/")
        self.base = folder or slash
        rest = pattern[len(folder) + len(slash) :]
        self._whole = re.compile(_translate(rest), re.DOTALL)
        crosses = re.search(r"\{[^{}]*/[^{}]*\}", rest)
        names = ["**"] if crosses else rest.split("/")
        self._names = [None if "**" in name else re.compile(_translate(name), re.DOTALL) for name in names]
        self.wants_hidden = any(name.startswith(".") for name in rest.split("/"))

    def matches(self, relative: str) -> bool:
        """Whether a file, given relative to `base`, is meant by the pattern."""
        return self._whole.fullmatch(relative) is not None

    def may_contain(self, relative: str) -> bool:
        """Whether a folder, given relative to `base`, can hold files that match; spares walks that cannot."""
        for depth, name in enumerate(relative.split("/")):
            if depth >= len(self._names):
                return False
            expected = self._names[depth]
            if expected is None:
                return True
            if expected.fullmatch(name) is None:
                return False
        return relative.count("/") + 1 < len(self._names)


def _translate(pattern: str) -> str:
    expression, position, depth = "", 0, 0
    while position < len(pattern):
        rest = pattern[position:]
        length = 1
        if rest.startswith("**/") and (position == 0 or pattern[position - 1] == "/"):
            piece, length = "(?:[^/]+/)*", 3
        elif rest.startswith("**"):
            piece, length = ".*", 2
        elif rest[0] == "*":
            piece = "[^/]*"
        elif rest[0] == "?":
            piece = "[^/]"
        elif rest[0] == "[" and "]" in rest[2:]:
            length = rest.index("]", 2) + 1
            members = rest[1 : length - 1].replace("\\", "\\\\").replace("[", "\\[")
            piece = f"[^/{members[1:]}]" if members[0] in "!^" else f"[{members}]"
        elif rest[0] == "{" and (numbers := _RANGE.match(rest)):
            piece, length = f"(?:{'|'.join(_few(numbers))})", numbers.end()
        elif rest[0] == "{" and _BRACES.match(rest):
            piece, depth = "(?:", depth + 1
        elif rest[0] == "}" and depth:
            piece, depth = ")", depth - 1
        elif rest[0] == "," and depth:
            piece = "|"
        else:
            piece = re.escape(rest[0])
        expression += piece
        position += length
    return expression


def _few(numbers: re.Match[str]) -> list[str]:
    first, last, step = numbers.groups()
    if abs(int(last) - int(first)) > _LARGEST_RANGE_IN_A_PATTERN:
        raise SettingError(
            f"the range {numbers[0]} is too long beside wildcards; replace the wildcards by names, or the range by *"
        )
    return _numbers(first, last, step)
