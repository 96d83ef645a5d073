"""The command `ovss-ray evaluate`: its flags, and which calls of the library they are."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ovss_ray.errors import InputError, SettingError
from ovss_ray.flags import RunPlace, StorageOptionsJson, Verbose, parse_storage_options
from ovss_ray.run.logs import LogSettings, configure_logging
from ovss_ray.terminal import log_level, say_json, watching

if TYPE_CHECKING:
    from ovss_ray.evaluation.compare import Comparison
    from ovss_ray.evaluation.ground_truth import GroundTruth
    from ovss_ray.evaluation.result import Evaluation
    from ovss_ray.spec import JobSpec
    from ovss_ray.vocabulary import Vocabulary

_BENCHMARK, _FOLDER, _SCORES, _ENGINE = "A benchmark", "A folder of one's own", "Scores", "Engine"

BenchmarkName = Annotated[
    str | None,
    typer.Option(
        help="voc21, voc20, context60, context59, context459, coco_object, coco_stuff, cityscapes, ade20k, ade847.",
        rich_help_panel=_BENCHMARK,
    ),
]
Root = Annotated[
    str | None, typer.Option(metavar="DATA", help="Folder or bucket of the data set.", rich_help_panel=_BENCHMARK)
]
Split = Annotated[str, typer.Option(help="Split of the benchmark.", rich_help_panel=_BENCHMARK)]
Folder = Annotated[
    str | None,
    typer.Option(metavar="DIR", help="Folder or bucket of label images (PNG, TIFF).", rich_help_panel=_FOLDER),
]
Classes = Annotated[
    str | None, typer.Option(help="Its classes, as for label: a file, names, a shipped list.", rich_help_panel=_FOLDER)
]
IdMap = Annotated[
    str | None,
    typer.Option(
        metavar="FILE",
        help="What the values of the label images mean, where they are not the ids of the classes: numbers or colours "
        "to classes, as YAML, JSON or CSV.",
        rich_help_panel=_FOLDER,
    ),
]
IgnoreIndex = Annotated[
    int | None, typer.Option(help="Value of pixels that do not count; 255 by default.", rich_help_panel=_FOLDER)
]
LabelSuffix = Annotated[
    str, typer.Option(help="What label images have behind the name of their image.", rich_help_panel=_FOLDER)
]
ImageSuffix = Annotated[
    str, typer.Option(help="What images have behind the name of their label image.", rich_help_panel=_FOLDER)
]
Boundary = Annotated[bool, typer.Option("--boundary/--no-boundary", help="Boundary IoU too.", rich_help_panel=_SCORES)]
Seen = Annotated[
    str | None,
    typer.Option(
        metavar="CLASSES",
        help="Classes that count as seen (a file, or names): their mean IoU, that of the others, and hIoU.",
        rich_help_panel=_SCORES,
    ),
]
JsonFile = Annotated[
    str | None,
    typer.Option(
        "--json", metavar="FILE", help="Write everything as JSON; - prints it instead.", rich_help_panel=_SCORES
    ),
]
Compare = Annotated[
    list[str] | None,
    typer.Option(
        metavar="RUN",
        help="Another run to score and set beside this one, on the images that both have; several with several flags.",
        rich_help_panel=_SCORES,
    ),
]
Page = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="Write a page (HTML): confusions, classes, worst and best images.",
        rich_help_panel=_SCORES,
    ),
]
Again = Annotated[
    bool,
    typer.Option(
        "--again",
        help="Count anew what was counted before, as after annotations were repaired.",
        rich_help_panel=_ENGINE,
    ),
]
EngineName = Annotated[str, typer.Option(help="ray or local.", rich_help_panel=_ENGINE)]
Workers = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Shards at once; by default as many as the cluster has cores, 1 with --engine local.",
        rich_help_panel=_ENGINE,
    ),
]
RayAddress = Annotated[
    str | None, typer.Option(help="Address of a Ray cluster, as for label.", rich_help_panel=_ENGINE)
]


def evaluate(
    run: RunPlace,
    benchmark: BenchmarkName = None,
    root: Root = None,
    split: Split = "val",
    ground_truth: Folder = None,
    classes: Classes = None,
    id_map: IdMap = None,
    ignore_index: IgnoreIndex = None,
    label_suffix: LabelSuffix = "",
    image_suffix: ImageSuffix = "",
    boundary: Boundary = True,
    seen: Seen = None,
    compare: Compare = None,
    page: Page = None,
    json_file: JsonFile = None,
    again: Again = False,
    engine: EngineName = "ray",
    workers: Workers = None,
    ray_address: RayAddress = None,
    storage_options: StorageOptionsJson = None,
    verbose: Verbose = 0,
) -> None:
    """Score a run against a ground truth: IoU of every class, mIoU with its interval, accuracies, boundary IoU.

    What was counted is kept in RUN/evaluation, shard by shard: killed, the same command goes on; after the run has
    grown, only new shards are read. Images that cannot be scored are listed with the reason. Exit code 5 if the scores
    are not those of the whole split: shards are not written yet, or images of it are not scored.

    With --compare, a difference of two runs is called clear if it stays when images are drawn anew, the same for both.

    Example: ovss-ray evaluate runs/first --benchmark voc21 --root data/VOCdevkit
    """
    from ovss_ray.evaluation.evaluate import evaluate_run
    from ovss_ray.labels.reading import open_run

    configure_logging(LogSettings(log_level(verbose, quiet=True)))
    options = parse_storage_options(storage_options)
    how, seen_names = _engine(engine), _names(seen)
    for place in (run, *(compare or ())):
        open_run(place, options).close()
    if ground_truth is None:
        foreign = {"--classes": classes, "--id-map": id_map, "--ignore-index": ignore_index}
        truth = _benchmark(benchmark, root, split, options, foreign)
    elif benchmark is None and root is None:
        truth = _folder(ground_truth, classes, options, id_map=id_map, ignore_index=ignore_index,
                        label_suffix=label_suffix, image_suffix=image_suffix)  # fmt: skip
    else:
        raise SettingError("command line: give --ground-truth, or --benchmark and --root, not both")
    evaluations = []
    for place in (run, *(compare or ())):
        what = f"scoring shards of {place}" if compare else "scoring shards"
        with watching(what) as watch, redirect_stdout(sys.stderr):  # Ray tells on standard output of workers that died
            evaluations.append(evaluate_run(
                place, truth, boundary=boundary, seen=seen_names, again=again, engine=how,
                workers=workers, ray_address=ray_address, storage_options=options, watch=watch,
            ))  # fmt: skip
    _tell(evaluations, truth, json_file, page, options)
    raise typer.Exit(evaluations[0].exit_code)


@contextmanager
def scoring(job: JobSpec, vocabulary: Vocabulary | None = None) -> Iterator[None]:
    """Score a job's run, as its `evaluate` asks, after the context has completed it; nothing without `evaluate`.

    Ends the command with the exit code of `ovss-ray evaluate`.

    Args:
        job: the job.
        vocabulary: the classes of a run that exists; by default they are read as the job says.

    Raises:
        OvssError: what can be found wrong before images are labelled is raised on entering.
    """
    if job.evaluate is None:
        yield
        return
    from ovss_ray.evaluation.job import evaluate_job, open_truth

    truth = open_truth(job, job.evaluate, vocabulary)
    yield
    with watching("scoring shards") as watch:
        found = evaluate_job(job, job.evaluate, truth, watch=watch)
    page = None if job.evaluate.page is None else Path(job.evaluate.page)
    _tell([found], truth, job.evaluate.json_file, page, job.storage_options)
    raise typer.Exit(found.exit_code)


def _benchmark(
    benchmark: str | None, root: str | None, split: str, options: dict[str, Any], foreign: dict[str, Any]
) -> GroundTruth:
    from ovss_ray.evaluation.ground_truth import open_ground_truth

    if benchmark is None or root is None:
        raise SettingError(
            "command line: name the ground truth: --benchmark NAME --root DATA, or --ground-truth DIR --classes FILE"
        )
    for name, value in foreign.items():
        if value is not None:
            raise SettingError(f"command line: {name} is for --ground-truth; {benchmark} knows its own")
    return open_ground_truth(benchmark, root, split=split, storage_options=options)


def _folder(folder: str, classes: str | None, options: dict[str, Any], **how: Any) -> GroundTruth:
    from ovss_ray.evaluation.ground_truth import open_folder_truth

    if classes is None:
        raise SettingError("command line: --ground-truth needs --classes, the classes of its label images")
    return open_folder_truth(folder, classes, storage_options=options, **how)


def _names(seen: str | None) -> tuple[str, ...] | None:
    from ovss_ray.vocabulary import load_vocabulary

    return None if seen is None else load_vocabulary(seen).names


def _engine(name: str) -> Literal["ray", "local"]:
    if name == "ray":
        return "ray"
    if name == "local":
        return "local"
    raise SettingError(f"command line: --engine {name} is neither ray nor local")


def _tell(
    evaluations: Sequence[Evaluation],
    truth: GroundTruth,
    json_file: str | None,
    page: Path | None,
    options: dict[str, Any],
) -> None:
    """The first evaluation, and the comparison with the others if there are any, in all the ways asked for."""
    from ovss_ray.commands.scores import print_comparison, print_evaluation, print_published
    from ovss_ray.evaluation.compare import compare_evaluations

    found = evaluations[0]
    comparison = compare_evaluations(evaluations) if len(evaluations) > 1 else None
    if json_file != "-":
        print_evaluation(found)
        if comparison is not None:
            print_comparison(comparison)
        print_published(evaluations)
    if json_file is not None:
        record = _record(found, comparison)
        if json_file == "-":
            say_json(record)
        else:
            _write(json.dumps(record, indent=1), json_file, "--json")
    if page is not None:
        from ovss_ray.report.evaluation import evaluation_page

        _write(evaluation_page(found, truth, comparison=comparison, storage_options=options), str(page), "--page")


def _record(found: Evaluation, comparison: Comparison | None) -> dict[str, Any]:
    from ovss_ray.evaluation.compare import published_beside

    record = {**found.record(), "published": [asdict(score) for score in published_beside([found])]}
    if comparison is not None:
        record["comparison"] = comparison.record()
    return record


def _write(text: str, file: str, flag: str) -> None:
    try:
        Path(file).write_text(text.rstrip("\n") + "\n", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}; name another file for {flag}") from error
