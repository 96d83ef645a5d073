"""`run.json` as those need it who read a run, and why there is none."""

from __future__ import annotations

import json
from typing import Any

import fsspec
from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from ovss_ray.errors import DamagedRunError, OvssError
from ovss_ray.labels.damage import first_line
from ovss_ray.labels.layout import DRIVERS_FOLDER, FORMAT_VERSION, Manifest
from ovss_ray.vocabulary import Vocabulary


class _ReadSettings(BaseModel):
    """The settings of a job that reading uses; a job of another version may lack some and have others."""

    model_config = ConfigDict(strict=True)
    input: str = ""
    max_pixels: int | None = None
    max_bytes: int | None = None
    fetch_attempts: int = 1
    fetch_timeout_s: float = 1.0
    allow_schemes: list[str] | None = None
    allow_hosts: list[str] | None = None
    confidence_map: str = "none"
    components: int | None = None


class RunRecord(BaseModel):
    """What reading needs of `run.json`."""

    model_config = ConfigDict(frozen=True)
    fingerprint: str
    job: dict[str, Any]
    vocabulary: Vocabulary
    warnings: tuple[str, ...] = ()

    @field_validator("job")
    @classmethod
    def _check_job(cls, value: dict[str, Any]) -> dict[str, Any]:
        _ReadSettings.model_validate(value)
        return value

    @field_validator("vocabulary", mode="before")
    @classmethod
    def _read_vocabulary(cls, value: Any) -> Vocabulary:
        return Vocabulary.from_json(json.dumps(value))


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
        reason = _wrong_value(error) if isinstance(error, ValidationError) else first_line(error)
        raise DamagedRunError(f"{uri}/run.json is damaged ({reason}); restore it to read the run") from error


def _wrong_value(error: ValidationError) -> str:
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


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
