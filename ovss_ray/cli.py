"""The command line: parsing and printing only; every command is one call of the library."""

from __future__ import annotations

import json
import logging
import shlex
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ovss_ray.commands.choose import choose
from ovss_ray.commands.evaluate import evaluate, scoring
from ovss_ray.commands.methods import methods
from ovss_ray.errors import OvssError
from ovss_ray.flags import (
    HOW,
    JOB_FLAGS,
    LISTING,
    AsJson,
    RunPlace,
    StorageOptionsJson,
    Verbose,
    parse_storage_options,
    with_flags,
)
from ovss_ray.run.logs import LogSettings, configure_logging, logs_json
from ovss_ray.spec import JobSpec
from ovss_ray.terminal import err, log_level, out, reporter_for, say, watching
from ovss_ray.version import __version__

if TYPE_CHECKING:
    from ovss_ray.labels.additions import Addition
    from ovss_ray.run.additions import StoredJob
    from ovss_ray.run.progress import Reporter
    from ovss_ray.run.summary import RunSummary

EPILOG = (
    "Exit codes: 0 done (images that failed are rows with a reason), 2 wrong setting, 3 input or weights not "
    "readable, 4 the run directory belongs to other settings, 5 the run is not finished and can be continued, 6 a file "
    "of the run is damaged, 130 or 143 stopped by a signal."
)

log = logging.getLogger(__name__)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Label every pixel of millions of images with classes named in plain text; no training.",
    epilog=EPILOG,
)

PlanOnly = Annotated[bool, typer.Option("--plan-only", help="Add the images and label them another time.")]


@app.command(epilog=EPILOG)
@with_flags(JOB_FLAGS)
def label(
    input: Annotated[str, typer.Argument(metavar="INPUT", help=JobSpec.model_fields["input"].description)],
    run: Annotated[str, typer.Argument(metavar="RUN", help=JobSpec.model_fields["run"].description)],
    flags: dict[str, Any],
    verbose: Verbose = 0,
) -> None:
    """Label a folder, a glob or a list of images; the same command continues an interrupted run.

    Example: ovss-ray label photos/ runs/first --classes "cat,dog,grass"
    """
    _run(JobSpec.build({"input": input, "run": run, **flags}, source="command line"), verbose)


@app.command(name="run", epilog=EPILOG)
@with_flags(JOB_FLAGS)
def run_file(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML); its keys are the names of the flags.")],
    flags: dict[str, Any],
    input: Annotated[str | None, typer.Option("--input", help="Replaces `input` of the file.")] = None,
    run: Annotated[str | None, typer.Option("--run", help="Replaces `run` of the file.")] = None,
    verbose: Verbose = 0,
) -> None:
    """Run a job file, or continue its run; a flag replaces the field of the file. Then score it, if it says `evaluate`.

    ${NAME} and ${NAME:-default} in the file are taken from the environment.
    """
    places = {name: value for name, value in (("input", input), ("run", run)) if value is not None}
    _run(JobSpec.from_file(job, **places, **flags), verbose)


def _run(spec: JobSpec, verbose: int) -> None:
    from ovss_ray.run.driver import run_job

    with scoring(spec):
        _print_summary(run_job(spec, reporter=reporter_for(spec, verbose)))


