"""Processes that the kernel of this machine ends for want of memory. Ray tells such an end from no other."""

from __future__ import annotations

from pathlib import Path

# Those of the container, if it can see its own; else those of the machine.
_COUNTERS = (Path("/sys/fs/cgroup/memory.events"), Path("/proc/vmstat"))


class KernelKills:
    """Tells whether there were any within the last two calls of `look`."""

    def __init__(self) -> None:
        self._before = self._last = _count()

    def look(self) -> None:
        """To be called every few seconds; what happened before the call before is forgotten."""
        self._before, self._last = self._last, _count()

    @property
    def any_lately(self) -> bool:
        """Whether a process was ended so; False where the kernel does not count them."""
        return _count() > self._before


def _count() -> int:
    for path in _COUNTERS:
        try:
            fields = dict(line.split() for line in path.read_text().splitlines())
            return int(fields["oom_kill"])
        except (OSError, ValueError, KeyError):
            continue
    return 0
