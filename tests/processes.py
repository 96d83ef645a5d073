"""Starting processes as a terminal would."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_COMMAND_S = 240.0

# Waits until it is told to begin, so that several begin together.
_LATER = """
import sys, ovss_ray.run.driver, torch
print('ready', flush=True)
sys.stdin.readline()
from ovss_ray.cli import main
main()
"""


def heed_interrupts() -> None:
    """For `preexec_fn`: what a shell starts in the background ignores Ctrl-C, and so would all that it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def kill_tree(root: int) -> None:
    """SIGKILL a process and all its descendants, Ray's included, whatever session they have moved to."""
    doomed = [root]
    for pid in doomed:
        for task in Path(f"/proc/{pid}/task").glob("*/children"):
            doomed += [int(child) for child in task.read_text().split()]
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def ovss_ray(
    *arguments: str, env: Mapping[str, str] | None = None, cwd: str | os.PathLike[str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, in a process of its own that is forked from one with all imports behind it.

    For what happens before or by imports, and for processes that get signals, start the interpreter itself.

    Args:
        arguments: of the command, without its name.
        env: all environment variables; by default those of this process.
        cwd: working directory; by default that of this process.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.preloaded"])
    with tempfile.TemporaryDirectory() as folder:
        outputs = [str(Path(folder, name)) for name in ("out", "err")]
        variables = dict(os.environ if env is None else env)
        process = context.Process(target=_run_command, args=(arguments, variables, str(cwd or Path.cwd()), outputs))
        process.start()
        process.join(_COMMAND_S)
        if process.exitcode is None:
            kill_tree(process.pid or 0)
            raise subprocess.TimeoutExpired(["ovss-ray", *arguments], _COMMAND_S)
        encoding = variables.get("PYTHONIOENCODING", "utf-8")
        said = [Path(output).read_bytes().decode(encoding).replace("\r\n", "\n") for output in outputs]
    return subprocess.CompletedProcess(["ovss-ray", *arguments], process.exitcode, *said)


def _run_command(arguments: Sequence[str], env: dict[str, str], cwd: str, outputs: Sequence[str]) -> None:
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    for number, output in enumerate(outputs, 1):
        file = os.open(output, os.O_WRONLY | os.O_CREAT)
        os.dup2(file, number)
        os.close(file)
    # As the interpreter makes them: standard error escapes what its encoding has not.
    sys.stdout = open(1, "w", encoding=encoding, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding=encoding, errors="backslashreplace", closefd=False)  # noqa: SIM115
    sys.argv = ["ovss-ray", *arguments]
    from ovss_ray.cli import main

    try:
        main()
    finally:
        atexit._run_exitfuncs()  # which processes of multiprocessing leave out


def run_together(*commands: Sequence[str]) -> list[tuple[int, str]]:
    """Several `ovss-ray` commands at the same moment: the exit code and the standard error of each."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _LATER, *command],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for command in commands
    ]  # fmt: skip
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    outcomes = []
    for process in processes:
        _, messages = process.communicate(timeout=200)
        outcomes.append((process.returncode, messages))
    return outcomes
