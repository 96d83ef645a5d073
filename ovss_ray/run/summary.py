"""What a run came to: counts, reasons of failure and throughput, printed at the end and kept in `summary.json`."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from statistics import median
from typing import Any, Literal

from ovss_ray.images.stores import StorageOptions
from ovss_ray.labels.layout import CRASHED_FOLDER, SHARDS_FOLDER, SUMMARY_FILE, Manifest, shard_name
from ovss_ray.labels.outcomes import Outcomes
from ovss_ray.labels.reading import Run, open_run
from ovss_ray.labels.shard import read_shard_metadata
from ovss_ray.redaction import redacted
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.progress import Progress, duration

Activity = Literal["complete", "not begun", "going on", "stopped"]

TOP_REASONS = 20
COUNTED_SHARDS = 256  # a second or two in an object store
PACE_SHARDS = 100
PACE_FOOTERS = 8


@dataclass(frozen=True)
class RunSummary:
    """The outcome of a finished run.

    Attributes:
        run: the run directory.
        images: images of the run.
        shards: shards of the run.
        statuses: images by status.
        failures: the most frequent kinds of reasons, as {status, kind, images, example, error}: `error` is the reason
            of the example.
        session: of the last session that labelled anything: images, seconds, images_per_s, stage_seconds,
            binding_stage, fetch_retries (by kind of failure), worker_deaths (by kind), crashed_images (found in it),
            workers_limited_to (the fewest workers that were kept for want of memory; else None); None if there was
            nothing to do.
        failure_kinds: how many kinds of reasons there are, those of `failures` included.
        warnings: what was said about the labels before the run began, as that they mean nothing.
    """

    run: str
    images: int
    shards: int
    statuses: dict[str, int]
    failures: list[dict[str, Any]]
    session: dict[str, Any] | None
    failure_kinds: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def labelled(self) -> int:
        """Images that have labels."""
        return self.statuses.get("ok", 0)

    @property
    def failed(self) -> int:
        """Images that have a reason instead of labels."""
        return self.images - self.labelled


def summarise_run(directory: RunDirectory, manifest: Manifest, *, session: Progress | None) -> RunSummary:
    """Count over all shards, and write `summary.json` if none is missing.

    Args:
        directory: the run directory.
        manifest: the images.
        session: what was done now; None if there was nothing to do, when the summary that is there still holds.
    """
    if session is None:
        stored = directory.read_json(SUMMARY_FILE)
        if stored is not None and stored["shards"] == manifest.shards:  # else the run has grown since
            return RunSummary(**{**stored, "run": directory.uri})
    with open_run(directory.uri, directory.storage_options) as run:
        outcomes, warnings = run.outcomes(), list(run.warnings)
        is_complete = len(run.shards_done()) == manifest.shards
    summary = RunSummary(
        run=directory.uri,
        images=manifest.images,
        shards=manifest.shards,
        statuses=outcomes.statuses,
        failures=_top_reasons(outcomes),
        session=None if session is None else _session(session),
        failure_kinds=len(outcomes.failures),
        warnings=warnings,
    )
    if is_complete:
        directory.replace(SUMMARY_FILE, json.dumps(asdict(summary), indent=1, ensure_ascii=False).encode())
    return summary


@dataclass(frozen=True)
class RunState:
    """How far a run is, as its directory tells; the run may be going on elsewhere.

    Attributes:
        images: images of the run.
        images_done: those of the shards that are written; images labelled again do not count again.
        additions: what came after the planning, as {kind, created_at, images, shards, shards_done}.
        crashed: images that ended their worker, and are not tried again.
        activity: "complete", "not begun" (no shard is written), "going on" or "stopped": guessed from the age of the
            latest shard and the time that shards usually take.
        images_per_s: over the latest shards that came without a break; None if there are too few.
        remaining_s: expected, at that rate; None unless the run goes on.
        last_shard_at: when the latest shard was written, ISO 8601 in UTC; None if there is none.
        last_shard_age_s: seconds since then, by this machine's clock.
        usual_shard_s: what the latest shards took, from their first image to their file; None if there is none.
        statuses: images by status; None where that would take reading every shard.
        failures, failure_kinds: the most frequent kinds of reasons, as in `RunSummary`; None likewise.
        continue_with: the command that goes on with the run.
    """

    run: str
    method: str
    clip: str
    classes: int
    images: int
    images_done: int
    shards: int
    shards_done: int
    additions: list[dict[str, Any]]
    crashed: int
    activity: Activity
    images_per_s: float | None
    remaining_s: float | None
    last_shard_at: str | None
    last_shard_age_s: float | None
    usual_shard_s: float | None
    statuses: dict[str, int] | None
    failures: list[dict[str, Any]] | None
    failure_kinds: int | None
    continue_with: str

    def pace(self) -> str:
        """Whether the run goes on and how fast, in a sentence; for a run with one shard at least."""
        assert self.last_shard_age_s is not None
        assert self.usual_shard_s is not None
        last = f"last shard finished at {self.last_shard_at}, {duration(self.last_shard_age_s)} ago"
        usual = f"one takes {duration(self.usual_shard_s)}"
        if self.activity == "stopped":
            return f"seems to have stopped: {last}, while {usual}"
        if self.activity == "complete":
            return last
        rate = f", {self.images_per_s:.1f} images/s" if self.images_per_s else ""
        left = f", {duration(self.remaining_s)} left" if self.remaining_s is not None else ""
        return f"going on{rate}{left}; {last}, {usual}"


def read_status(run: str, storage_options: StorageOptions | None = None, *, full: bool = False) -> RunState:
    """Read the state of a run: a listing and a few footers, whatever its size.

    Args:
        run: the run directory.
        storage_options: fsspec options by protocol.
        full: count images by status in any case, which reads a little of every shard. Otherwise it is done for up to
            256 shards, and taken from `summary.json` if the run is complete.

    Raises:
        SettingError: there is no run in this place.
    """
    with open_run(run, storage_options) as opened:
        directory = RunDirectory(run, storage_options)
        done = set(opened.shards_done())
        manifest = opened.manifest
        pace = _pace(directory, manifest, done)
        activity: Activity = "complete" if len(done) == manifest.shards else pace.activity
        rows_left = manifest.rows - sum(map(manifest.images_in, done))
        statuses, failures, kinds = _outcomes(opened, directory, complete=activity == "complete", full=full)
        return RunState(
            run=run,
            method=opened.job["method"],
            clip=opened.job["clip"],
            classes=opened.vocabulary.num_classes,
            images=manifest.images,
            images_done=sum(manifest.images_in(shard) for shard in done if manifest.first_id(shard) is not None),
            shards=manifest.shards,
            shards_done=len(done),
            additions=_additions(opened, done),
            crashed=len(directory.files_in(CRASHED_FOLDER)),
            activity=activity,
            images_per_s=pace.images_per_s,
            remaining_s=rows_left / pace.images_per_s if activity == "going on" and pace.images_per_s else None,
            last_shard_at=None if pace.last is None else _iso(pace.last),
            last_shard_age_s=None if pace.last is None else max(time.time() - pace.last, 0.0),
            usual_shard_s=pace.usual_shard_s,
            statuses=statuses,
            failures=failures,
            failure_kinds=kinds,
            continue_with=directory.continue_command,
        )


def _additions(run: Run, done: Set[int]) -> list[dict[str, Any]]:
    """Parts of additions stand at the end of the manifest, in the order of their records."""
    described = []
    part = len(run.manifest.parts) - sum(len(addition.parts) for addition in run.additions)
    for addition in run.additions:
        first, part = part, part + len(addition.parts)
        shards = [shard for index in range(first, part) for shard in run.manifest.shards_of(index)]
        described.append(
            {
                "kind": addition.kind,
                "created_at": addition.created_at,
                "images": addition.images,
                "shards": len(shards),
                "shards_done": sum(shard in done for shard in shards),
            }
        )
    return described


def _outcomes(
    run: Run, directory: RunDirectory, *, complete: bool, full: bool
) -> tuple[dict[str, int] | None, list[dict[str, Any]] | None, int | None]:
    done = run.shards_done()
    if not done:
        return {}, [], 0
    if complete and not full:
        stored = directory.read_json(SUMMARY_FILE)
        if stored is not None and stored["shards"] == run.num_shards:
            return stored["statuses"], stored["failures"], stored.get("failure_kinds", len(stored["failures"]))
    if full or len(done) <= COUNTED_SHARDS:
        outcomes = run.outcomes()
        return outcomes.statuses, _top_reasons(outcomes), len(outcomes.failures)
    return None, None, None


@dataclass(frozen=True)
class _Pace:
    last: float | None  # seconds since 1970
    usual_shard_s: float | None
    images_per_s: float | None
    activity: Activity


def _pace(directory: RunDirectory, manifest: Manifest, done: Set[int]) -> _Pace:
    written = sorted((at, shard) for shard, at in _shard_times(directory).items() if shard in done)[-PACE_SHARDS:]
    if not written:
        return _Pace(None, None, None, "not begun")
    last = written[-1][0]
    durations = [_duration(directory, shard) for _, shard in written[-PACE_FOOTERS:]]
    usual = median(durations)
    # Two shards per worker, workers in any number: what is longer than this is a break.
    longest_gap = 5 * usual + 60
    since = len(written) - 1
    while since and written[since][0] - written[since - 1][0] <= longest_gap:
        since -= 1
    seconds = last - written[since][0]
    images = sum(manifest.images_in(shard) for _, shard in written[since + 1 :])
    rate = images / seconds if seconds > 0 else None
    return _Pace(last, usual, rate, "going on" if time.time() - last <= longest_gap else "stopped")


def _shard_times(directory: RunDirectory) -> dict[int, float]:
    """When each shard was written, in seconds since 1970: one listing."""
    folder = directory.path(SHARDS_FOLDER)
    directory.fs.invalidate_cache(folder)
    times = {}
    for info in directory.fs.ls(folder, detail=True):
        stem, _, extension = info["name"].rsplit("/", 1)[-1].partition(".")
        if extension == "parquet" and stem.isdigit():
            times[int(stem)] = _modified(info)
    return times


def _modified(info: dict[str, Any]) -> float:
    """Every store's driver has a name and a type of its own for it."""
    names = ("mtime", "LastModified", "last_modified", "updated")
    value = next(info[name] for name in names if info.get(name) is not None)
    if isinstance(value, str):
        value = datetime.fromisoformat(value.replace("Z", "+00:00"))
    return value.timestamp() if isinstance(value, datetime) else float(value)


