"""The commands `continue`, `extend` and `retry`: going on from what `run.json` says."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ovss_ray.commands.evaluate import scoring
from ovss_ray.commands.outcomes import print_summary
from ovss_ray.flags import HOW, LISTING, RunPlace, Verbose, with_flags
from ovss_ray.terminal import reporter_for, say

if TYPE_CHECKING:
    from ovss_ray.labels.additions import Addition
    from ovss_ray.run.additions import StoredJob
    from ovss_ray.run.progress import Reporter

PlanOnly = Annotated[bool, typer.Option("--plan-only", help="Add the images and label them another time.")]


@with_flags(HOW, defaults=False)
def continue_(run: RunPlace, flags: dict[str, Any], verbose: Verbose = 0) -> None:
    """Continue a run that was stopped or killed, from what its run.json says; nothing else need be given again.

    Only credentials are not in run.json: give --storage-options again if the run was started with them. Flags say how
    to work, and replace what the run was started with. A job file that says `evaluate` is scored as well.

    Example: ovss-ray continue runs/first
    """
    from ovss_ray.run.additions import continue_run, load_job

    job = load_job(run, flags, storage_options=flags.get("storage_options"))
    with scoring(job.spec, job.vocabulary):
        print_summary(continue_run(job, reporter=reporter_for(job.spec, verbose)))


@with_flags({"Images": LISTING, **HOW}, defaults=False)
def extend(
    run: RunPlace,
    flags: dict[str, Any],
    input: Annotated[str | None, typer.Argument(metavar="INPUT", help="Images; the run's own input if none.")] = None,
    plan_only: PlanOnly = False,
    verbose: Verbose = 0,
) -> None:
    """Add the images that a run does not have yet (told by their URIs), and label them.

    The input is listed again as the run listed it, unless flags say otherwise: its sample holds for new images too,
    and a larger --sample adds to it; its limit is over, and --limit counts new images. Keeps 8 bytes of every URI in
    memory. While the run goes on elsewhere, use --plan-only: whoever continues the run next labels them.

    Example: ovss-ray extend s3://bucket/runs/first
    """
    listing = {name: flags.pop(name) for name in LISTING if name in flags}
    listing.update({} if input is None else {"input": input})

    def check(job: StoredJob) -> None:
        from ovss_ray.run.additions import check_listing

        check_listing(job, listing)

    def add(job: StoredJob, reporter: Reporter) -> Addition | None:
        from ovss_ray.run.additions import extend_run

        return extend_run(job, listing, reporter=reporter)

    nothing = "nothing to add: the run has every image of the input"
    _add_and_label(run, flags, add, nothing, plan_only, verbose, check=check)


@with_flags({"Images": ("max_pixels", "max_bytes"), **HOW}, defaults=False)
def retry(
    run: RunPlace,
    flags: dict[str, Any],
    status: Annotated[
        str | None,
        typer.Option(
            "--status",
            metavar="NAMES",
            help="Only images with these, as in fetch_failed,crashed; by default all without labels.",
        ),
    ] = None,
    plan_only: PlanOnly = False,
    verbose: Verbose = 0,
) -> None:
    """Label the images without labels once more, as new shards; the latest outcome of each image counts.

    Readers then see the new row of each, if it has labels or none has. A larger --max-pixels holds for these images
    only. How many of them may fail again is not limited; --max-failed-fraction counts other images.

    Example: ovss-ray retry runs/first --status fetch_failed,timeout --fetch-attempts 10
    """
    statuses = None if status is None else [name.strip() for name in status.split(",")]

    def add(job: StoredJob, reporter: Reporter) -> Addition | None:
        from ovss_ray.run.additions import retry_run

        return retry_run(job, statuses, reporter=reporter)

    nothing = "nothing to label again: no image failed" + (f" with {status}" if status else "")
    _add_and_label(run, flags, add, nothing, plan_only, verbose)


def _add_and_label(
    run: str,
    flags: dict[str, Any],
    add: Callable[[StoredJob, Reporter], Addition | None],
    nothing: str,
    plan_only: bool,
    verbose: int,
    check: Callable[[StoredJob], None] = lambda _: None,
) -> None:
    from ovss_ray.run.additions import check_job, continue_run, load_job

    job = load_job(run, flags, storage_options=flags.get("storage_options"))
    check(job)  # cheap, so before weights are looked for
    if not plan_only:
        check_job(job)
    reporter = reporter_for(job.spec, verbose)
    added = add(job, reporter)
    if added is None:
        say(nothing)
    else:
        what = "new images" if added.kind == "extend" else "images to label again"
        say(f"{added.images:,} {what} added to {run}")
    if not plan_only:
        print_summary(continue_run(job, reporter=reporter))