@app.command(epilog=EPILOG)
@with_flags(JOB_FLAGS)
def estimate(
    flags: dict[str, Any],
    input: Annotated[str | None, typer.Argument(metavar="INPUT", help="Images, as for label; or give --job.")] = None,
    job: Annotated[Path | None, typer.Option(help="Job file (YAML); flags replace its fields.")] = None,
    run: Annotated[
        str, typer.Option(help="Where the run would be: what the sample gives is written beside it, and removed.")
    ] = "",
    sample_images: Annotated[int, typer.Option(min=1, help="Images to label.")] = 128,
    images: Annotated[
        int | None, typer.Option(min=1, help="Number of images, if known: only the head of the listing is read.")
    ] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs, or CPU workers without any, to share the work.")] = None,
    gpu_price: Annotated[float | None, typer.Option(help="Price of one of them for an hour.")] = None,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Time a sample of a job before the money is spent: hours, GPU hours, price, output size, and what binds.

    Lists the input, and labels a random sample with one worker of the job; the run directory is not touched.

    Example: ovss-ray estimate s3://bucket/images --run s3://bucket/runs/first --classes voc21 --gpus 8 --gpu-price 2.5
    """
    from ovss_ray.estimate.estimate import estimate_job
    from ovss_ray.estimate.explaining import estimate_record, estimate_text

    given = {name: value for name, value in (("input", input), ("run", run)) if value}
    if job is None:
        anywhere = str(Path(tempfile.gettempdir()) / "ovss-ray-run")
        spec = JobSpec.build({"run": anywhere, **given, **flags}, source="command line")
    else:
        spec = JobSpec.from_file(job, **given, **flags)
    found = estimate_job(spec, sample_images=sample_images, images=images, gpus=gpus, gpu_price=gpu_price,
                         reporter=reporter_for(spec, verbose))  # fmt: skip
    say(json.dumps(estimate_record(found, spec), indent=1) if as_json else estimate_text(found, spec))


app.command(epilog=EPILOG)(choose)


@app.command(epilog=EPILOG)
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

    def add(job: StoredJob, reporter: Reporter) -> Addition | None:
        from ovss_ray.run.additions import extend_run

        return extend_run(job, listing, reporter=reporter)

    _add_and_label(run, flags, add, "nothing to add: the run has every image of the input", plan_only, verbose)


@app.command(epilog=EPILOG)
@with_flags({"Images": ("max_pixels",), **HOW}, defaults=False)
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
    only. How many may fail is not limited, unless --max-failed-fraction is given.

    Example: ovss-ray retry runs/first --status fetch_failed,timeout --fetch-attempts 10
    """
    statuses = None if status is None else [name.strip() for name in status.split(",")]

    def add(job: StoredJob, _: Reporter) -> Addition | None:
        from ovss_ray.run.additions import retry_run

        return retry_run(job, statuses)

    nothing = "nothing to label again: no image failed" + (f" with {status}" if status else "")
    _add_and_label(run, {"max_failed_fraction": 1.0, **flags}, add, nothing, plan_only, verbose)


def _add_and_label(
    run: str,
    flags: dict[str, Any],
    add: Callable[[StoredJob, Reporter], Addition | None],
    nothing: str,
    plan_only: bool,
    verbose: int,
) -> None:
    from ovss_ray.run.additions import check_job, continue_run, load_job

    job = load_job(run, flags, storage_options=flags.get("storage_options"))
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
        _print_summary(continue_run(job, reporter=reporter))


def _print_summary(summary: RunSummary) -> None:
    from ovss_ray.run.progress import duration

    line = f"{summary.labelled:,} of {summary.images:,} images labelled in {summary.run}"
    if summary.session:
        line += f" ({summary.session['images_per_s']:.1f} images/s, {duration(summary.session['seconds'])} in all"
        line += f", bound by {summary.session['binding_stage']})" if summary.session["binding_stage"] else ")"
    say(line)
    if summary.failed:
        say(f"{summary.failed:,} {'image has' if summary.failed == 1 else 'images have'} a reason instead of labels:")
        _say_failures(summary.failures, summary.failure_kinds)
    say(f"Look into it: ovss-ray status {shlex.quote(summary.run)}, or in Python:")
    say(f'  ovss_ray.open_run({summary.run!r}).sql("SELECT class_name, count(*) FROM segments GROUP BY ALL")')


def _say_failures(failures: list[dict[str, Any]], kinds: int | None) -> None:
    from ovss_ray.run.summary import failure_lines

    for line in failure_lines(failures, kinds):
        say(f"  {line}")


@app.command()
def status(
    run: RunPlace,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Count statuses and reasons of failure in any case: reads a "
            "little of every shard (three requests each in an object store).",
        ),
    ] = False,
    as_json: AsJson = False,
    storage_options: StorageOptionsJson = None,
) -> None:
    """How far a run is, whether it still goes on, and why images failed; also while it runs, from another machine.

    A listing and a few footers, whatever the size of the run. Statuses are counted for runs of up to 256 shards, and
    known of complete ones; for others say --full.
    """
    from ovss_ray.run.summary import read_status

    state = read_status(run, parse_storage_options(storage_options), full=full)
    if as_json:
        say(json.dumps(asdict(state), indent=1))
        return
    say(f"{state.run}: {state.method} on {state.clip}, {state.classes} classes")
    say(f"shards  {state.shards_done:,} of {state.shards:,} finished ({state.shards_done / state.shards:.1%})")
    statuses = "statuses not counted, --full does" if state.statuses is None else _counts(state.statuses)
    say(f"images  {state.images_done:,} of {state.images:,}: {statuses}")
    if state.last_shard_at is not None:
        say(state.pace())
    for added in state.additions:
        say(f"{added['kind']:<7} {added['images']:,} images at {added['created_at']}, "
             f"{added['shards_done']:,} of {added['shards']:,} shards finished")  # fmt: skip
    if state.crashed:
        say(f"{state.crashed:,} images ended their worker and are set aside")
    _say_failures(state.failures or [], state.failure_kinds)
    if state.activity in ("stopped", "not begun"):
        say("The command that started the run continues it.")


