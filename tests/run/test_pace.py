"""The smoothed rate, fed with counts at times of an artificial clock."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovss_ray.run.pace import Pace


@given(lump=st.integers(1, 1000), wait_s=st.floats(0.1, 60), lumps=st.integers(2, 200))
def test_a_steady_rate_is_told_from_the_second_lump_on_and_start_up_is_no_part_of_it(
    lump: int, wait_s: float, lumps: int
) -> None:
    pace = Pace()
    pace.see(0, 0.0)
    for number in range(lumps):
        pace.see(lump * (number + 1), 5000.0 + wait_s * number)
        assert (pace.per_s is None) == (number == 0)
    assert pace.per_s == pytest.approx(lump / wait_s)


def test_lumps_do_not_shake_it_between_two() -> None:
    pace = Pace()
    seen = []
    for tick in range(0, 600):  # 32 images every ten seconds, looked at twice a second
        pace.see(32 * (tick // 20), tick / 2)
        if tick > 60:
            seen.append(pace.per_s)
    assert seen == pytest.approx([3.2] * len(seen))


def test_what_was_long_ago_is_forgotten_smoothly() -> None:
    pace = Pace()
    count = 0
    told = []
    for second in range(7200):
        count += 10 if second < 3600 else 2
        pace.see(count, float(second))
        told.append(pace.per_s or 0.0)
    assert told[3599] == pytest.approx(10, rel=0.01)
    assert told[7199] == pytest.approx(2, rel=0.05)  # the mean of all is 6
    assert max(abs(after - before) for before, after in pairwise(told[10:])) < 0.05


def test_when_nothing_comes_any_more_it_falls() -> None:
    pace = Pace()
    for second in range(100):
        pace.see(10 * second, float(second))
    pace.see(990, 101.0)
    assert pace.per_s == pytest.approx(10)
    pace.see(990, 160.0)
    assert pace.per_s is not None
    assert pace.per_s < 5
