"""What commands print about the outcome of a run."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ovss_ray.run.logs import logs_json
from ovss_ray.terminal import say, say_json

if TYPE_CHECKING:
    from ovss_ray.run.summary import RunSummary


def print_summary(summary: RunSummary) -> None:
    """Images labelled, why others were not, and where to look; as JSON, in a line, if that is how this process logs."""
    from ovss_ray.run.progress import duration

    if logs_json():
        say_json(asdict(summary))
        return

    line = f"{summary.labelled:,} of {summary.images:,} images labelled in {summary.run}"
    if summary.session:
        line += f" ({summary.session['images_per_s']:.1f} images/s, {duration(summary.session['seconds'])} in all"
        line += f", bound by {summary.session['binding_stage']})" if summary.session["binding_stage"] else ")"
    say(line)
    if summary.failed:
        say(f"{summary.failed:,} {'image has' if summary.failed == 1 else 'images have'} a reason instead of labels:")
        say_failures(summary.failures, summary.failure_kinds)
    for warning in summary.warnings:
        say(f"Warning: {warning}")
    say(f"Look into it: ovss-ray status {shlex.quote(summary.run)}, or in Python:")
    say(f'  ovss_ray.open_run({summary.run!r}).sql("SELECT class_name, count(*) FROM segments GROUP BY ALL")')


def say_failures(failures: list[dict[str, Any]], kinds: int | None) -> None:
    """Kinds of failure, the largest first."""
    from ovss_ray.run.summary import failure_lines

    for line in failure_lines(failures, kinds):
        say(f"  {line}")
