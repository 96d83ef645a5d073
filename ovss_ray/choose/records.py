"""The folder of a choice: what it is about, its sample, and one file for each candidate; each created once.

OUT/
  choice.json                 what the rewards depend on beside the candidates
  images.parquet              the sample, and the classes of every image
  candidates/KEY.parquet      verdicts of one candidate; it is done if and only if the file exists
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ovss_ray.choose.assessing import Assessment, SampledImage, Verdict
from ovss_ray.choose.candidates import SettledCandidate
from ovss_ray.errors import DamagedRunError, InputError, RunMismatchError
from ovss_ray.images.stores import StorageOptions
from ovss_ray.labels.layout import RUN_FILE
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.manifest import ManifestRow

_CHOICE, _IMAGES = "choice.json", "images.parquet"
_LONGEST_VALUE = 80

_IMAGES_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("uri", pa.string()),
        ("size_bytes", pa.int64()),
        ("offset", pa.int64()),
        ("classes", pa.list_(pa.int32())),
        ("error", pa.string()),
    ]
)
_VERDICTS_SCHEMA = pa.schema(
    [("image_id", pa.int64()), ("status", pa.string()), ("error", pa.string()), ("accepted", pa.list_(pa.bool_()))]
)


class ChoiceFolder:
    """Reads and creates the files of one choice.

    Args:
        uri: a folder on a disk or in an object store; made if it is not there.
        storage_options: as for runs.

    Raises:
        InputError: it cannot be made.
    """

    def __init__(self, uri: str, storage_options: StorageOptions) -> None:
        self._directory = RunDirectory(uri, storage_options)
        self.uri = self._directory.uri
        if self._directory.is_local:
            try:
                Path(self._directory.root).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise InputError(f"the folder {uri} cannot be made: {error.strerror}; give another --out") from error
        self.sweep()

    def sweep(self) -> None:
        """Remove temporary files, such as those of processes that were killed."""
        self._directory.sweep()

    def claim(self, identity: Mapping[str, Any]) -> None:
        """Make the folder that of this choice, or find that it is.

        Args:
            identity: all that rewards depend on beside the candidates; JSON-ready.

        Raises:
            RunMismatchError: it belongs to another choice, or to a run; says what differs.
        """
        if self._directory.exists(RUN_FILE):
            raise RunMismatchError(f"{self.uri} is the directory of a run; give another --out")
        wanted = json.loads(json.dumps(identity))
        self._directory.create(_CHOICE, json.dumps(wanted, indent=1, ensure_ascii=False).encode())
        there = self._directory.read_json(_CHOICE) or {}
        names = [name for name in {**there, **wanted} if there.get(name) != wanted.get(name)]
        if names:
            raise RunMismatchError(
                f"{self.uri} holds another choice, and rewards of both cannot be compared:",
                *(f"  {name}: there {_short(there.get(name))}, now {_short(wanted.get(name))}" for name in names),
                "Give the same settings, or another --out.",
            )

    def read_sample(self) -> list[SampledImage] | None:
        """The sample, or None if it is not there yet."""
        table = self._read(_IMAGES)
        if table is None:
            return None
        return [
            SampledImage(
                ManifestRow(row["image_id"], row["uri"], row["size_bytes"], row["offset"]),
                tuple(row["classes"]),
                row["error"],
            )
            for row in table.to_pylist()
        ]

    def write_sample(self, sample: Sequence[SampledImage]) -> list[SampledImage]:
        """Keep the sample; returns what is kept, which is that of another process if it was faster."""
        rows = [{**asdict(image.row), "classes": list(image.classes), "error": image.error} for image in sample]
        for row in rows:
            del row["extra"]
        self._directory.create(_IMAGES, _encode(pa.Table.from_pylist(rows, _IMAGES_SCHEMA)))
        return self.read_sample() or []

    def read_assessment(self, candidate: SettledCandidate) -> Assessment | None:
        """What was found of a candidate; None if it was not assessed yet."""
        table = self._read(_file_of(candidate))
        if table is None:
            return None
        verdicts = [
            Verdict(row["image_id"], row["status"], row["error"], tuple(row["accepted"])) for row in table.to_pylist()
        ]
        facts = table.schema.metadata
        return Assessment(tuple(verdicts), float(facts[b"seconds"]), facts[b"device"].decode())

    def write_assessment(self, candidate: SettledCandidate, assessment: Assessment) -> None:
        """Keep what was found of a candidate, unless it is there."""
        facts = {
            "method": candidate.candidate.method,
            "settings": json.dumps(dict(candidate.settings)),
            "seconds": repr(assessment.seconds),
            "device": assessment.device,
        }
        rows = [{**asdict(verdict), "accepted": list(verdict.accepted)} for verdict in assessment.verdicts]
        table = pa.Table.from_pylist(rows, _VERDICTS_SCHEMA.with_metadata(facts))
        self._directory.create(_file_of(candidate), _encode(table))

    def _read(self, name: str) -> pa.Table | None:
        data = self._directory.read(name)
        if data is None:
            return None
        try:
            return pq.read_table(io.BytesIO(data))
        except pa.ArrowException as error:
            raise DamagedRunError(f"{self.uri}/{name} is damaged ({error}); remove it, and it is made again") from None


def _file_of(candidate: SettledCandidate) -> str:
    return f"candidates/{candidate.key}.parquet"


def _encode(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
