"""What a run came to: counts, reasons of failure and throughput, printed at the end and kept in `summary.json`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ovss_ray.errors import DamagedRunError
from ovss_ray.labels.layout import SUMMARY_FILE, Manifest, shard_name
from ovss_ray.labels.outcomes import Outcomes
from ovss_ray.labels.reading import open_run
from ovss_ray.redaction import redacted
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
        return sum(self.statuses.values()) - self.labelled


def summarise_run(directory: RunDirectory, manifest: Manifest, *, session: Progress | None) -> RunSummary:
    """Count over all shards, and write `summary.json` if none is missing.

    Args:
        directory: the run directory.
        manifest: the images.
        session: what was done now; None if there was nothing to do, when the summary that is there still holds.

    Raises:
        DamagedRunError: a shard was labelled under another fingerprint.
    """
    if session is None:
        stored = directory.read_json(SUMMARY_FILE)
        if stored is not None and stored["shards"] == manifest.shards:  # else the run has grown since
            return RunSummary(**{**stored, "run": directory.uri})
    with open_run(directory.uri, directory.storage_options) as run:
        outcomes, warnings = run.outcomes(), list(run.warnings)
        is_complete = len(run.shards_done()) == manifest.shards
        foreign = [shard for fingerprint, shard in outcomes.fingerprints.items() if fingerprint != run.fingerprint]
    if foreign:
        raise DamagedRunError(
            f"{directory.uri}/{shard_name(min(foreign))} was labelled under other settings than those of the run: two "
            f"drivers with different settings have worked here. Remove such shards and continue: "
            f"ovss-ray verify {directory.uri} --fast --remove-damaged"
        )
    summary = RunSummary(
        run=directory.uri,
        images=manifest.images,
        shards=manifest.shards,
        statuses=outcomes.statuses,
        failures=top_reasons(outcomes),
        session=None if session is None else _session(session),
        failure_kinds=len(outcomes.failures),
        warnings=warnings,
    )
    if is_complete:
        directory.replace(SUMMARY_FILE, json.dumps(asdict(summary), indent=1, ensure_ascii=False).encode())
    return summary


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


def top_reasons(outcomes: Outcomes) -> list[dict[str, Any]]:
    """Without the secrets in addresses: the rows of the shards have them, a summary is passed around."""
    top = [asdict(failure) for failure in outcomes.failures[:TOP_REASONS]]
    return [{name: redacted(value) if isinstance(value, str) else value for name, value in row.items()} for row in top]


def _session(progress: Progress) -> dict[str, Any]:
    return {
        "images": progress.images_labelled,
        "seconds": round(progress.seconds, 3),
        "images_per_s": round(progress.images_per_s, 3),
        "binding_stage": progress.binding_stage,
        "stage_seconds": {name: round(seconds, 3) for name, seconds in progress.stage_seconds.items()},
        "fetch_retries": progress.retries,
        "worker_deaths": dict(progress.incidents.worker_deaths),
        "crashed_images": progress.incidents.crashed_images,
        "workers_limited_to": progress.incidents.workers_limited_to,
    }
