"""`ovss-ray choose`: parsing and printing."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ovss_ray.flags import JOB_FLAGS, Panels, with_flags
from ovss_ray.run.logs import LogSettings, configure_logging
from ovss_ray.spec import JobSpec
from ovss_ray.terminal import complain, err, log_level, out, say, say_json, watching

_FLAGS: Panels = {
    "What to label with": ("classes", "background", "templates"),
    "Models": ("clip", "device", "dtype"),
    "Weights": JOB_FLAGS["Weights"],
    "Images": ("extensions", "uri_column", "image_column", "max_pixels", "max_bytes"),
    "Engine": ("engine", "ray_address", "batch_size", "fetch_concurrency", "fetch_attempts", "fetch_timeout_s",
               "prefetch_mib"),
    "Stores": JOB_FLAGS["Stores"],
}  # fmt: skip


@with_flags(_FLAGS)
def choose(
    input: Annotated[str, typer.Argument(metavar="INPUT", help=JobSpec.model_fields["input"].description)],
    flags: dict[str, Any],
    methods: Annotated[
        list[str],
        typer.Option(metavar="CANDIDATES", help="Methods, or method:setting=value, as in sclip,naclip,naclip:sigma=3."),
    ],
    sample: Annotated[int, typer.Option(min=1, help="Images to compare them on, drawn from the whole input.")] = 200,
    search: Annotated[
        int, typer.Option(min=0, help="Candidates to add by random search over the settings that methods declare.")
    ] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the search.")] = 0,
    judge: Annotated[
        str | None, typer.Option(help="CLIP that judges, as for --clip; by default that of the segmenters.")
    ] = None,
    image_classes: Annotated[
        str | None,
        typer.Option(help="File (.csv, .tsv, .jsonl, .parquet) with the classes of images; else the judge finds them."),
    ] = None,
    class_threshold: Annotated[
        float, typer.Option(help="Probability from which a class counts as present, where the judge finds them.")
    ] = 0.05,
    out_folder: Annotated[
        str | None, typer.Option("--out", help="Folder that keeps rewards as they come: the same command continues.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, metavar="", show_default=False, help="Log what happens."),
    ] = 0,
) -> None:
    """Choose method and settings on your own images, without annotations: by the reward of PnP-OVSS.

    Every candidate segments a sample; CLIP then judges for each class of an image whether what the mask leaves of the
    image looks more like the class than a black picture does. No ground truth is needed, and none replaced: see
    docs/choosing.md for what it can tell.

    Example: ovss-ray choose photos/ --classes voc21 --methods sclip,naclip,clearclip --search 10 --out choice
    """
    from ovss_ray.choose.choose import Question, check_question
    from ovss_ray.choose.choose import choose as choose_on
    from ovss_ray.choose.explaining import choice_record, choice_table, choice_text, label_command
    from ovss_ray.vocabulary import describe_vocabulary

    configure_logging(LogSettings(log_level(verbose, quiet=err.is_terminal)))
    spec = JobSpec.build({"input": input, "run": "RUN", **flags}, source="command line")
    question = Question(methods, sample, search, seed, judge, image_classes, class_threshold)
    complain(describe_vocabulary(check_question(spec, question, out=out_folder)))
    with watching("candidates") as watch:
        choice = choose_on(spec, question, out=out_folder, watch=watch)
    command = label_command(choice)
    if as_json:
        say_json(choice_record(choice, command))
        return
    out.print(choice_table(choice))
    say(*choice_text(choice, command).split("\n"))
