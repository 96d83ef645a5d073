"""What a job would take and give, from a trial on a sample: hours, price, output size, and the stage that binds."""

from __future__ import annotations

import itertools
import math
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from ovss_ray.errors import InputError, RunFailedError, SettingError
from ovss_ray.estimate.forecast import Forecast, Plan, forecast
from ovss_ray.estimate.sampling import Survey, survey
from ovss_ray.estimate.trial import Trial, first_size, run_trial
from ovss_ray.images.listing import ImageRef
from ovss_ray.naming import setting_name
from ovss_ray.run.breaker import REASONS_SHOWN
from ovss_ray.run.driver import RunInterrupted
from ovss_ray.run.engines import open_engine
from ovss_ray.run.job import ResolvedSpec, images_of, resolve
from ovss_ray.run.manifest import choose_shard_size
from ovss_ray.run.preflight import check_images, check_words, check_writable
from ovss_ray.run.progress import Reporter, SilentReporter
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import describe_vocabulary

MOST_PARTS, USUAL_PARTS, FEWEST_PARTS = 8, 4, 2
BATCHES_PER_PART = 4
SEGMENTER_FAILURES = {"crashed", "out_of_memory", "timeout"}
LISTED_PER_SAMPLE = 100  # images listed for each image of the sample where the user says how many there are
MAX_MINUTES = 10.0
LISTING_SHARE = 0.5  # of the time

Listing = Literal["whole", "head", "cut"]


@dataclass(frozen=True)
class Estimate:
    """What a job would take and give.

    Attributes:
        input: where the images are.
        images: number of them in the whole job.
        images_given: whether the user gave that number; else it is that of the listing.
        images_listed: images that were listed.
        listing: how far: "whole", "head" (enough for the sample, as the number was given), "cut" (the time was over).
        input_bytes: size of all images of the job; None if the listing does not give it.
        sample_asked: images that were to be labelled for the estimate.
        sample_images: images that were, warm-up excluded.
        sample_parts: parts that it was divided into; the intervals are from the spread between them.
        sample_seconds: that it took.
        max_minutes: that the estimate was allowed to take.
        minutes: that it took.
        stopped_early: whether the time was over before the sample was.
        failures: those that failed, as {status, error, images}, the most frequent reason first.
        failed_fraction: of the sample.
        device, dtype: that the sample was labelled with.
        binding_stage: the stage that the others wait for.
        forecast: what follows for the whole input.
    """

    input: str
    images: int
    images_given: bool
    images_listed: int
    listing: Listing
    input_bytes: int | None
    sample_asked: int
    sample_images: int
    sample_parts: int
    sample_seconds: float
    max_minutes: float
    minutes: float
    stopped_early: bool
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
    cpus: float | None = None,
    cpu_price: float | None = None,
    max_minutes: float = MAX_MINUTES,
    reporter: Reporter | None = None,
) -> Estimate:
    """Label a sample with one worker of the job, and say what the whole job would take; the run is not touched.

    The sample is spread over the whole listing, and is labelled in several parts after some that warm the worker up.
    Its files go to a temporary folder beside the run directory, which is removed.

    Args:
        spec: the job.
        sample_images: how many images to label; all, if the input has fewer.
        images: how many images the job has. The input is then a sample of them: everything is scaled up to this number,
            and of a long listing only the head is read.
        gpus: GPUs that would share the work; by default as many as the job would get now.
        gpu_price: of a GPU for one hour, in any currency.
        cpus: CPU cores that would share the work, where there is no GPU; by default as many as the job would get now.
        cpu_price: of a CPU core for one hour; where there are GPUs, it comes on top of theirs.
        max_minutes: when to stop, and to tell from what was done until then; a download of the model is not
            counted, and half of it is for listing the input.
        reporter: shows the progress; silent by default.

    Raises:
        SettingError, WeightsError: the job cannot be started, or a number makes no sense.
        InputError: no image is there, or none of the sample can be read.
        RunFailedError: none of the sample could be segmented, too little was done in time, or the worker failed.
        RunInterrupted: SIGINT or SIGTERM arrived.
    """
    asked = _Asked(sample_images, images, gpus, gpu_price, cpus, cpu_price, max_minutes)
    asked.check()
    reporter = reporter or SilentReporter()
    vocabulary = check_words(spec)
    check_writable(spec.run)
    check_images(spec)
    reporter.message(describe_vocabulary(vocabulary))
    resolved = resolve(spec, vocabulary)
    started = time.monotonic()
    try:
        found, listing, trial = _try_out(resolved, asked, started, reporter)
    except KeyboardInterrupt as stop:
        raise RunInterrupted(stop.args[0] if stop.args else signal.SIGINT, "nothing of an estimate is kept") from None
    _refuse_hopeless(trial)
    labelled = sum(trial.statuses.values())
    total = found.images if images is None else images
    return Estimate(
        input=spec.input,
        images=total,
        images_given=images is not None,
        images_listed=found.images,
        listing=listing,
        input_bytes=None if found.size_bytes is None else round(found.size_bytes / found.images * total),
        sample_asked=sample_images,
        sample_images=labelled,
        sample_parts=len(trial.parts),
        sample_seconds=sum(part.seconds for part in trial.parts),
        max_minutes=max_minutes,
        minutes=(time.monotonic() - started) / 60,
        stopped_early=trial.stopped,
        failures=[{"status": status, "error": reason, "images": count} for status, reason, count in _ranked(trial)],
        failed_fraction=1 - trial.statuses.get("ok", 0) / labelled,
        device=trial.device,
        dtype=trial.dtype,
        binding_stage=trial.binding_stage,
        forecast=forecast(trial, asked.plan(spec, total, trial.device)),
    )


