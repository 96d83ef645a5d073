"""Starting processes as a terminal would."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

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


def run_together(*commands: Sequence[str]) -> list[tuple[int, str]]:
    """Several `ovss-ray` commands at the same moment: the exit code and the standard error of each."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _LATER, *command],
            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
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
