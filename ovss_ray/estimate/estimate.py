"""What a job would take and give, from a trial on a sample: hours, price, output size, and the stage that binds."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Sequence
from dataclasses import dataclass

from ovss_ray.errors import InputError, RunFailedError, SettingError
from ovss_ray.estimate.forecast import Forecast, Plan, forecast
from ovss_ray.estimate.sampling import Survey, survey
from ovss_ray.estimate.trial import Trial, run_trial
from ovss_ray.images.listing import ImageRef
from ovss_ray.run.breaker import REASONS_SHOWN
from ovss_ray.run.driver import RunInterrupted
from ovss_ray.run.job import images_of, resolve
from ovss_ray.run.manifest import choose_shard_size
from ovss_ray.run.preflight import check_images, check_words, check_writable
from ovss_ray.run.progress import Reporter, SilentReporter
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import describe_vocabulary

MOST_PARTS, FEWEST_PARTS = 8, 4
BATCHES_PER_PART = 4
SEGMENTER_FAILURES = {"crashed", "out_of_memory", "timeout"}
LISTED_PER_SAMPLE = 100  # images listed for each image of the sample where the user says how many there are


@dataclass(frozen=True)
class Estimate:
    """What a job would take and give.

    Attributes:
        input: where the images are.
        images: number of them.
        images_listed: of which so many were listed; fewer if the number was given.
        input_bytes: size of all images; None if the listing does not give it.
        sample_images: images that were labelled for the estimate, warm-up excluded.
        sample_parts: parts that it was divided into; the intervals are from the spread between them.
        sample_seconds: that it took.
        failures: those that failed, as {status, error, images}, the most frequent reason first.
        failed_fraction: of the sample.
        device, dtype: that the sample was labelled with.
        binding_stage: the stage that the others wait for.
        forecast: what follows for the whole input.
    """

    input: str
    images: int
    images_listed: int
    input_bytes: int | None
    sample_images: int
    sample_parts: int
    sample_seconds: float
    failures: list[dict[str, str | int]]
    failed_fraction: float
    device: str
    dtype: str
    binding_stage: str | None
    forecast: Forecast


def estimate_job(
    spec: JobSpec,
    *,
    sample_images: int = 128,
    images: int | None = None,
    gpus: float | None = None,
    gpu_price: float | None = None,
    reporter: Reporter | None = None,
) -> Estimate:
    """Label a sample with one worker of the job, and say what the whole job would take; the run is not touched.

    The sample is spread over the whole listing, and is labelled in several parts after one more that warms the worker
    up. Its files go to a temporary folder beside the run directory, which is removed.

    Args:
        spec: the job.
        sample_images: how many images to label.
        images: how many images the job has, if that is known: only the head of the listing is then read.
        gpus: GPUs (without any: CPU workers) that would share the work; by default as many as the job would get now.
        gpu_price: of one of them for one hour, in any currency.
        reporter: shows the progress; silent by default.

    Raises:
        SettingError, WeightsError: the job cannot be started.
        InputError: no image is there, or none of the sample can be read.
        RunFailedError: none of the sample could be segmented, or the worker failed.
        RunInterrupted: SIGINT or SIGTERM arrived.
    """
    _check(sample_images=sample_images, images=images, gpus=gpus, gpu_price=gpu_price)
    reporter = reporter or SilentReporter()
    vocabulary = check_words(spec)
    check_writable(spec.run)
    check_images(spec)
    reporter.message(describe_vocabulary(vocabulary))
    resolved = resolve(spec, vocabulary)
    try:
        found, total = _survey(resolved.spec, sample_images, images, reporter)
        chosen, size = divide(found.sample, sample_images, spec.batch_size)
        trial = run_trial(resolved, chosen, size, reporter=reporter)
    except KeyboardInterrupt as stop:
        raise RunInterrupted(stop.args[0] if stop.args else signal.SIGINT, "nothing of an estimate is kept") from None
    _refuse_hopeless(trial)
    labelled = sum(part.images for part in trial.parts)
    return Estimate(
        input=spec.input,
        images=total,
        images_listed=found.images,
        input_bytes=None if found.size_bytes is None else round(found.size_bytes / found.images * total),
        sample_images=labelled,
        sample_parts=len(trial.parts),
        sample_seconds=sum(part.seconds for part in trial.parts),
        failures=[{"status": status, "error": reason, "images": count} for status, reason, count in _ranked(trial)],
        failed_fraction=1 - trial.statuses.get("ok", 0) / labelled,
        device=trial.device,
        dtype=trial.dtype,
        binding_stage=trial.binding_stage,
        forecast=forecast(trial, _plan(spec, total, trial.device, gpus, gpu_price)),
    )


def _plan(spec: JobSpec, images: int, device: str, gpus: float | None, gpu_price: float | None) -> Plan:
    shard_size = spec.shard_size
    if shard_size == "auto":
        shard_size, _ = choose_shard_size(itertools.repeat(ImageRef(""), images))
    gpus_per_worker = spec.gpus_per_worker
    if device == "cpu" or gpus_per_worker == "auto":
        gpus_per_worker = float(device == "cuda")
    return Plan(images, shard_size, gpus, gpus_per_worker, gpu_price)


def _ranked(trial: Trial) -> list[tuple[str, str, int]]:
    """Status, reason and number of images, the most frequent first."""
    ranked = sorted(trial.failures.items(), key=lambda item: (-item[1], item[0]))
    return [(status, reason, count) for (status, reason), count in ranked]


def divide(found: Sequence[ImageRef], sample_images: int, batch_size: int) -> tuple[list[ImageRef], int]:
    """Divide a random selection into parts of equal size, of which one more than the sample's is for warming up.

    Returns:
        the images, those for warming up first (taken twice if there are too few), and the number of images per part.
    """
    sample = list(found[:sample_images])
    size = part_size(len(sample), batch_size)
    warm_up = itertools.islice(itertools.chain(found[sample_images:], itertools.cycle(sample)), size)
    return [*warm_up, *sample], size


def part_size(sample_images: int, batch_size: int) -> int:
    """Images per part: at least four micro-batches while that makes four parts; eight parts at most."""
    long_parts = min(sample_images // (BATCHES_PER_PART * batch_size), MOST_PARTS)
    short_parts = min(sample_images // batch_size, FEWEST_PARTS)
    return -(-sample_images // max(long_parts, short_parts, 1))


def _survey(spec: JobSpec, sample_images: int, images: int | None, reporter: Reporter) -> tuple[Survey, int]:
    """The sample with what warms up, and the number of images of the job."""
    listing = images_of(spec)
    first = next(listing)
    part = part_size(sample_images, spec.batch_size)
    # A tar or Parquet file is read in long pieces: images that are far apart in it would cost more than in a run.
    block = 1 if first.offset is None else part
    head = None if images is None else LISTED_PER_SAMPLE * sample_images
    refs = itertools.islice(itertools.chain([first], listing), head)
    found = survey(reporter.counting(refs), wanted=sample_images + part, block=block)
    if images is None or found.images < LISTED_PER_SAMPLE * sample_images:
        return found, found.images
    return found, images


def _check(**numbers: float | None) -> None:
    for name, number in numbers.items():
        lowest = 0 if name == "gpu_price" else 1
        if number is not None and number < lowest:
            raise SettingError(f"{name} is {number:g}; give a number of at least {lowest}")


def _refuse_hopeless(trial: Trial) -> None:
    if trial.statuses.get("ok"):
        return
    reasons = "; ".join(f"{count:,} {status}: {reason}" for status, reason, count in _ranked(trial)[:REASONS_SHOWN])
    sentence = f"none of the {sum(trial.statuses.values()):,} images of the sample could be labelled ({reasons})"
    if {status for status, _ in trial.failures} <= SEGMENTER_FAILURES:
        raise RunFailedError(f"{sentence}; look at the method and its settings")
    raise InputError(f"{sentence}; check the input, and the permission to read it")
