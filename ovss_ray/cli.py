"""The command line: parsing and printing only; every command is one call of the library."""

from __future__ import annotations

import inspect
import json
import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
import yaml
from rich.console import Console
from rich.table import Table

from ovss_ray.errors import OvssError, SettingError
from ovss_ray.spec import JobSpec
from ovss_ray.version import __version__

if TYPE_CHECKING:
    from ovss_ray.run.summary import RunSummary

EPILOG = (
    "Exit codes: 0 done (images that failed are rows with a reason), 2 wrong setting, 3 input or weights not "
    "readable, 4 the run directory belongs to other settings, 5 the run stopped and can be continued, 130 or 143 "
    "stopped by a signal."
)

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Label every pixel of millions of images with classes named in plain text; no training.",
    epilog=EPILOG,
)
out = Console()
err = Console(stderr=True)

_PANELS = {
    "What to label with": ("classes", "background", "templates"),
    "Method": ("method", "settings", "clip", "device", "dtype"),
    "Images": ("extensions", "uri_column", "image_column", "keep_columns", "limit", "sample", "max_pixels"),
    "Output": ("label_map", "shard_size"),
    "Engine": ("engine", "ray_address", "workers", "gpus_per_worker", "cpus_per_worker", "batch_size",
               "fetch_concurrency", "fetch_attempts", "fetch_timeout_s", "prefetch_mib", "decode_threads",
               "max_shard_attempts", "batch_timeout_s", "max_failed_fraction"),
}  # fmt: skip


def _with_job_flags() -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag per field of `JobSpec`, passed on as the mapping `flags` of those that were given."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        signature = inspect.signature(command)
        own = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values() if p.name != "flags"]
        flags = [_flag(name, panel) for panel, names in _PANELS.items() for name in names]

        def call(**arguments: Any) -> None:
            given = {flag.name: arguments.pop(flag.name) for flag in flags}
            values = {name: value for name, value in given.items() if value is not None and value != []}
            if "settings" in values:
                values["settings"] = _parse_settings(values["settings"])
            command(**arguments, flags=values)

        parameters = [*own, *flags]
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        call.__doc__, call.__name__ = command.__doc__, command.__name__
        return call

    return decorate


def _flag(name: str, panel: str) -> inspect.Parameter:
    field = JobSpec.model_fields[name]
    help_text = field.description or ""
    option = "--" + name.replace("_", "-")
    if name == "settings":
        annotation: Any = Annotated[
            list[str] | None,
            typer.Option(
                option, "--set", metavar="NAME=VALUE", help=f"{help_text} May be repeated.", rich_help_panel=panel
            ),
        ]
    else:
        default = field.get_default()
        if not field.is_required() and default is not None:
            shown = ",".join(default) if isinstance(default, tuple) else default
            help_text = f"{help_text} [default: {shown}]"
        annotation = Annotated[str | None, typer.Option(option, metavar="", help=help_text, rich_help_panel=panel)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _parse_settings(pairs: list[str]) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.strip():
            raise SettingError(f"command line: --set {pair!r} is not of the form name=value")
        settings[name.strip()] = yaml.safe_load(value)
    return settings


Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens, on standard error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]


@app.command(epilog=EPILOG)
@_with_job_flags()
def label(
    input: Annotated[str, typer.Argument(metavar="INPUT", help=JobSpec.model_fields["input"].description)],
    run: Annotated[str, typer.Argument(metavar="RUN", help=JobSpec.model_fields["run"].description)],
    flags: dict[str, Any],
    verbose: Verbose = False,
) -> None:
    """Label a folder, a glob or a list of images; the same command continues an interrupted run.

    Example: ovss-ray label photos/ runs/first --classes "cat,dog,grass"
    """
    _run(JobSpec.build({"input": input, "run": run, **flags}, source="command line"), verbose)


@app.command(name="run", epilog=EPILOG)
@_with_job_flags()
def run_file(
    job: Annotated[Path, typer.Argument(metavar="JOB", help="Job file (YAML); its keys are the names of the flags.")],
    flags: dict[str, Any],
    input: Annotated[str | None, typer.Option("--input", help="Replaces `input` of the file.")] = None,
    run: Annotated[str | None, typer.Option("--run", help="Replaces `run` of the file.")] = None,
    verbose: Verbose = False,
) -> None:
    """Run a job file, or continue its run; a flag replaces the field of the file.

    ${NAME} and ${NAME:-default} in the file are taken from the environment.
    """
    places = {name: value for name, value in (("input", input), ("run", run)) if value is not None}
    _run(JobSpec.from_file(job, **places, **flags), verbose)


def _run(spec: JobSpec, verbose: bool) -> None:
    from ovss_ray.run.driver import run_job
    from ovss_ray.run.progress import LogReporter, TerminalReporter

    terminal = err.is_terminal
    _log(logging.INFO if verbose or not terminal else logging.WARNING)
    summary = run_job(spec, reporter=TerminalReporter(err) if terminal else LogReporter())
    _print_summary(summary)


