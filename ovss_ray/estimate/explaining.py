"""An estimate in words: its table, the stages, what would help, and what it cannot know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from ovss_ray.estimate.estimate import Estimate
from ovss_ray.estimate.forecast import Forecast, Interval, StageRate
from ovss_ray.naming import setting_name
from ovss_ray.run.progress import duration
from ovss_ray.spec import JobSpec

SURE_AFTER_S = 10.0

STAGE_NAMES = {"write": "put"}


def estimate_text(estimate: Estimate, spec: JobSpec) -> str:
    """All that there is to say, as text of some twenty lines."""
    rows = describe(estimate)
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {text}" for name, text in rows]
    lines += ["", f"{'stage':<{width}}  {'threads':>7}  {'ms/image':>10}  {'images/s':>10}  (if it never had to wait)"]
    for name, threads, milliseconds, rate in map(describe_stage, estimate.forecast.stages):
        lines.append(f"{name:<{width}}  {threads:>7}  {milliseconds:>10}  {rate:>10}")
    lines += ["", advise(estimate, spec)]
    if estimate.forecast.images_per_s.low is not None:
        lines.append(
            f"In brackets: 95 % intervals, from the spread between {estimate.sample_parts} parts of the sample."
        )
    lines += [
        f"{failure['images']:>8,} of the sample failed, {failure['status']}: {failure['error']}"
        for failure in estimate.failures
    ]
    return "\n".join([*lines, *(f"Note: {note}." for note in caveats(estimate, spec))])


def estimate_record(estimate: Estimate, spec: JobSpec) -> dict[str, Any]:
    """The same as a record that can be written as JSON."""
    return {**asdict(estimate), "advice": advise(estimate, spec), "notes": caveats(estimate, spec)}


def describe(estimate: Estimate) -> list[tuple[str, str]]:
    """Name and text of everything an estimate says about the whole input."""
    ahead = estimate.forecast
    rows = [
        ("images", _images(estimate)),
        ("sample", _sample(estimate)),
        ("start-up", f"{duration(ahead.start_up_s)} for each worker: process, model, vocabulary"),
        ("one worker", f"{_number(ahead.images_per_s)} images/s, {_hours(ahead.hours_one_worker)}"),
    ]
    if ahead.workers > 1:
        rows.append((f"{ahead.workers:,} workers", f"{_hours(ahead.hours)}, on {_machines(ahead)}"))
    if ahead.gpu_hours is not None:
        rows.append(("GPU hours", _number(ahead.gpu_hours)))
    if ahead.gpu_hours is None or ahead.cpu_price is not None:
        rows.append(("CPU core hours", _number(ahead.cpu_hours)))
    if ahead.price is not None:
        rows.append(("price", f"{_number(ahead.price)}{_per_what(ahead)}"))
    parts = f"{size(ahead.label_map_bytes)} label maps, {size(ahead.statistics_bytes)} statistics"
    rows.append(("output", f"{size(ahead.output_bytes)}: {parts}"))
    shard = f"{ahead.shards:,} of {ahead.shard_size:,} images: {duration(60 * ahead.shard_minutes)} and "
    rows.append(("shards", f"{shard}{size(ahead.shard_bytes)} each{_better_shards(ahead.recommended_shard_size)}"))
    return rows


def describe_stage(stage: StageRate) -> tuple[str, str, str, str]:
    """Name, threads, milliseconds and images per second of a stage."""
    rate = "-" if stage.images_per_s is None else f"{stage.images_per_s:,.1f}"
    return STAGE_NAMES.get(stage.stage, stage.stage), str(stage.threads), f"{stage.ms_per_image:,.2f}", rate


def advise(estimate: Estimate, spec: JobSpec) -> str:
    """Which stage binds, and what would help."""
    ahead = estimate.forecast
    if estimate.binding_stage is None:
        return "No stage binds: nothing reached the segmenter."
    rates = {stage.stage: stage.images_per_s for stage in ahead.stages}
    if (rates["write"] or ahead.images_per_s.value) < ahead.images_per_s.value:
        return (
            f"Putting shards takes longer than computing them: use a larger {setting_name('shard_size')}, or "
            "another place for the run."
        )
    more_cores = (
        "more CPU cores for each worker (a larger machine per GPU)" if estimate.device == "cuda" else "more cores"
    )
    help_for: dict[str, Callable[[], str]] = {
        "fetch": lambda: (
            f"more requests at a time ({setting_name('fetch_concurrency')}, now {spec.fetch_concurrency}), workers in "
            "the region of the images, or small images packed into tars"
        ),
        "decode": lambda: f"{more_cores}, or smaller copies of the images",
        "encode": lambda: more_cores + ("" if spec.label_map == "zstd" else ", or --label-map zstd, which is faster"),
        "segment": lambda: _faster_segmenter(estimate, spec),
    }
    return f"Bound by {estimate.binding_stage}. What would help: {help_for[estimate.binding_stage]()}."


def caveats(estimate: Estimate, spec: JobSpec) -> list[str]:
    """What limits this estimate, what it noticed, and what no sample can tell."""
    ahead = estimate.forecast
    notes = _about_the_sample(estimate)
    if estimate.failed_fraction > spec.max_failed_fraction:
        notes.append(
            f"{estimate.failed_fraction:.0%} of the sample failed: the run would stop at "
            f"{setting_name('max_failed_fraction')} = {spec.max_failed_fraction:g}"
        )
    if ahead.images_per_s.low is None:
        notes.append("the sample was too small for an interval; give a larger --sample-images")
    elif estimate.sample_seconds < SURE_AFTER_S and not estimate.stopped_early:
        notes.append(
            f"the sample took {estimate.sample_seconds:.1f} s only, warm-up excluded; a larger --sample-images "
            "makes the estimate surer"
        )
    if estimate.device == "cpu" and ahead.workers > 1:
        notes.append("one worker ran alone; several on one machine also share its memory bandwidth")
    if ahead.scarce_cpus is not None:
        notes.append(
            f"{setting_name('cpus')} {ahead.cpus:g} is less than the {ahead.scarce_cpus} cores of the worker that was "
            f"timed: one is taken to be slower in proportion, and would need {setting_name('cpus_per_worker')} "
            f"{ahead.cpus:g}"
        )
    if ahead.idle_cpus:
        notes.append(
            f"{ahead.idle_cpus:g} of {ahead.cpus:g} CPU cores are paid for and idle: one worker takes "
            f"{(ahead.cpus - ahead.idle_cpus) / ahead.workers:g}"
        )
    if spec.gpus_per_worker != "auto" and 0 < spec.gpus_per_worker < 1 and estimate.device == "cuda":
        notes.append("one worker had its GPU alone; those that share a GPU are each slower")
    notes.append(
        "not knowable from a sample: throttling of the store when all workers read at once, other tenants of the "
        "machines and the network, spot interruptions (each costs the worker up to two shards), slower nodes"
    )
    return notes


def size(size_bytes: float) -> str:
    """Bytes for people: "740 B", "1.2 MB", "35 GB"."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if size_bytes < 999.5 or unit == "TB":
            break
        size_bytes /= 1000
    return f"{size_bytes:.0f} {unit}" if size_bytes >= 10 or unit == "B" else f"{size_bytes:.1f} {unit}"


