"""When so many images fail that going on would waste the user's time and money."""

from __future__ import annotations

from collections.abc import Mapping

from ovss_ray.naming import setting_name

FIRST_IMAGES = 1000
FEWEST_FAILURES = 20
REASONS_SHOWN = 3


def too_many_failures(
    failures: Mapping[tuple[str, str], int], *, seen: int, images: int, max_failed_fraction: float
) -> str | None:
    """Why the run should stop, with the most frequent reasons; None as long as it should go on.

    Until a thousand images were seen, the allowed fraction is that of a thousand (of all images of the run if there are
    fewer; what a session has left may be its bad ones): so a wrong bucket or a missing permission shows early, and a
    few bad images at the beginning do no harm.

    Args:
        failures: images without labels by (status, reason), without those that had failed before.
        seen: images labelled or failed in this session, without those that had failed before.
        images: images of the run.
        max_failed_fraction: 1 never stops.
    """
    failed = sum(failures.values())
    base = max(seen, min(FIRST_IMAGES, images))
    if max_failed_fraction >= 1 or failed <= max(max_failed_fraction * base, FEWEST_FAILURES):
        return None
    top = sorted(failures.items(), key=lambda item: (-item[1], item[0]))[:REASONS_SHOWN]
    reasons = "; ".join(f"{count:,} {status}: {reason}" for (status, reason), count in top)
    return (
        f"{failed:,} of the first {max(seen, failed):,} images failed, more than "
        f"{setting_name('max_failed_fraction')} = {max_failed_fraction:g} allows ({reasons})"
    )
