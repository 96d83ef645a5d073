"""`run.json` as those need it who read a run, and why there is none."""

from __future__ import annotations

import json
from typing import Any

import fsspec
from pydantic import BaseModel, ConfigDict

from ovss_ray.errors import DamagedRunError, OvssError
from ovss_ray.labels.layout import DRIVERS_FOLDER, FORMAT_VERSION, Manifest


class RunRecord(BaseModel):
    """What reading needs of `run.json`."""

    model_config = ConfigDict(frozen=True)
    fingerprint: str
    job: dict[str, Any]
    vocabulary: dict[str, Any]
    warnings: tuple[str, ...] = ()


def parse_record(stored: bytes, uri: str) -> tuple[RunRecord, Manifest]:
    """The record, and the manifest as it was planned.

    Raises:
        DamagedRunError: it is not what a run writes.
        OvssError: a newer version of the package wrote it.
    """
    try:
        content = json.loads(stored)
        version = int(content["format_version"])
        if version > FORMAT_VERSION:
            raise OvssError(
                f"{uri} has run format {version} and this ovss-ray reads {FORMAT_VERSION}; upgrade ovss-ray to read it"
            )
        return RunRecord.model_validate(content), Manifest.from_json(content["manifest"])
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).partition("\n")[0] or repr(error)
        raise DamagedRunError(f"{uri}/run.json is damaged ({reason}); restore it to read the run") from error


def explain_missing(fs: fsspec.AbstractFileSystem, root: str, uri: str) -> str:
    """Why `uri` is not a run directory, and which place nearby is meant if any."""
    parent = root.rsplit("/", 1)[0]
    if fs.exists(f"{parent}/run.json"):
        return f"{uri} lies inside a run directory; open {uri.rsplit('/', 1)[0]}"
    if not fs.exists(root):
        return f"there is no run directory {uri}; check the path"
    entries = sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in fs.ls(root, detail=False))
    if "manifest" in entries or DRIVERS_FOLDER in entries:
        return f"{uri} has no run.json: its planning was not finished; give the command that started it again"
    runs = [entry for entry in entries[:100] if fs.exists(f"{root}/{entry}/run.json")]
    if runs:
        return f"{uri} is not a run directory but holds some; open {' or '.join(f'{uri}/{run}' for run in runs[:3])}"
    return f"{uri} is not a run directory: it has no run.json"