def _images(estimate: Estimate) -> str:
    known = "" if estimate.input_bytes is None else f", {size(estimate.input_bytes)}"
    if estimate.images_given:
        return f"{estimate.images:,}{known} (--images); {estimate.images_listed:,} of them listed in {estimate.input}"
    least = "at least " if estimate.listing == "cut" else ""
    return f"{least}{estimate.images:,}{known} in {estimate.input}"


def _sample(estimate: Estimate) -> str:
    failed = f", {estimate.failed_fraction:.1%} failed" if estimate.failed_fraction else ", none failed"
    listing = "whole listing" if estimate.listing == "whole" else "head of the listing"
    asked = "" if estimate.sample_images == estimate.sample_asked else f" of {estimate.sample_asked:,}"
    return (
        f"{estimate.sample_images:,}{asked} images in {duration(60 * estimate.minutes)} all told, spread over the "
        f"{listing} by a hash, on {estimate.device} in {estimate.dtype}{failed}; warm-up not counted"
    )


def _about_the_sample(estimate: Estimate) -> list[str]:
    """How the sample stands to the job."""
    notes = []
    if estimate.stopped_early:
        notes.append(
            f"stopped at --max-minutes {estimate.max_minutes:g}, with {estimate.sample_images:,} of "
            f"{min(estimate.sample_asked, estimate.images_listed):,} images of the sample labelled: intervals are "
            "wider for it"
        )
    if estimate.listing == "cut":
        cut = f"the listing was stopped after {estimate.images_listed:,} images, for --max-minutes"
        notes.append(cut if estimate.images_given else f"{cut}: there are more, say with --images how many")
    elif estimate.listing == "head" and estimate.images_listed < estimate.images:
        notes.append(f"the sample is from the first {estimate.images_listed:,} images of the listing")
    elif estimate.images_given and estimate.images_listed != estimate.images:
        notes.append(
            f"the input has {estimate.images_listed:,} images; all else is scaled up to the {estimate.images:,} of "
            "--images, and right as far as those are like these"
        )
    if estimate.listing == "whole" and estimate.images_listed < estimate.sample_asked:
        notes.append(
            f"the input has fewer images ({estimate.images_listed:,}) than --sample-images "
            f"({estimate.sample_asked:,}), so intervals are wide"
        )
    return notes


def _machines(ahead: Forecast) -> str:
    return f"{ahead.gpus:g} GPUs" if ahead.gpus else f"{ahead.cpus:g} CPU cores"


def _per_what(ahead: Forecast) -> str:
    """What the prices are of."""
    prices = ((ahead.gpu_price if ahead.gpus else None, "GPU hour"), (ahead.cpu_price, "CPU core hour"))
    said = [f"{price:g} a {what}" for price, what in prices if price is not None]
    alone = "; without the GPUs" if ahead.gpus and ahead.gpu_price is None else ""
    return f", at {' and '.join(said)}{alone}"


def _faster_segmenter(estimate: Estimate, spec: JobSpec) -> str:
    if estimate.device == "cpu":
        return "a GPU, or fewer pixels for the network (settings such as short_side, stride, crop=0)"
    faster = [f"a larger {setting_name('batch_size')} (now {spec.batch_size}) if the GPU has memory left"]
    if estimate.dtype == "float32":
        faster.append("dtype float16")
    return ", ".join([*faster, "fewer pixels for the network (short_side, stride), or more GPUs"])


def _better_shards(recommended: int | None) -> str:
    return "" if recommended is None else f"; better --shard-size {recommended}"


def _hours(interval: Interval) -> str:
    return _shown(interval, lambda hours: duration(3600 * hours))


def _number(interval: Interval) -> str:
    return _shown(interval, _rounded)


def _shown(interval: Interval, show: Callable[[float], str]) -> str:
    if interval.low is None or interval.high is None:
        return show(interval.value)
    return f"{show(interval.value)} ({show(interval.low)} to {show(interval.high)})"


def _rounded(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
