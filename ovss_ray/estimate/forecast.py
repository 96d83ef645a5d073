"""The arithmetic of an estimate: from the times of a trial to hours, price, sizes and shards of the whole job."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ovss_ray.estimate.parts import TrialPart
from ovss_ray.estimate.trial import StageTime, Trial
from ovss_ray.run.manifest import SHARDS_WANTED

SHARD_S = 180.0  # what a good shard takes: 2 to 5 minutes
SHORT_SHARD_S, LONG_SHARD_S = 60.0, 600.0  # far from that
LARGE_SHARD_BYTES = 256_000_000
SHARDS_PER_WORKER = 16  # at least, so that the last shards end at about the same time

# Two-sided 95 % quantiles of Student's t distribution, by degrees of freedom.
_STUDENT_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}


@dataclass(frozen=True)
class Interval:
    """A number and the bounds that hold it with 95 % confidence; they are None if the sample was too small to tell."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class StageRate:
    """What one stage could do on one worker if it never had to wait for another.

    Attributes:
        stage: fetch, decode, segment, encode or write.
        threads: that may be in the stage at the same time.
        ms_per_image: milliseconds that an image keeps one of them busy.
        images_per_s: of all threads together; None if no time was measured.
    """

    stage: str
    threads: int
    ms_per_image: float
    images_per_s: float | None


@dataclass(frozen=True)
class Plan:
    """What the trial does not measure: the size of the job, and what is paid.

    Attributes:
        images: of the whole job.
        shard_size: images per shard.
        gpus: GPUs that share the work; None takes as many as the job would.
        gpus_per_worker: GPUs of one worker; 0 without GPUs.
        gpu_price: of a GPU for one hour; None if unknown.
        cpus: CPU cores that share the work, where there is no GPU; None takes as many as the job would.
        cpu_price: of a CPU core for one hour; None if unknown.
    """

    images: int
    shard_size: int
    gpus: float | None
    gpus_per_worker: float
    gpu_price: float | None
    cpus: float | None = None
    cpu_price: float | None = None


@dataclass(frozen=True)
class Forecast:
    """The arithmetic's part of an `Estimate`; all hours include the start-up of the workers.

    Attributes:
        images_per_s: of one worker, once started.
        stages: in the order of the flow.
        start_up_s: seconds from the start of a worker until it takes images.
        workers: that share the work.
        gpus: that they have; 0 without GPUs.
        cpus: CPU cores that they have, those of `idle_cpus` included.
        idle_cpus: of these, cores that are asked for and too few for one more worker.
        scarce_cpus: cores that one worker took in the trial, where fewer are asked for; all times are longer for it.
            None otherwise.
        hours_one_worker: until the end with one worker.
        hours: until the end with all of them.
        gpu_hours: hours times GPUs; None without GPUs.
        cpu_hours: hours times CPU cores.
        gpu_price, cpu_price: as they were given, for one hour of one.
        price: of the hours that were given a price; None without one.
        label_map_bytes, statistics_bytes: of the whole output.
        shards, shard_size: of the run.
        shard_minutes, shard_bytes: of one full shard.
        recommended_shard_size: None if that of the job is fine.
    """

    images_per_s: Interval
    stages: tuple[StageRate, ...]
    start_up_s: float
    workers: int
    gpus: float
    cpus: float
    hours_one_worker: Interval
    hours: Interval
    gpu_hours: Interval | None
    cpu_hours: Interval
    gpu_price: float | None
    cpu_price: float | None
    price: Interval | None
    label_map_bytes: int
    statistics_bytes: int
    shards: int
    shard_size: int
    shard_minutes: float
    shard_bytes: int
    recommended_shard_size: int | None
    idle_cpus: float = 0.0
    scarce_cpus: int | None = None

    @property
    def output_bytes(self) -> int:
        """Of all shard files."""
        return self.label_map_bytes + self.statistics_bytes


