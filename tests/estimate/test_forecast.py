"""From measured times to hours, price, sizes and shards: numbers worked out by hand, and independent references."""

from __future__ import annotations

import heapq
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from ovss_ray.estimate.forecast import Interval, Plan, forecast, makespan_s, recommend_shard_size, seconds_per_image
from ovss_ray.estimate.parts import TrialPart, windows
from ovss_ray.estimate.trial import StageTime, Trial
from ovss_ray.run.stats import WorkerProgress

TRIAL = Trial(
    device="cuda",
    dtype="float16",
    workers=3,
    cpus=4,
    start_up_s=16.0,
    parts=(TrialPart(10, 1.0), TrialPart(10, 1.0)),
    stages=(StageTime("fetch", 4, 20, 2.0), StageTime("segment", 1, 10, 0.8), StageTime("write", 1, 20, 0.0)),
    binding_stage="segment",
    statuses={"ok": 20},
    failures={},
    sized_images=20,
    label_map_bytes=2000,
    statistics_bytes=400,
    footer_bytes=50,
)


def test_a_forecast_worked_out_by_hand() -> None:
    ahead = forecast(TRIAL, Plan(images=1000, shard_size=100, gpus=4, gpus_per_worker=0.5, gpu_price=2.5))
    assert ahead.images_per_s == Interval(10.0, 10.0, 10.0)
    assert (ahead.workers, ahead.gpus) == (8, 4)
    # Ten shards of ten seconds for eight workers: two rounds; 16 s to start.
    assert ahead.hours.value == pytest.approx(36 / 3600)
    assert ahead.gpu_hours is not None
    assert ahead.gpu_hours.value == pytest.approx(0.04)
    assert (ahead.cpus, ahead.cpu_hours.value) == (32, pytest.approx(0.32))
    assert ahead.price is not None
    assert ahead.price.value == pytest.approx(0.1)
    assert ahead.hours_one_worker.value == pytest.approx(116 / 3600)
    assert (ahead.shards, ahead.shard_size) == (10, 100)
    assert ahead.shard_minutes == pytest.approx(1 / 6)
    assert (ahead.label_map_bytes, ahead.statistics_bytes, ahead.output_bytes) == (100_000, 20_500, 120_500)
    assert ahead.shard_bytes == 12_050


def test_rates_of_stages_worked_out_by_hand() -> None:
    fetch, segment, write = forecast(TRIAL, Plan(1000, 100, 1, 1.0, None)).stages
    assert (fetch.ms_per_image, fetch.images_per_s) == (pytest.approx(100.0), pytest.approx(40.0))
    assert (segment.ms_per_image, segment.images_per_s) == (pytest.approx(80.0), pytest.approx(12.5))
    assert (write.ms_per_image, write.images_per_s) == (0.0, None)


def test_without_a_number_of_gpus_the_job_gets_what_it_would_get() -> None:
    shared = forecast(TRIAL, Plan(1000, 100, None, 0.5, None))
    assert (shared.workers, shared.gpus) == (3, 1.5)
    on_cpus = forecast(TRIAL, Plan(1000, 100, None, 0.0, None))
    assert (on_cpus.workers, on_cpus.gpus, on_cpus.cpus) == (3, 0, 12)
    assert (on_cpus.gpu_hours, on_cpus.price) == (None, None)


def test_cpu_hours_are_those_of_cores() -> None:
    on_cpus = forecast(TRIAL, Plan(1000, 100, None, 0.0, None, cpus=18, cpu_price=0.05))
    assert (on_cpus.workers, on_cpus.cpus) == (4, 18)  # two cores are paid for and too few for a fifth worker
    assert on_cpus.hours.value == pytest.approx((16 + 30) / 3600)  # ten shards of ten seconds for four workers
    assert on_cpus.cpu_hours.value == pytest.approx(18 * 46 / 3600)
    assert on_cpus.price is not None
    assert on_cpus.price.value == pytest.approx(0.05 * 18 * 46 / 3600)