@app.command(epilog=EPILOG)
def verify(
    run: RunPlace,
    fast: Annotated[
        bool, typer.Option("--fast", help="Footers only: finds missing, truncated and foreign files, no flipped bits.")
    ] = False,
    remove_damaged: Annotated[
        bool,
        typer.Option("--remove-damaged", help="Remove damaged files, so that continuing the run makes them again."),
    ] = False,
    as_json: AsJson = False,
    storage_options: StorageOptionsJson = None,
) -> None:
    """Check every file of a run: all shards there, whole, of this run, as the manifest lists them, and consistent.

    Reads everything once and decodes every label map; --fast makes two small requests per shard.
    """
    from ovss_ray.run.verify import verify_run

    with watching("checking shards") as watch:
        found = verify_run(run, footers_only=fast, remove_damaged=remove_damaged, watch=watch,
                           storage_options=parse_storage_options(storage_options))  # fmt: skip
    if as_json:
        say(json.dumps({**asdict(found), "exit_code": found.exit_code}, indent=1))
        raise typer.Exit(found.exit_code)
    say(f"{found.run}: {found.checked:,} of {found.shards:,} shards are written, with {found.images:,} rows")
    for file in (*found.damaged_manifest, *found.damaged):
        say(f"  damaged  {file.name}: {file.reason}")
    for name in found.stray:
        say(f"  stray    {name}: no part of the run")
    if found.missing:
        say(f"  missing  shards {found.missing_ranges()}")
    for line in found.advice():
        say(line)
    raise typer.Exit(found.exit_code)


def _counts(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(statuses.items())) or "none yet"


app.command(epilog=EPILOG)(evaluate)
app.command()(methods)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where scenes, run and page go.")] = Path("demo-run"),
    scenes: Annotated[int, typer.Option(min=1, help="Number of scenes to draw and label.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0,
    engine: Annotated[str, typer.Option(help="ray or local.")] = "ray",
    verbose: Verbose = 0,
) -> None:
    """Draw synthetic scenes, label them with the shipped tiny CLIP, score and show the result; offline, in a minute."""
    from ovss_ray.demo.tour import take_tour
    from ovss_ray.run.progress import LogReporter, TerminalReporter

    configure_logging(LogSettings(log_level(verbose, quiet=True)))
    reporter = TerminalReporter(err) if err.is_terminal else LogReporter()
    tour = take_tour(folder, scenes=scenes, seed=seed, engine=engine, reporter=reporter)
    table = Table("class", "IoU")
    for name, iou in tour.class_iou.items():
        table.add_row(name, f"{iou:.3f}")
    out.print(table)
    say(f"mIoU {tour.miou:.3f}, pixel accuracy {tour.pixel_accuracy:.3f} over {scenes} scenes")
    say(f"scenes  {tour.images}\nrun     {tour.run}\npage    {tour.page}  (open it in a browser)")
    say("The same on your own photos, with OpenAI's CLIP (its weights are downloaded at the first use):")
    say('  ovss-ray label PHOTOS/ RUN/ --classes "person,car,tree,sky"')


def _print_version(asked: bool) -> None:
    if asked:
        say(f"ovss-ray {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: errors of the user's making end in one sentence and a documented exit code."""
    try:
        app()
    except OvssError as error:
        said = str(error)
        if error.exit_code in (5, 130, 143):
            said += f"\nContinue with:\n  {shlex.join(['ovss-ray', *sys.argv[1:]])}"
        if logs_json():
            log.error("%s", said)
        else:
            err.print(f"ovss-ray: {said}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
