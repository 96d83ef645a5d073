"""The tables of an evaluation in the run directory: one file per shard, which is done if the file exists."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa

from ovss_ray.errors import DamagedRunError, InputError
from ovss_ray.evaluation.boundary import DILATION_RATIO
from ovss_ray.evaluation.ground_truth.truth import GroundTruth
from ovss_ray.evaluation.table import decode_table
from ovss_ray.labels.layout import EVALUATION_FOLDER
from ovss_ray.run.directory import RunDirectory

SCORING_VERSION = 1
"""Changes whenever the same labels and ground truth give other tables."""

_READS_AT_ONCE = 8


def identity_of(truth: GroundTruth, fingerprint: str, *, with_boundary: bool) -> dict[str, Any]:
    """Everything that decides what the tables hold, ready for JSON."""
    return {
        "ground_truth": truth.identity(),
        "run": fingerprint,
        "boundary": DILATION_RATIO if with_boundary else None,
        "scoring_version": SCORING_VERSION,
    }


class KeptTables:
    """The folder of one evaluation in a run directory, named by ground truth and identity.

    Args:
        directory: the run directory.
        truth: name of the ground truth.
        identity: see `identity_of`.
    """

    def __init__(self, directory: RunDirectory, truth: str, identity: dict[str, Any]) -> None:
        self._directory = directory
        self._identity = identity
        self.digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        self.folder = f"{EVALUATION_FOLDER}/{truth}-{self.digest[:12]}"

    def prepare(self, *, anew: bool = False) -> None:
        """Make the folder, and say in it what its tables belong to.

        Args:
            anew: remove the tables that are there.

        Raises:
            OvssError: the run directory cannot be written to.
        """
        self._directory.prepare()
        if anew:
            for name in self._directory.files_in(self.folder):
                self._directory.remove(name)
        if self._directory.is_local:
            self._make_folder(Path(self._directory.path(self.folder)))
        record = json.dumps(self._identity, indent=1, ensure_ascii=False)
        self._directory.create(f"{self.folder}/evaluation.json", record.encode())

    def _make_folder(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{folder} cannot be made: {error.strerror}; check the permissions, and what is there"
            raise InputError(reason) from error

    def shards(self) -> set[int]:
        """The shards whose table is kept; one listing."""
        names = (name.rpartition("/")[2] for name in self._directory.files_in(self.folder))
        stems = (name.removesuffix(".parquet") for name in names if name.endswith(".parquet"))
        return {int(stem) for stem in stems if stem.isdigit()}

    def tables(self, shards: Sequence[int]) -> Iterator[tuple[int, pa.Table]]:
        """The tables of these shards in this order; holds a few at a time.

        Raises:
            DamagedRunError: one is damaged, or was removed meanwhile.
        """
        waiting = iter(shards)
        with ThreadPoolExecutor(_READS_AT_ONCE) as threads:
            running = [(shard, threads.submit(self._read, shard)) for shard in islice(waiting, 2 * _READS_AT_ONCE)]
            while running:
                shard, future = running.pop(0)
                yield shard, future.result()
                running += [(shard, threads.submit(self._read, shard)) for shard in islice(waiting, 1)]

    def _read(self, shard: int) -> pa.Table:
        name = f"{self.folder}/{shard:08d}.parquet"
        where = f"{self._directory.uri}/{name}"
        data = self._directory.read(name)
        if data is None:
            raise DamagedRunError(f"{where} was removed while it was needed; evaluate again")
        return decode_table(data, where)