def forecast(trial: Trial, plan: Plan) -> Forecast:
    """What the whole job takes and gives if it goes on as the trial did."""
    workers, gpus, cpus = _shared(trial, plan)
    scarce = not gpus and cpus < trial.cpus
    # On fewer cores than in the trial a worker takes longer in proportion: the same core hours.
    slower = trial.cpus / cpus if scarce else 1.0
    pace = _scaled(seconds_per_image(trial.parts), lambda s: s * slower)
    hours = _scaled(pace, lambda s: (trial.start_up_s + makespan_s(plan.images, plan.shard_size, workers, s)) / 3600)
    hourly = gpus * (plan.gpu_price or 0.0) + cpus * (plan.cpu_price or 0.0)
    counted = trial.sized_images
    shards = -(-plan.images // plan.shard_size)
    statistics_bytes = trial.statistics_bytes / counted
    bytes_per_image = trial.label_map_bytes / counted + statistics_bytes
    return Forecast(
        images_per_s=_rate(pace),
        stages=tuple(map(_stage_rate, trial.stages)),
        start_up_s=trial.start_up_s,
        workers=workers,
        gpus=gpus,
        cpus=cpus,
        hours_one_worker=_scaled(pace, lambda s: (trial.start_up_s + plan.images * s) / 3600),
        hours=hours,
        gpu_hours=_scaled(hours, lambda value: value * gpus) if gpus else None,
        cpu_hours=_scaled(hours, lambda value: value * cpus),
        gpu_price=plan.gpu_price,
        cpu_price=plan.cpu_price,
        price=None if plan.gpu_price is plan.cpu_price is None else _scaled(hours, lambda value: value * hourly),
        label_map_bytes=round(trial.label_map_bytes / counted * plan.images),
        statistics_bytes=round(statistics_bytes * plan.images + shards * trial.footer_bytes),
        shards=shards,
        shard_size=plan.shard_size,
        shard_minutes=plan.shard_size * pace.value / 60,
        shard_bytes=round(plan.shard_size * bytes_per_image + trial.footer_bytes),
        recommended_shard_size=recommend_shard_size(
            plan.images, plan.shard_size, workers, seconds_per_image=pace.value, bytes_per_image=bytes_per_image
        ),
        idle_cpus=0.0 if gpus else max(cpus - workers * trial.cpus, 0.0),
        scarce_cpus=trial.cpus if scarce else None,
    )


def _shared(trial: Trial, plan: Plan) -> tuple[int, float, float]:
    """Workers, GPUs and CPU cores that share the work."""
    each, asked = (plan.gpus_per_worker, plan.gpus) if plan.gpus_per_worker else (float(trial.cpus), plan.cpus)
    workers = trial.workers if asked is None else max(int(asked / each + 1e-9), 1)
    paid = workers * each if asked is None else asked
    return (workers, paid, float(workers * trial.cpus)) if plan.gpus_per_worker else (workers, 0.0, paid)


def seconds_per_image(parts: Sequence[TrialPart]) -> Interval:
    """Seconds of one worker for one image: over all parts, with bounds from the spread between them.

    The parts are random halves, quarters, ... of one random sample, so their means scatter as the mean of the whole
    sample does, only more: the bounds are those of Student's t on the logarithms of the parts' means (95 %).
    """
    value = sum(part.seconds for part in parts) / sum(part.images for part in parts)
    if len(parts) < 2:
        return Interval(value)
    spread = statistics.stdev(math.log(part.seconds / part.images) for part in parts) / math.sqrt(len(parts))
    factor = math.exp(_STUDENT_T[len(parts) - 1] * spread)
    return Interval(value, value / factor, value * factor)


def makespan_s(images: int, shard_size: int, workers: int, image_s: float) -> float:
    """Seconds until the last of equal workers has finished, if each takes the next whole shard when it is free.

    Args:
        images: of the whole job.
        shard_size: images per shard; the last shard holds what is left.
        workers: that share them.
        image_s: seconds for one image.
    """
    full, left = divmod(images, shard_size)
    rounds, busy = divmod(full, workers)
    # A last round that not all take part in leaves somebody free for the shard that is not full, and that ends earlier.
    return (rounds * shard_size + (shard_size if busy else left)) * image_s


def recommend_shard_size(
    images: int, shard_size: int, workers: int, *, seconds_per_image: float, bytes_per_image: float
) -> int | None:
    """A power of two that makes shards of about three minutes and at most 256 MB; None if `shard_size` will do.

    Shards are left as they are between one minute and ten. Shorter ones matter only if there are many for each worker,
    and are never made so long that a worker gets fewer than sixteen.
    """
    seconds = shard_size * seconds_per_image
    too_long = seconds > LONG_SHARD_S or shard_size * bytes_per_image > LARGE_SHARD_BYTES
    too_short = seconds < SHORT_SHARD_S and images > SHARDS_WANTED * workers * shard_size
    if not too_long and not too_short:
        return None
    best = min(SHARD_S / seconds_per_image, LARGE_SHARD_BYTES / max(bytes_per_image, 1.0))
    if too_short:
        best = min(best, images / (SHARDS_PER_WORKER * workers))
    recommended: int = 2 ** max(math.floor(math.log2(max(best, 1.0))), 0)
    changes = recommended < shard_size if too_long else recommended > shard_size
    return recommended if changes else None


def _scaled(interval: Interval, function: Callable[[float], float]) -> Interval:
    """What an increasing function makes of a number and its bounds."""
    low = None if interval.low is None else function(interval.low)
    high = None if interval.high is None else function(interval.high)
    return Interval(function(interval.value), low, high)


def _rate(pace: Interval) -> Interval:
    low = None if pace.high is None else 1 / pace.high
    high = None if pace.low is None else 1 / pace.low
    return Interval(1 / pace.value, low, high)


def _stage_rate(time: StageTime) -> StageRate:
    return StageRate(
        stage=time.stage,
        threads=time.threads,
        ms_per_image=1000 * time.seconds / max(time.images, 1),
        images_per_s=time.threads * time.images / time.seconds if time.seconds > 0 else None,
    )