def _duration(directory: RunDirectory, shard: int) -> float:
    with directory.fs.open(directory.path(shard_name(shard)), "rb", cache_type="none") as file:
        footer = read_shard_metadata(file)
    return float(footer["finished_at"]) - float(footer["started_at"])


def _iso(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat(timespec="seconds")


def failure_lines(failures: Sequence[Mapping[str, Any]], kinds: int | None, shown: int = 8) -> Iterator[str]:
    """Failures as lines for people: count, status and kind, an example with its own reason, and how many are not shown.

    Args:
        failures: as in `RunSummary`.
        kinds: how many kinds there are.
        shown: how many of them to show.
    """
    for failure in failures[:shown]:
        kind = failure.get("kind", failure["error"])  # summaries of before have none
        yield f"{failure['images']:>8,}  {failure['status']}: {kind}"
        example = failure["example"]  # a row of a list may name no image
        if example:
            why = f": {failure['error']}" if failure["error"] != kind else ""
            yield f"{'':>10}such as {example}{why}"
    more = max(kinds or 0, len(failures)) - min(shown, len(failures))
    if more:
        yield f"{'':>10}and {more:,} more {'kind' if more == 1 else 'kinds'}"


def _top_reasons(outcomes: Outcomes) -> list[dict[str, Any]]:
    """Without the secrets in addresses: the rows of the shards have them, a summary is passed around."""
    top = [asdict(failure) for failure in outcomes.failures[:TOP_REASONS]]
    return [{name: redacted(value) if isinstance(value, str) else value for name, value in row.items()} for row in top]


def _session(progress: Progress) -> dict[str, Any]:
    return {
        "images": progress.images_now,
        "seconds": round(progress.seconds, 3),
        "images_per_s": round(progress.images_per_s, 3),
        "binding_stage": progress.binding_stage,
        "stage_seconds": {name: round(seconds, 3) for name, seconds in progress.stage_seconds.items()},
        "fetch_retries": progress.retries,
        "worker_deaths": dict(progress.incidents.worker_deaths),
        "crashed_images": progress.incidents.crashed_images,
        "workers_limited_to": progress.incidents.workers_limited_to,
    }
