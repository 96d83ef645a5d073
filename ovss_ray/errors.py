"""The errors that a user can cause or meet, each with the exit code of the command that stops on it."""

from __future__ import annotations


class OvssError(Exception):
    """An error that is explained in one sentence and needs no traceback: what, which file or field, what to do."""

    exit_code = 1


class SettingError(OvssError, ValueError):
    """A setting, vocabulary or job file that cannot be used as it is."""

    exit_code = 2


class InputError(OvssError):
    """The input images cannot be listed or read at all; raised before any work starts."""

    exit_code = 3


class WeightsError(OvssError):
    """Model weights that are missing, or that do not fit the architecture they are loaded into."""

    exit_code = 3


class RunMismatchError(OvssError):
    """A run directory that belongs to other settings than those asked for."""

    exit_code = 4


class RunFailedError(OvssError):
    """A run that stopped before every shard was labelled; the message says why and how to continue."""

    exit_code = 5


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
        reason: what is wrong with the image, one line; stored in the `error` column (200 characters at most).
    """

    def __init__(self, status: str, reason: str) -> None:
        if status not in IMAGE_FAILURES:
            raise ValueError(f"unknown image status {status!r}")
        super().__init__(reason)
        self.status = status
        self.reason = " ".join(reason.split())[:200]
