"""Log lines of driver and workers, as text or JSON, that say which shard, attempt and image they are about.

What a line is about is set where it is known (`log_context`) and holds for everything that is called from there; pools
made of `ContextThreadPool` carry it into their threads.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from copy import copy
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import partial
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from ovss_ray.printable import printable, printable_lines
from ovss_ray.redaction import redacted
from ovss_ray.run.foreign_lines import capture

if TYPE_CHECKING:
    from ovss_ray.spec import LogFormat

FIELDS = ("run", "worker", "shard", "attempt", "image_id", "uri")
"""What a line may be about; also as `extra` of a single call."""

PACKAGE = "ovss_ray"

_P = ParamSpec("_P")
_T = TypeVar("_T")
_context: ContextVar[Mapping[str, Any]] = ContextVar("log_context", default=MappingProxyType({}))


@dataclass(frozen=True)
class LogSettings:
    """How a process logs.

    Attributes:
        level: of this package's loggers; others log warnings.
        format: of the lines on standard error.
        about: fields that every line of the process has.
    """

    level: int
    format: LogFormat = "text"
    about: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def log_context(**about: str | int) -> Iterator[None]:
    """Say what the lines logged inside are about, by the names in `FIELDS`."""
    token = _context.set({**_context.get(), **about})
    try:
        yield
    finally:
        _context.reset(token)


class ContextThreadPool(ThreadPoolExecutor):
    """A pool whose tasks log in the context in which they were submitted."""

    def submit(self, fn: Callable[_P, _T], /, *args: _P.args, **kwargs: _P.kwargs) -> Future[_T]:
        return super().submit(partial(copy_context().run, fn), *args, **kwargs)


def configure_logging(settings: LogSettings) -> None:
    """Log to standard error; in a process whose root logger has handlers already, those stay and only the level is set.

    Warnings of Python are log lines like any other. As JSON, whatever else is written to standard error is made such
    lines too: the exception that ends the process, messages of native libraries and of child processes.
    """
    is_json = settings.format == "json"
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler(capture(settings.about) if is_json else sys.stderr)
        handler.setFormatter(JsonFormatter(settings.about) if is_json else TextFormatter(settings.about))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger(PACKAGE).setLevel(settings.level)
    logging.captureWarnings(True)
    if settings.level > logging.DEBUG:
        # It logs a traceback for what it raises as well, and what it raises is explained in one line.
        logging.getLogger("gcsfs").setLevel(logging.CRITICAL)
    if is_json:
        sys.excepthook = _log_uncaught
        pass_to_root("ray")


def package_level() -> int:
    """The level at which this package logs in this process."""
    return logging.getLogger(PACKAGE).getEffectiveLevel()


def logs_json() -> bool:
    """Whether this process logs as JSON."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def pass_to_root(name: str) -> None:
    """Let the root logger's handlers write what a library writes by handlers of its own."""
    logger = logging.getLogger(name)
    logger.handlers.clear()
    logger.propagate = True


class TextFormatter(logging.Formatter):
    """Lines for people: time, level, worker, shard and attempt where they are known, message.

    Args:
        about: fields of every line.
    """

    def __init__(self, about: Mapping[str, str] | None = None) -> None:
        super().__init__("%(asctime)s %(levelname)s %(message)s")
        self._about = dict(about or {})

    def format(self, record: logging.LogRecord) -> str:
        """The record as lines that are safe to print; line ends in what it is about are escaped, its own stay."""
        safe = copy(record)
        safe.args = _printable_arguments(record.args)
        return printable_lines(redacted(super().format(safe)))  # tracebacks included

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 (logging's name)
        about = _fields(record, self._about)
        known = [about["worker"]] if "worker" in about else []
        known += [f"{name} {about[name]}" for name in ("shard", "attempt") if name in about]
        where = f" [{', '.join(known)}]" if known else ""
        return f"{record.asctime} {record.levelname}{where} {record.message}"


class JsonFormatter(logging.Formatter):
    """One JSON object a line: `time` (ISO 8601, UTC), `level`, `logger`, `message`, the known `FIELDS`, `exception`.

    Args:
        about: fields of every line.
    """

    def __init__(self, about: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self._about = dict(about or {})

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": redacted(record.getMessage()),
            **_fields(record, self._about),
        }
        if record.exc_info and record.exc_info[0] is not None:
            line["exception"] = redacted(self.formatException(record.exc_info))
        return json.dumps(line, default=str)  # ASCII: standard error may have any encoding


def _printable_arguments(arguments: Any) -> Any:
    if isinstance(arguments, Mapping):
        return {name: _printable_argument(value) for name, value in arguments.items()}
    return tuple(map(_printable_argument, arguments or ()))


def _printable_argument(value: Any) -> Any:
    return value if isinstance(value, int | float) else printable(value)


def _fields(record: logging.LogRecord, about: Mapping[str, str]) -> dict[str, Any]:
    known = {**about, **_context.get(), **vars(record)}
    return {name: redacted(str(known[name])) if name == "uri" else known[name] for name in FIELDS if name in known}


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    logging.getLogger(PACKAGE).critical("%s: %s", kind.__name__, error, exc_info=(kind, error, traceback))
