"""Rankings against plain sums, and intervals against resampling in a loop."""

from __future__ import annotations

import numpy as np
import pytest

from ovss_ray.choose.assessing import Assessment, SampledImage, Verdict
from ovss_ray.choose.ranking import paired_interval, rank
from ovss_ray.run.manifest import ManifestRow


def image(number: int, *classes: int, error: str | None = None) -> SampledImage:
    return SampledImage(ManifestRow(number, f"{number}.png"), classes, error)


def verdicts(*accepted: str, failed: dict[int, str] | None = None) -> Assessment:
    """One string per image: "10" is one class accepted and one not."""
    found = []
    for number, marks in enumerate(accepted):
        status = (failed or {}).get(number, "ok")
        error = None if status == "ok" else "a reason"
        found.append(Verdict(number, status, error, tuple(mark == "1" for mark in marks)))
    return Assessment(tuple(found), seconds=2.0, device="cpu")


SAMPLE = [image(0, 1, 2), image(1, 1, 2, 3), image(2, 4), image(3, 1, 4), image(4, error="corrupt: no image")]


def test_rewards_are_summed_over_images_with_two_classes() -> None:
    ranking = rank(SAMPLE, {"low": verdicts("10", "100", "0", "00"), "high": verdicts("11", "101", "0", "10")})
    assert (ranking.images, ranking.classes, ranking.too_few_classes) == (3, 7, 1)
    assert dict(ranking.unread) == {4: "corrupt: no image"}
    high, low = ranking.standings
    assert (high.key, high.reward, high.mean_reward, high.accepted_share) == ("high", 5, 5 / 3, 5 / 7)
    assert (low.key, low.reward, low.mean_reward, low.accepted_share) == ("low", 2, 2 / 3, 2 / 7)
    assert high.behind is None
    assert high.images_per_s == 4 / 2


def test_an_image_that_one_candidate_could_not_read_is_left_out_of_all() -> None:
    both = {"a": verdicts("11", "111", "0", "00"), "b": verdicts("10", "", "0", "11", failed={1: "unread"})}
    ranking = rank(SAMPLE, both)
    assert (ranking.images, ranking.classes, set(ranking.unread)) == (2, 4, {1, 4})
    assert {standing.key: standing.reward for standing in ranking.standings} == {"a": 2, "b": 3}


def test_an_image_that_a_method_failed_on_earns_it_nothing() -> None:
    both = {"a": verdicts("11", "111", "0", "00"), "b": verdicts("10", "000", "0", "00", failed={1: "unsegmented"})}
    ranking = rank(SAMPLE, both)
    assert [(one.key, one.reward, one.unsegmented) for one in ranking.standings] == [("a", 5, 0), ("b", 1, 1)]
    assert ranking.images == 3


def test_equal_rewards_stand_as_they_were_named_and_are_tied() -> None:
    ranking = rank(SAMPLE, {"z": verdicts("10", "100", "0", "00"), "a": verdicts("01", "010", "0", "00")})
    assert [(one.key, one.tied) for one in ranking.standings] == [("z", True), ("a", True)]


def test_the_interval_is_that_of_images_drawn_anew(rng: np.random.Generator) -> None:
    first, second = rng.integers(0, 4, 80), rng.integers(0, 3, 80)
    means = []
    for _ in range(4000):
        drawn = rng.integers(0, 80, 80)
        means.append(float((first[drawn] - second[drawn]).mean()))
    low, high = np.quantile(means, [0.025, 0.975])
    found = paired_interval(first, second, resamples=4000)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.03)


def test_a_clear_lead_is_told_and_a_small_one_is_not() -> None:
    images = [image(number, 1, 2) for number in range(60)]
    best, near, far = (["11"] * 60, ["11"] * 59 + ["10"], ["10"] * 40 + ["11"] * 20)
    ranking = rank(images, {"best": verdicts(*best), "near": verdicts(*near), "far": verdicts(*far)})
    assert [(one.key, one.tied) for one in ranking.standings] == [("best", True), ("near", True), ("far", False)]
