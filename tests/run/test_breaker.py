"""When failures add up to a reason to stop."""

from __future__ import annotations

import pytest

from ovss_ray.run.breaker import too_many_failures

REASONS = {("not_found", "there is no such file"): 150, ("corrupt", "empty file"): 60, ("forbidden", "403"): 1}


@pytest.mark.parametrize(
    ("failed", "seen", "images", "fraction", "stops"),
    [
        (200, 200, 10**6, 0.2, False),  # a fifth of the first thousand
        (201, 201, 10**6, 0.2, True),
        (201, 1000, 10**6, 0.2, True),
        (201, 1006, 10**6, 0.2, False),  # afterwards, of all that were seen
        (20, 20, 40, 0.2, False),  # a handful of bad files in a small folder is nothing
        (21, 25, 40, 0.2, True),
        (21, 25, 400, 0.2, False),
        (10**6, 10**6, 10**6, 1.0, False),
        (21, 5000, 10**6, 0.0, True),
    ],
)
def test_limits(failed: int, seen: int, images: int, fraction: float, stops: bool) -> None:
    failures = {("not_found", "there is no such file"): failed}
    reason = too_many_failures(failures, seen=seen, images=images, max_failed_fraction=fraction)
    assert (reason is not None) == stops


def test_the_most_frequent_reasons_are_named_first() -> None:
    reason = too_many_failures(REASONS, seen=300, images=10**6, max_failed_fraction=0.2)
    assert reason == (
        "211 of the first 300 images failed, more than max_failed_fraction = 0.2 allows "
        "(150 not_found: there is no such file; 60 corrupt: empty file; 1 forbidden: 403)"
    )
