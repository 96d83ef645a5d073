"""What the commands print, and where: results on standard output, all else on standard error.

Everything goes through a `SafeConsole`: names of files, classes and hosts are data, whatever they hold.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from ovss_ray.printable import printable, printable_lines
from ovss_ray.redaction import redacted
from ovss_ray.run.logs import LogSettings, configure_logging, logs_json
from ovss_ray.spec import JobSpec

if TYPE_CHECKING:
    from ovss_ray.run.progress import Reporter

log = logging.getLogger(__name__)


class SafeConsole(Console):
    """A console that takes no text for markup, and prints no control character but those of its own styles.

    Line ends stay, so a name is put into a cell of a table by `printable`; `say` and `complain` see to it themselves.
    Cells are made safe before they are measured, so that columns stay in line.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **how: Any) -> Text:
        """A string as it is, but for secrets: markup asked for by a caller is not interpreted either."""
        return super().render_str(printable_lines(redacted(text)), **{**how, "markup": False, "emoji": False})

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """What is printed in the end, also of texts that were not made from strings by this console."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable_lines(segment.text), segment.style)


out = SafeConsole()
err = SafeConsole(stderr=True)


def say(*lines: str) -> None:
    """Print lines as they are, but for secrets; a line end within one belongs to a name, and is escaped.

    In a process that logs JSON they are log lines.
    """
    for line in lines:
        if logs_json():
            log.info("%s", line)
        else:
            out.print(printable(line), soft_wrap=True)


def say_json(record: Any) -> None:
    """Print a record as JSON, in ASCII: valid whatever its names hold and whatever the encoding of the terminal.

    It takes one line in a process that logs JSON.
    """
    out.print(json.dumps(record, indent=None if logs_json() else 1), soft_wrap=True)


def complain(*lines: str) -> None:
    """Print lines on standard error; as `say`."""
    for line in lines:
        err.print(printable(line), soft_wrap=True)


def prepare_streams() -> None:
    """Let no name end the process: what the encoding of a stream lacks is escaped, in tracebacks too."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    sys.excepthook = _print_uncaught


def _print_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    err.print("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), soft_wrap=True)


def reporter_for(spec: JobSpec, verbose: int) -> Reporter:
    """How a job shows its progress: a bar on a terminal, else log lines; sets the logging up."""
    from ovss_ray.run.progress import LogReporter, TerminalReporter

    bar = err.is_terminal and spec.log_format == "text"
    configure_logging(LogSettings(log_level(verbose, quiet=bar), spec.log_format, {"run": spec.run_name}))
    return TerminalReporter(err) if bar else LogReporter()


def log_level(verbose: int, *, quiet: bool) -> int:
    """The level that `-v`, given so many times, asks for; quiet where a bar shows what happens."""
    if verbose > 1:
        return logging.DEBUG
    return logging.INFO if verbose or not quiet else logging.WARNING


@contextmanager
def watching(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on a terminal, else a log line every half a minute."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    last = time.monotonic()

    def watch(done: int, total: int) -> None:
        nonlocal last
        bar.update(task, completed=done, total=total)
        if not err.is_terminal and time.monotonic() - last > 30:
            last = time.monotonic()
            complain(f"{what}: {done:,} of {total:,}")

    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield watch
