"""The errors that a user can cause or meet, each with the exit code of the command that stops on it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pydantic import ValidationError

from ovss_ray.naming import COMMAND_LINE, Naming
from ovss_ray.redaction import HIDDEN, redacted


class OvssError(Exception):
    """An error that is explained in one sentence and needs no traceback: what, which file or field, what to do.

    Args:
        lines: the sentence; where one line is not enough, each further line by itself, so that a line end within a
            name that is quoted cannot begin one.

    Attributes:
        exit_code: of a command that stops on it.
        continue_with: the command that continues what stopped, where there is one.
    """

    exit_code = 1
    continue_with: str | None = None

    def __init__(self, *lines: object) -> None:
        super().__init__(*(redacted(line) if isinstance(line, str) else line for line in lines))

    @property
    def lines(self) -> tuple[str, ...]:
        """What it was made of."""
        return tuple(map(str, self.args))

    def __str__(self) -> str:
        return "\n".join(self.lines)


class SettingError(OvssError, ValueError):
    """A setting, vocabulary or job file that cannot be used as it is."""

    exit_code = 2


class InputError(OvssError):
    """The input images cannot be listed or read at all; raised before any work starts."""

    exit_code = 3


class WeightsError(OvssError):
    """Model weights that are missing, or that do not fit the architecture they are loaded into."""

    exit_code = 3


class MeaninglessLabelsWarning(UserWarning):
    """A model that says nothing of some or all classes: random weights, or the demo's model with one's own classes."""


class RunMismatchError(OvssError):
    """A run directory that belongs to other settings than those asked for."""

    exit_code = 4


class RunFailedError(OvssError):
    """A run that stopped before every shard was labelled; the message says why and how to continue."""

    exit_code = 5


class DamagedRunError(OvssError):
    """A file of a run that cannot be read back, or that is no part of it; the message says which."""

    exit_code = 6


IMAGE_FAILURES = (
    "not_found",
    "forbidden",
    "fetch_failed",
    "corrupt",
    "unsupported",
    "too_large",
    "out_of_memory",
    "timeout",
    "crashed",
)


class ImageError(Exception):
    """One image that cannot be labelled; it becomes a row with this status, never the end of a run.

    Args:
        status: one of `IMAGE_FAILURES`.
        reason: what is wrong with the image, one line; stored in the `error` column without secrets (200 characters
            at most).
    """

    def __init__(self, status: str, reason: str) -> None:
        if status not in IMAGE_FAILURES:
            raise ValueError(f"unknown image status {status!r}")
        super().__init__(reason)
        self.status = status
        self.reason = redacted(" ".join(reason.split()))[:200]


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error sentence: "; did you mean 'x'?" for a likely misspelling, else an empty string."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.6)
    return f"; did you mean {by_lower[close[0]]!r}?" if close else ""


def explain_invalid(
    error: ValidationError, *, source: str, fields: Iterable[str], named: Naming | None = None
) -> SettingError:
    """Turn pydantic's report into one sentence about one error: where, field, value, what is allowed.

    Args:
        error: what validation raised.
        source: origin of the values, e.g. a file name; begins the sentence.
        fields: all valid field names, to suggest the nearest for a misspelt one.
        named: how the user has given them; by default by their names.
    """
    fields, named = list(fields), named or Naming()
    report = error.errors(include_url=False)
    # A misspelt name is reported before the setting that is missing because of it.
    first = next((item for item in report if item["type"] == "extra_forbidden"), report[0])
    if not first["loc"]:  # about several fields together
        return SettingError(f"{source}: {_allowed(first['msg'])}")
    name = str(first["loc"][0])
    if first["type"] == "extra_forbidden":
        hint = nearest(name, fields) or f"; known settings: {', '.join(fields)}"
        if named.is_flag(name) and name in named.others:
            return SettingError(f"{COMMAND_LINE}: {named.name_of(name)}: there is none among the {source}{hint}")
        return SettingError(f"{source}: unknown setting {name!r}{hint}")
    if first["type"] == "missing":
        if named.is_flag(name):
            there = "" if source == COMMAND_LINE else f" (nor does {source} have it)"
            return SettingError(f"{COMMAND_LINE}: {named.name_of(name)} is missing{there}")
        return SettingError(f"{source}: setting {name!r} is missing")
    # A union reports one error per member: what is allowed is any of them. A list without its wrong items is short.
    about = [item for item in report if item["loc"][:1] == first["loc"][:1]]
    alternatives = dict.fromkeys(
        _allowed(item["msg"]) for item in about if item is first or item["type"] != "too_short"
    )
    value = HIDDEN if name == "storage_options" else repr(first["input"])
    value = value if len(value) <= 200 else f"{value[:200]}..."
    allowed = ", or ".join(alternatives)
    if named.is_flag(name):
        return SettingError(f"{COMMAND_LINE}: {named.name_of(name)} {value}: {allowed}")
    return SettingError(f"{source}: {name} = {value}: {allowed}")


def _allowed(message: str) -> str:
    for prefix in ("Value error, ", "Input ", "Tuple ", "String ", "List ", "Dictionary "):
        message = message.removeprefix(prefix)
    message = message.partition(", unable to ")[0].partition(" after validation")[0]
    return message.replace("a valid tuple", "a list")
