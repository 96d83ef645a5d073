"""Whether a place can become a run directory: nothing of somebody else's may lie there."""

from __future__ import annotations

from pathlib import Path

from ovss_ray.errors import SettingError
from ovss_ray.images.splits import parse_split
from ovss_ray.images.stores import is_local, local_path
from ovss_ray.labels.layout import DRIVERS_FOLDER, MANIFEST_FOLDER, RUN_FILE, SHARDS_FOLDER
from ovss_ray.run.directory import RunDirectory
from ovss_ray.spec import JobSpec

_LEFT_BY_PLANNING = {MANIFEST_FOLDER, SHARDS_FOLDER, DRIVERS_FOLDER}
_OF_THE_SYSTEM = {"lost+found", "Thumbs.db", "desktop.ini", "$RECYCLE.BIN", "System Volume Information"}
_NAMED = 3


def check_place(spec: JobSpec) -> None:
    """Make sure that the job's run directory is a run, or a place for a new one: absent, empty, or left by a planning.

    One listing. Hidden files, and those that systems put everywhere, do not count.

    Raises:
        SettingError: other files are there, or it is the folder of the images.
        InputError, StoreUnavailableError: the place cannot be listed.
    """
    place = local_path(spec.run) if is_local(spec.run) else spec.run
    if is_local(place) and Path(place).is_file():
        raise SettingError(f"the run directory {place} is a file; name a folder for the run")
    directory = RunDirectory(place, spec.storage_options)
    found = directory.entries()
    if RUN_FILE in found:
        return
    if _is_same(spec.input, place):
        raise SettingError(
            f"{place} is the folder of the images and would be the run directory, too; name another folder for the run"
        )
    foreign = [name for name in found if not _may_be_there(name)]
    if foreign:
        more = len(foreign) - _NAMED
        named = ", ".join(foreign[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")
        raise SettingError(
            f"{directory.uri} is not empty and holds no run ({named}); name a new or an empty folder for the run"
        )


def _may_be_there(name: str) -> bool:
    return name.startswith(".") or name in _LEFT_BY_PLANNING or name in _OF_THE_SYSTEM


def _is_same(source: str, run: str) -> bool:
    split = parse_split(source)
    if split is not None or is_local(source) != is_local(run):
        return False
    if not is_local(source):
        return source.rstrip("/") == run.rstrip("/")
    return Path(local_path(source)).resolve() == Path(run).resolve()
