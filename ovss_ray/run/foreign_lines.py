"""Lines that native libraries, child processes and careless code write to standard error, made JSON as all others.

They go through a pipe to a process of its own, which writes each as one JSON line: it outlives the process that it
serves, so that even the last words of a crash arrive.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import TextIO

from ovss_ray.redaction import hidden_values, hide_values

LONGEST = 2**16
LOGGER = "stderr"
LAST_LINES_S = 5.0

_START = """
import sys
sys.path[:] = {path!r}
from ovss_ray.run.foreign_lines import wrap
wrap()
"""


def capture(about: Mapping[str, str]) -> TextIO:
    """From now on wrap what is written to file descriptor 2; for a process that logs JSON there.

    Args:
        about: fields of every line.

    Returns:
        Where lines go that are JSON already.
    """
    sys.stderr.flush()
    reading, writing = os.pipe()
    command = [sys.executable, "-c", _START.format(path=sys.path)]
    # In a session of its own: Ctrl-C is for those who write, and the lines about it are still to come.
    child = subprocess.Popen(command, stdin=reading, stdout=subprocess.DEVNULL, start_new_session=True)
    os.close(reading)
    with os.fdopen(writing, "wb", closefd=False) as pipe:
        pipe.write(json.dumps({"about": dict(about), "hidden": sorted(hidden_values())}).encode() + b"\n")
    real = os.dup(2)
    os.dup2(writing, 2)
    os.close(writing)
    atexit.register(_release, real, child)
    return os.fdopen(real, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


def _release(real: int, child: subprocess.Popen[bytes]) -> None:
    """At the end of this process: wait for the lines before; those of children that live on still come."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    os.dup2(real, 2)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(LAST_LINES_S)


def wrap() -> None:
    """In the process of its own: from standard input to standard error, until nobody is left who could write."""
    from ovss_ray.run.logs import JsonFormatter

    lines = _lines()
    told = json.loads(next(lines, "{}"))
    hide_values(told.get("hidden", ()))
    formatter = JsonFormatter(told.get("about", {}))
    for line in lines:
        record = logging.LogRecord(LOGGER, logging.WARNING, "", 0, "%s", (line,), None)
        os.write(2, formatter.format(record).encode() + b"\n")


def _lines() -> Iterator[str]:
    """Lines that are not empty; the many states of a progress bar on one line are one each."""
    rest = b""
    while block := os.read(0, LONGEST):
        *whole, rest = re.split(rb"[\r\n]+", rest + block)
        if len(rest) >= LONGEST:
            whole, rest = [*whole, rest], b""
        yield from (line.decode(errors="replace") for line in whole if line.strip())
    if rest.strip():
        yield rest.decode(errors="replace")
