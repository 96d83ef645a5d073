"""What messages call a setting: as the user wrote it, which is a flag, a key of a job file or an argument.

The command line says so once; in Python, and for what stands in a job file, settings have the names of their fields.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Naming:
    """How the settings of this process were given.

    Attributes:
        flags: whether they are flags.
        others: names of the command's own, such as "INPUT" for an argument, by field.
        from_file: fields that stand in a job file, and were not replaced by flags.
    """

    flags: bool = False
    others: Mapping[str, str] = field(default_factory=dict)
    from_file: frozenset[str] = frozenset()

    def is_flag(self, name: str) -> bool:
        """Whether the user types it on the command line."""
        return self.flags and name not in self.from_file

    def name_of(self, name: str) -> str:
        """A field as the user writes it."""
        return self.others.get(name, f"--{name.replace('_', '-')}") if self.is_flag(name) else name


_naming = Naming()


def naming() -> Naming:
    """How settings are called in this process."""
    return _naming


def use_naming(chosen: Naming) -> None:
    """Call them so from now on: once, when a command begins, or in a process that works for one."""
    global _naming
    _naming = chosen


def note_file(fields: Iterable[str]) -> None:
    """Remember which fields a job file has."""
    use_naming(replace(_naming, from_file=frozenset(fields)))


def setting_name(name: str) -> str:
    """What a message calls a field of the job: `batch_size`, or `--batch-size` where flags are typed."""
    return _naming.name_of(name)
