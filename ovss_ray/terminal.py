"""What the commands print, and where: results on standard output, all else on standard error."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ovss_ray.redaction import redacted
from ovss_ray.run.logs import LogSettings, configure_logging
from ovss_ray.spec import JobSpec

if TYPE_CHECKING:
    from ovss_ray.run.progress import Reporter

out = Console()
err = Console(stderr=True)


def say(text: str) -> None:
    """Print text as it is, but for secrets."""
    out.print(redacted(text), markup=False, highlight=False, soft_wrap=True)


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
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    last = time.monotonic()

    def watch(done: int, total: int) -> None:
        nonlocal last
        bar.update(task, completed=done, total=total)
        if not err.is_terminal and time.monotonic() - last > 30:
            last = time.monotonic()
            err.print(f"{what}: {done:,} of {total:,}", highlight=False)

    with Progress(*columns, console=err, disable=not err.is_terminal, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield watch