@dataclass(frozen=True)
class _Asked:
    """The numbers that were given with the job."""

    sample_images: int
    images: int | None
    gpus: float | None
    gpu_price: float | None
    cpus: float | None
    cpu_price: float | None
    max_minutes: float

    def check(self) -> None:
        for name, number in asdict(self).items():
            if number is None:
                continue
            whole, free = name in ("sample_images", "images"), name.endswith("price")
            if not math.isfinite(number) or number < (1 if whole else 0) or (not free and number == 0):
                allowed = "of at least 1" if whole else "of at least 0" if free else "above 0"
                raise SettingError(f"{setting_name(name)} is {number:g}; give a number {allowed}")

    def check_device(self, device: str) -> None:
        """Refuses numbers about what the job does not use, before time is spent: none can be told from the other."""
        if device == "cpu" and (self.gpus is not None or self.gpu_price is not None):
            given = setting_name("gpu_price" if self.gpus is None else "gpus")
            raise SettingError(
                f"{given} is given, but there is no GPU here, and how fast one is cannot be told from a CPU: estimate "
                f"on a machine that has one, or say {setting_name('cpus')} and {setting_name('cpu_price')}"
            )
        if device == "cuda" and self.cpus is not None:
            raise SettingError(
                f"{setting_name('cpus')} is given, but the job runs on GPUs here; say {setting_name('gpus')} instead"
            )

    def plan(self, spec: JobSpec, images: int, device: str) -> Plan:
        shard_size = spec.shard_size
        if shard_size == "auto":
            shard_size, _ = choose_shard_size(itertools.repeat(ImageRef(""), images))
        gpus_per_worker = spec.gpus_per_worker
        if device == "cpu" or gpus_per_worker == "auto":
            gpus_per_worker = float(device == "cuda")
        return Plan(images, shard_size, self.gpus, gpus_per_worker, self.gpu_price, self.cpus, self.cpu_price)


def _try_out(
    resolved: ResolvedSpec, asked: _Asked, started: float, reporter: Reporter
) -> tuple[Survey, Listing, Trial]:
    """List the input and label the sample."""
    spec, seconds = resolved.spec, 60 * asked.max_minutes
    images = images_of(spec)
    first = next(images)
    with reporter.doing("starting Ray" if spec.engine == "ray" else "loading PyTorch"):
        engine = open_engine(spec)
    try:
        asked.check_device(engine.device)
        head = None if asked.images is None else LISTED_PER_SAMPLE * asked.sample_images
        timed = _Timed(itertools.islice(itertools.chain([first], images), head), started + LISTING_SHARE * seconds)
        found = _survey(reporter.counting(timed), first, asked.sample_images, spec.batch_size)
        chosen, size = divide(found.sample, asked.sample_images, spec.batch_size)
        trial = run_trial(resolved, chosen, size, engine=engine, deadline=started + seconds, reporter=reporter)
    finally:
        engine.close()
    return found, "cut" if timed.is_cut else "head" if found.images == head else "whole", trial


def _ranked(trial: Trial) -> list[tuple[str, str, int]]:
    """Status, reason and number of images, the most frequent first."""
    ranked = sorted(trial.failures.items(), key=lambda item: (-item[1], item[0]))
    return [(status, reason, count) for (status, reason), count in ranked]


def divide(found: Sequence[ImageRef], sample_images: int, batch_size: int) -> tuple[list[ImageRef], int]:
    """Divide a random selection into what warms up and parts of equal size.

    Returns:
        the images, those for warming up first (taken twice if there are too few): a first shard, and one more part than
        the sample has; and the number of images per part.
    """
    sample = list(found[:sample_images])
    size = part_size(len(sample), batch_size)
    wanted = size + first_size(size, batch_size)
    warm_up = itertools.islice(itertools.chain(found[sample_images:], itertools.cycle(sample)), wanted)
    return [*warm_up, *sample], size


def part_size(sample_images: int, batch_size: int) -> int:
    """Images per part: at least four micro-batches while that makes four parts; eight parts at most.

    Two parts even of a few images: their spread is what an interval comes from, and it is a wide one.
    """
    long_parts = min(sample_images // (BATCHES_PER_PART * batch_size), MOST_PARTS)
    short_parts = min(sample_images // batch_size, USUAL_PARTS)
    return -(-sample_images // max(long_parts, short_parts, min(sample_images, FEWEST_PARTS)))


class _Timed:
    """Images until a time is over.

    Attributes:
        is_cut: whether it was, before the images were.
    """

    def __init__(self, images: Iterable[ImageRef], deadline: float) -> None:
        self._images = images
        self._deadline = deadline
        self.is_cut = False

    def __iter__(self) -> Iterator[ImageRef]:
        for image in self._images:
            yield image
            if time.monotonic() > self._deadline:
                self.is_cut = True
                return


def _survey(images: Iterable[ImageRef], first: ImageRef, sample_images: int, batch_size: int) -> Survey:
    """The sample, with what warms up."""
    part = part_size(sample_images, batch_size)
    # A tar or Parquet file is read in long pieces: images that are far apart in it would cost more than in a run.
    block = 1 if first.offset is None else part
    return survey(images, wanted=sample_images + part + first_size(part, batch_size), block=block)


def _refuse_hopeless(trial: Trial) -> None:
    if trial.statuses.get("ok"):
        return
    reasons = "; ".join(f"{count:,} {status}: {reason}" for status, reason, count in _ranked(trial)[:REASONS_SHOWN])
    sentence = f"none of the {sum(trial.statuses.values()):,} images of the sample could be labelled ({reasons})"
    if {status for status, _ in trial.failures} <= SEGMENTER_FAILURES:
        raise RunFailedError(f"{sentence}; look at the method and its settings")
    raise InputError(f"{sentence}; check the input, and the permission to read it")
