"""Glob patterns over local paths and object keys alike: `*`, `?`, `[abc]`, `{jpg,png}` and `**`."""

from __future__ import annotations

import re

_MAGIC = re.compile(r"[*?\[]|\{[^{}]*,[^{}]*\}")


def has_magic(path: str) -> bool:
    """Whether a path is a pattern and not a plain name."""
    return _MAGIC.search(path) is not None


class GlobPattern:
    """A pattern split into the folder that is certain and the part that has to be matched.

    `*` and `?` stay within one folder name, `**` crosses folders: `photos/**/*.jpg` also finds `photos/a.jpg`.

    Attributes:
        base: the longest folder without wildcards, without a trailing slash ("" if there is none).
        literal: everything before the first wildcard; what an object store can be asked for as a prefix.
    """

    def __init__(self, pattern: str) -> None:
        match = _MAGIC.search(pattern)
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
        elif rest[0] == "{" and _MAGIC.match(rest):
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
