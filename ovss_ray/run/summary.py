"""What a run came to: counts, reasons of failure and throughput, printed at the end and kept in `summary.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from typing import Any

from ovss_ray.images.stores import StorageOptions
from ovss_ray.labels.layout import RUN_FILE, SUMMARY_FILE, Manifest, shard_name
from ovss_ray.labels.reading import Run, open_run
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.progress import Progress

TOP_REASONS = 20


@dataclass(frozen=True)
class RunSummary:
    """The outcome of a finished run.

    Attributes:
        run: the run directory.
        images: images of the run.
        shards: shards of the run.
        statuses: images by status.
        failures: the most frequent reasons, as {status, error, images, example}.
        session: of the last session that labelled anything: images, seconds, images_per_s, stage_seconds,
            binding_stage; None if there was nothing to do.
    """

    run: str
    images: int
    shards: int
    statuses: dict[str, int]
    failures: list[dict[str, Any]]
    session: dict[str, Any] | None

    @property
    def labelled(self) -> int:
        """Images that have labels."""
        return self.statuses.get("ok", 0)

    @property
    def failed(self) -> int:
        """Images that have a reason instead of labels."""
        return self.images - self.labelled


def summarise_run(directory: RunDirectory, manifest: Manifest, *, session: Progress | None) -> RunSummary:
    """Count over all shards, and write `summary.json` if this session finished the run."""
    if session is None:
        stored = directory.read_json(SUMMARY_FILE)
        if stored is not None and stored["shards"] == manifest.shards:  # else the run has grown since
            return RunSummary(**{**stored, "run": directory.uri})
    with open_run(directory.uri, directory.storage_options) as run:
        statuses = run.status_counts()
        failures = _failure_reasons(run)
    summary = RunSummary(
        run=directory.uri,
        images=manifest.images,
        shards=manifest.shards,
        statuses=statuses,
        failures=failures,
        session=None if session is None else _session(session),
    )
    directory.replace(SUMMARY_FILE, json.dumps(asdict(summary), indent=1, ensure_ascii=False).encode())
    return summary


@dataclass(frozen=True)
class RunState:
    """How far a run is, as its directory tells; the run may be going on elsewhere.

    Attributes:
        last_shard_at: when the latest shard was finished, ISO 8601 in UTC; None if there is none.
        failures: the most frequent reasons, as in `RunSummary`.
    """

    run: str
    method: str
    clip: str
    classes: int
    images: int
    images_done: int
    shards: int
    shards_done: int
    statuses: dict[str, int]
    failures: list[dict[str, Any]]
    last_shard_at: str | None


def read_status(run: str, storage_options: StorageOptions | None = None) -> RunState:
    """Read the state of a run.

    Raises:
        InputError: there is no run in this place.
    """
    with open_run(run, storage_options) as opened:
        directory = RunDirectory(run, storage_options)
        record = directory.read_json(RUN_FILE)
        assert record is not None  # open_run has just read it
        manifest = Manifest.from_json(record["manifest"])
        done = opened.shards_done()
        return RunState(
            run=run,
            method=opened.job["method"],
            clip=opened.job["clip"],
            classes=opened.vocabulary.num_classes,
            images=manifest.images,
            images_done=sum(manifest.images_in(shard) for shard in done),
            shards=manifest.shards,
            shards_done=len(done),
            statuses=opened.status_counts(),
            failures=_failure_reasons(opened) if done else [],
            last_shard_at=_last_write(directory, done),
        )


def _failure_reasons(run: Run) -> list[dict[str, Any]]:
    rows = run.sql(
        "SELECT status, error, count(*) AS images, min(uri) AS example FROM images WHERE status != 'ok' "
        f"GROUP BY status, error ORDER BY images DESC, status, error LIMIT {TOP_REASONS}"
    )
    names = ("status", "error", "images", "example")
    return [dict(zip(names, row, strict=True)) for row in rows.fetchall()]


def _last_write(directory: RunDirectory, done: list[int]) -> str | None:
    if not done:
        return None
    # Shards are given out in order, so the latest is among the last few ids.
    names = [directory.path(shard_name(shard)) for shard in done[-32:]]
    latest: datetime = max(directory.fs.modified(name) for name in names)
    return latest.astimezone(timezone.utc).isoformat(timespec="seconds")


def _session(progress: Progress) -> dict[str, Any]:
    return {
        "images": progress.images_now,
        "seconds": round(progress.seconds, 3),
        "images_per_s": round(progress.images_per_s, 3),
        "binding_stage": progress.binding_stage,
        "stage_seconds": {name: round(seconds, 3) for name, seconds in progress.stage_seconds.items()},
    }