def _print_summary(summary: RunSummary) -> None:
    from ovss_ray.run.progress import duration

    line = f"{summary.labelled:,} of {summary.images:,} images labelled in {summary.run}"
    if summary.session:
        line += f" ({summary.session['images_per_s']:.1f} images/s, {duration(summary.session['seconds'])} in all"
        line += f", bound by {summary.session['binding_stage']})" if summary.session["binding_stage"] else ")"
    _say(line)
    if summary.failed:
        _say(f"{summary.failed:,} images have a reason instead of labels:")
        for failure in summary.failures:
            _say(f"  {failure['images']:>8,}  {failure['status']}: {failure['error']} (e.g. {failure['example']})")
    _say(f"Look into it: ovss-ray status {shlex.quote(summary.run)}, or in Python:")
    _say(f'  ovss_ray.open_run({summary.run!r}).sql("SELECT class_name, count(*) FROM segments GROUP BY ALL")')


@app.command()
def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")],
    as_json: AsJson = False,
) -> None:
    """How far a run is, and why images failed; works while it runs, and from another machine."""
    from ovss_ray.run.summary import read_status

    state = read_status(run)
    if as_json:
        _say(json.dumps(asdict(state), indent=1))
        return
    _say(f"{state.run}: {state.method} on {state.clip}, {state.classes} classes")
    share = state.shards_done / state.shards
    _say(f"shards  {state.shards_done:,} of {state.shards:,} finished ({share:.1%})")
    _say(f"images  {state.images_done:,} of {state.images:,}: {_counts(state.statuses)}")
    if state.last_shard_at:
        _say(f"last shard finished at {state.last_shard_at}")
    for failure in state.failures:
        _say(f"  {failure['images']:>8,}  {failure['status']}: {failure['error']} (e.g. {failure['example']})")
    if state.shards_done < state.shards:
        _say("The command that started the run continues it.")


def _counts(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(statuses.items())) or "none yet"


@app.command()
def methods(as_json: AsJson = False) -> None:
    """The segmenters: paper, idea, cost and published mIoU (percent)."""
    from ovss_ray.segmenters import get_method, method_names

    cards = {name: get_method(name).card for name in method_names()}
    if as_json:
        _say(json.dumps({name: asdict(card) for name, card in cards.items()}, indent=1))
        return
    table = Table("method", "paper", "idea", "training-free", "passes", "mIoU as published", show_lines=True)
    for name, card in cards.items():
        scores = ", ".join(f"{benchmark} {value:g}" for benchmark, value in card.published.items())
        table.add_row(name, f"{card.paper} ({card.venue})", card.idea, "yes" if card.training_free else "no",
                      str(card.passes), scores or "-")  # fmt: skip
    out.print(table)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where scenes, run and page go.")] = Path("demo-run"),
    scenes: Annotated[int, typer.Option(min=1, help="Number of scenes to draw and label.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the scenes.")] = 0,
    engine: Annotated[str, typer.Option(help="ray or local.")] = "ray",
    verbose: Verbose = False,
) -> None:
    """Draw synthetic scenes, label them with the shipped tiny CLIP, score and show the result; offline, in a minute."""
    from ovss_ray.demo.tour import take_tour
    from ovss_ray.run.progress import LogReporter, TerminalReporter

    terminal = err.is_terminal
    _log(logging.INFO if verbose else logging.WARNING)
    reporter = TerminalReporter(err) if terminal else LogReporter()
    tour = take_tour(folder, scenes=scenes, seed=seed, engine=engine, reporter=reporter)
    table = Table("class", "IoU")
    for name, iou in tour.class_iou.items():
        table.add_row(name, f"{iou:.3f}")
    out.print(table)
    _say(f"mIoU {tour.miou:.3f}, pixel accuracy {tour.pixel_accuracy:.3f} over {scenes} scenes")
    _say(f"scenes  {tour.images}\nrun     {tour.run}\npage    {tour.page}  (open it in a browser)")
    _say("The same on your own photos, with OpenAI's CLIP (its weights are downloaded at the first use):")
    _say('  ovss-ray label PHOTOS/ RUN/ --classes "person,car,tree,sky"')


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        _say(f"ovss-ray {__version__}")
        raise typer.Exit


def _say(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def _log(level: int) -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("ovss_ray").setLevel(level)


def main() -> None:
    """Entry point: errors of the user's making end in one sentence and a documented exit code."""
    try:
        app()
    except OvssError as error:
        err.print(f"ovss-ray: {error}", markup=False, highlight=False, soft_wrap=True)
        if error.exit_code in (5, 130, 143):
            err.print(f"Continue with:\n  {shlex.join(['ovss-ray', *sys.argv[1:]])}", markup=False, highlight=False,
                      soft_wrap=True)  # fmt: skip
        sys.exit(error.exit_code)
