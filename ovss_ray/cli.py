"""The command line: parsing and printing only; every command is one call of the library."""

from __future__ import annotations

import logging
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ovss_ray.commands.choose import choose
from ovss_ray.commands.continuing import continue_, extend, retry
from ovss_ray.commands.estimate import estimate
from ovss_ray.commands.evaluate import evaluate, scoring
from ovss_ray.commands.methods import methods
from ovss_ray.commands.outcomes import print_summary
from ovss_ray.commands.status import status
from ovss_ray.errors import OvssError
from ovss_ray.flags import JOB_FLAGS, AsJson, RunPlace, StorageOptionsJson, Verbose, parse_storage_options, with_flags
from ovss_ray.naming import Naming, use_naming
from ovss_ray.redaction import hide_arguments, without_secrets
from ovss_ray.run.interrupts import end_for_certain
from ovss_ray.run.logs import LogSettings, configure_logging, logs_json
from ovss_ray.spec import JobSpec
from ovss_ray.terminal import complain, err, log_level, out, prepare_streams, reporter_for, say, say_json, watching
from ovss_ray.usage import UsageError, explain_usage
from ovss_ray.version import __version__

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


@app.command(epilog=EPILOG)
@with_flags(JOB_FLAGS)
def label(
    input: Annotated[str, typer.Argument(metavar="INPUT", help=JobSpec.model_fields["input"].description)],
    run: Annotated[str, typer.Argument(metavar="RUN", help=JobSpec.model_fields["run"].description)],
    flags: dict[str, Any],
    verbose: Verbose = 0,
) -> None:
    """Label a folder, a glob or a list of images; the same command, or `continue RUN`, continues an interrupted run.

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
        print_summary(run_job(spec, reporter=reporter_for(spec, verbose)))


app.command(epilog=EPILOG)(estimate)
app.command(epilog=EPILOG)(choose)


app.command(name="continue", epilog=EPILOG)(continue_)
app.command(epilog=EPILOG)(extend)
app.command(epilog=EPILOG)(retry)
app.command()(status)


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
        say_json({**asdict(found), "exit_code": found.exit_code})
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
    say(f"scenes  {tour.images}", f"run     {tour.run}", f"page    {tour.page}  (open it in a browser)")
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
    hide_arguments()
    prepare_streams()
    use_naming(Naming(flags=True))
    try:
        sys.exit(app(standalone_mode=False))
    except typer.Abort:
        sys.exit(130)
    except UsageError as error:
        complain(f"ovss-ray: {explain_usage(error)}")
        sys.exit(error.exit_code)
    except OvssError as error:
        first, *rest = error.lines or ("",)
        if error.exit_code in (5, 130, 143):
            # What has no run yet, or is more than its labelling, is continued by the command that was given.
            again = shlex.join(["ovss-ray", *without_secrets(sys.argv[1:])])
            rest += ["Continue with:", f"  {error.continue_with or again}"]
        if logs_json():
            log.error("%s", "\n".join([first, *rest]))
        else:
            complain(f"ovss-ray: {first}", *rest)
        if error.exit_code in (130, 143):
            end_for_certain(error.exit_code)
        sys.exit(error.exit_code)