def test_fewer_cores_than_one_worker_had_take_longer_and_cost_the_same() -> None:
    four = forecast(TRIAL, Plan(1000, 100, None, 0.0, None, cpus=4, cpu_price=0.05))
    one = forecast(TRIAL, Plan(1000, 100, None, 0.0, None, cpus=1, cpu_price=0.05))
    assert (four.workers, four.cpus, four.scarce_cpus) == (1, 4, None)
    assert (one.workers, one.cpus, one.scarce_cpus) == (1, 1, 4)
    assert one.images_per_s.value == pytest.approx(2.5)  # a quarter of the trial's
    assert one.hours.value == one.hours_one_worker.value == pytest.approx((16 + 400) / 3600)
    assert one.cpu_hours.value == pytest.approx(416 / 3600)
    assert one.price is not None
    assert one.price.value == pytest.approx(0.05 * 416 / 3600)
    assert one.shard_minutes == pytest.approx(40 / 60)


def test_cores_too_few_for_one_more_worker_are_told() -> None:
    assert forecast(TRIAL, Plan(1000, 100, None, 0.0, None, cpus=6)).idle_cpus == 2
    assert forecast(TRIAL, Plan(1000, 100, None, 0.0, None, cpus=8)).idle_cpus == 0
    assert forecast(TRIAL, Plan(1000, 100, 1, 1.0, None)).idle_cpus == 0


def test_cores_may_cost_on_top_of_gpus() -> None:
    both = forecast(TRIAL, Plan(1000, 100, 4, 0.5, 2.5, cpu_price=0.1))
    assert both.price is not None
    assert both.price.value == pytest.approx(0.01 * (4 * 2.5 + 32 * 0.1))
    cores = forecast(TRIAL, Plan(1000, 100, 4, 0.5, None, cpu_price=0.1))
    assert cores.price is not None
    assert cores.price.value == pytest.approx(0.01 * 32 * 0.1)


@pytest.mark.parametrize(("gpus", "gpus_per_worker", "workers"), [(8, 1, 8), (8, 0.1, 80), (8, 2, 4), (1, 2, 1)])
def test_workers_on_a_number_of_gpus(gpus: float, gpus_per_worker: float, workers: int) -> None:
    assert forecast(TRIAL, Plan(10**6, 100, gpus, gpus_per_worker, None)).workers == workers


def test_bounds_follow_from_the_parts_by_hand() -> None:
    # 0.1 and 0.4 s an image: the logarithms differ by ln 4, so their mean has a standard error of ln 2.
    pace = seconds_per_image([TrialPart(10, 1.0), TrialPart(10, 4.0)])
    assert pace.value == pytest.approx(0.25)
    assert (pace.low, pace.high) == (pytest.approx(0.25 / 2**12.706), pytest.approx(0.25 * 2**12.706))


@pytest.mark.parametrize("count", range(2, 9))
def test_bounds_are_those_of_scipy(count: int, rng: np.random.Generator) -> None:
    seconds = rng.uniform(1, 3, count)
    pace = seconds_per_image([TrialPart(5, float(value)) for value in seconds])
    logs = np.log(seconds / 5)
    low, high = stats.t.interval(0.95, count - 1, loc=0, scale=stats.sem(logs))
    assert pace.value == pytest.approx(seconds.mean() / 5)
    assert pace.low == pytest.approx(pace.value * math.exp(low), rel=1e-3)
    assert pace.high == pytest.approx(pace.value * math.exp(high), rel=1e-3)


def test_one_part_gives_no_bounds() -> None:
    assert seconds_per_image([TrialPart(4, 2.0)]) == Interval(0.5, None, None)
    trial = Trial(**{**vars(TRIAL), "parts": (TrialPart(10, 1.0),)})
    alone = forecast(trial, Plan(1000, 100, 1, 1.0, 2.5))
    assert (alone.images_per_s.low, alone.hours.low, alone.cpu_hours.high) == (None, None, None)


def history(*seen: tuple[float, int]) -> list[tuple[float, WorkerProgress]]:
    return [(at, WorkerProgress(images={"ok": images})) for at, images in seen]


