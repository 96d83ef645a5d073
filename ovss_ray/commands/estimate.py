"""`ovss-ray estimate`: parsing and printing."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from ovss_ray.flags import JOB_FLAGS, AsJson, Verbose, with_flags
from ovss_ray.spec import JobSpec
from ovss_ray.terminal import reporter_for, say, say_json


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
        int | None,
        typer.Option(
            min=1,
            help="Number of images of the job: INPUT is a sample of them, and everything is scaled up to this number. "
            "Of a long listing only the head is read.",
        ),
    ] = None,
    gpus: Annotated[float | None, typer.Option(help="GPUs to share the work; by default those that are here.")] = None,
    gpu_price: Annotated[float | None, typer.Option(help="Price of a GPU for an hour.")] = None,
    cpus: Annotated[
        float | None,
        typer.Option(help="CPU cores to share the work, without GPUs; by default those that are here."),
    ] = None,
    cpu_price: Annotated[
        float | None, typer.Option(help="Price of a CPU core for an hour; on top of that of GPUs.")
    ] = None,
    max_minutes: Annotated[float, typer.Option(help="When to stop, and to tell from what was done until then.")] = 10.0,
    as_json: AsJson = False,
    verbose: Verbose = 0,
) -> None:
    """Time a sample of a job before the money is spent: hours, GPU or CPU hours, price, output size, and what binds.

    Lists the input, and labels a random sample with one worker of the job; the run directory is not touched.

    Examples: ovss-ray estimate s3://bucket/images --run s3://bucket/runs/first --classes voc21 --gpus 8 --gpu-price 2.5

    ovss-ray estimate 200-photos/ --images 10000000 --classes voc21 --cpus 64 --cpu-price 0.04
    """
    from ovss_ray.estimate.estimate import estimate_job
    from ovss_ray.estimate.explaining import estimate_record, estimate_text

    given = {name: value for name, value in (("input", input), ("run", run)) if value}
    if job is None:
        anywhere = str(Path(tempfile.gettempdir()) / "ovss-ray-run")
        spec = JobSpec.build({"run": anywhere, **given, **flags}, source="command line")
    else:
        spec = JobSpec.from_file(job, **given, **flags)
    found = estimate_job(
        spec,
        sample_images=sample_images,
        images=images,
        gpus=gpus,
        gpu_price=gpu_price,
        cpus=cpus,
        cpu_price=cpu_price,
        max_minutes=max_minutes,
        reporter=reporter_for(spec, verbose),
    )
    if as_json:
        say_json(estimate_record(found, spec))
    else:
        say(*estimate_text(found, spec).split("\n"))
