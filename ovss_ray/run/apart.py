"""A call in a process of its own: what it imports and allocates ends with it."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from ovss_ray.errors import OvssError
from ovss_ray.naming import naming, use_naming

P = ParamSpec("P")
T = TypeVar("T")

# Nothing is imported before the path is that of the caller, and Ctrl-C, which both get, ends the child without a word.
_START = """
import sys
sys.path[:] = {path!r}
import signal
signal.signal(signal.SIGINT, signal.SIG_DFL)
from ovss_ray.run.apart import answer
answer()
"""


def call_apart(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a new Python process with the same module path, and wait for what it returns.

    Unlike with `multiprocessing`, the main module is not imported there, so it needs no guard.

    Args:
        function: of a module other than the main one; picklable by its name, as its arguments and result by value.

    Raises:
        OvssError: whatever the function raises of these, passed on.
        RuntimeError: the process ended in another way, which its standard error tells.
    """
    command = [sys.executable, "-c", _START.format(path=sys.path)]
    asked = pickle.dumps((function, args, kwargs, naming()))
    child = subprocess.run(command, input=asked, stdout=subprocess.PIPE, check=False)
    if child.returncode:
        how = signal.strsignal(-child.returncode) if child.returncode < 0 else f"exit code {child.returncode}"
        raise RuntimeError(f"{function.__name__} failed in a process of its own ({how})")
    outcome = pickle.loads(child.stdout)
    if isinstance(outcome, OvssError):
        raise outcome
    result: T = outcome
    return result


def answer() -> None:
    """Do in the new process what `call_apart` asks for on standard input."""
    with os.fdopen(os.dup(1), "wb") as reply:
        os.dup2(2, 1)  # what libraries print must not get into the reply
        function, args, kwargs, named = pickle.load(sys.stdin.buffer)
        use_naming(named)
        try:
            outcome = function(*args, **kwargs)
        except OvssError as error:
            outcome = error
        pickle.dump(outcome, reply)