def test_work_that_was_cut_off_is_divided_by_what_was_seen_of_it() -> None:
    # One image a second from the eighth second on, looked at every two seconds; 8 images warm up, 32 are four parts.
    parts, before = windows(history(*((t, max(t - 8, 0)) for t in range(0, 50, 2))), 8)
    assert [(part.images, part.seconds) for part in parts] == [(8, 8)] * 4
    assert before.images == {"ok": 8}


@pytest.mark.parametrize("seen", [[], [(0, 0)], [(0, 0), (9, 3)], [(0, 0), (5, 8), (9, 8)]])
def test_hardly_any_work_is_no_part(seen: list[tuple[float, int]]) -> None:
    assert windows(history(*seen), 8)[0] == ()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=60), st.integers(1, 16))
def test_no_image_and_no_second_is_counted_twice(steps: list[int], first: int) -> None:
    counts = [sum(steps[: index + 1]) for index in range(len(steps))]
    parts, before = windows(history(*enumerate(counts)), first)
    if parts:
        done = before.images["ok"]
        assert first <= done
        assert sum(part.images for part in parts) == counts[-1] - done
        assert sum(part.seconds for part in parts) == counts.index(counts[-1]) - counts.index(done)
        assert len(parts) <= 8


def test_a_slow_bound_of_time_is_a_low_bound_of_speed() -> None:
    trial = Trial(**{**vars(TRIAL), "parts": (TrialPart(10, 1.0), TrialPart(10, 1.1), TrialPart(10, 0.9))})
    ahead = forecast(trial, Plan(10**6, 1000, 8, 1.0, 2.5))
    assert ahead.price is not None
    for interval in (ahead.images_per_s, ahead.hours, ahead.hours_one_worker, ahead.gpu_hours, ahead.price):
        assert interval is not None
        assert interval.low is not None
        assert interval.high is not None
        assert interval.low < interval.value < interval.high


def simulated_makespan(images: int, shard_size: int, workers: int) -> int:
    """Each worker takes the next shard as soon as it is free."""
    free_at = [0] * workers
    for first in range(0, images, shard_size):
        heapq.heapreplace(free_at, free_at[0] + min(shard_size, images - first))
    return max(free_at)


@given(st.integers(1, 500), st.integers(1, 60), st.integers(1, 20))
def test_the_end_is_that_of_a_simulation(images: int, shard_size: int, workers: int) -> None:
    expected = 0.5 * simulated_makespan(images, shard_size, workers)
    assert makespan_s(images, shard_size, workers, 0.5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("images", "shard_size", "workers", "image_s", "image_bytes", "expected"),
    [
        (10**7, 1024, 8, 0.18, 10_000, None),  # three minutes, 10 MB: as it should be
        (10**7, 1024, 8, 0.001, 10_000, 16384),  # 1 s; three minutes would be 180,000 images, but 25,600 are 256 MB
        (10**7, 1024, 8, 0.02, 1_000, 8192),  # 20 s; three minutes are 9,000 images
        (400, 16, 1, 0.1, 10_000, None),  # 2 s, but only 25 shards
        (200_000, 1024, 2, 0.02, 1_000, 4096),  # 20 s; sixteen shards for each worker are 6,250 images
        (10**7, 1024, 8, 10.0, 10_000, 16),  # almost three hours; three minutes are 18 images
        (10**7, 1024, 8, 0.18, 1_000_000, 128),  # 1 GB; 256 MB are just 256 images of 1,000,000 bytes
        (10**7, 1, 8, 2000.0, 10_000, None),  # longer than any shard should be, but less than one image cannot be
    ],
)
def test_recommended_shard_sizes(
    images: int, shard_size: int, workers: int, image_s: float, image_bytes: float, expected: int | None
) -> None:
    # A footer of some kilobytes comes to the rows, so a size that fits to the byte is one too much.
    found = recommend_shard_size(
        images, shard_size, workers, seconds_per_image=image_s, bytes_per_image=image_bytes * 1.001
    )
    assert found == expected
