"""Kinds of failure reasons: what differs from image to image is taken out, what tells kinds apart is not."""

from __future__ import annotations

import tracemalloc
import uuid
from collections import Counter

import pytest

from ovss_ray.labels.reasons import kind_of
from ovss_ray.run.stats import REASONS_KEPT, Failures, count_failure


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("9000 x 20,000 pixels, over 1.5e8", "N x N pixels, over N"),
        ("HTTP 503 from https://u:p@host:9000/a%20b.jpg?s=x%2F (try 5 of 5)", "HTTP 503 from <url> (try N of N)"),
        ("no such file: '/data/a photo (1).jpg'", "no such file: <name>"),
        ('member "it\'s.png" is missing', "member <name> is missing"),
        ("the file's header can't be read", "the file's header can't be read"),
        ("cut in the middle: 'photos/number", "cut in the middle: <name>"),
        ("[Errno 5] I/O error: /mnt/a/0001.jpg", "[Errno N] I/O error: <path>"),
        ("train/part-3/0001.jpg has changed", "<path> has changed"),
        ("cannot open IMG_0001.JPEG", "cannot open <path>"),
        ("at 0x7f00deadBEEF in 9f86d081884c7d65", "at <hex> in <hex>"),
        ("request 4442587FB7D0A2F9 was refused", "request <id> was refused"),
        (f"request {uuid.UUID(int=2**127 + 11)} failed", "request <id> failed"),
        ("RuntimeError: expected float16, not uint8", "RuntimeError: expected float16, not uint8"),
        ("unknown ftp://; use file://, s3://, s3a://", "unknown ftp://; use file://, s3://, s3a://"),
        (None, "no reason given"),
    ],
)  # fmt: skip
def test_what_differs_from_image_to_image_is_taken_out(reason: str | None, kind: str) -> None:
    assert kind_of(reason) == kind
    assert kind_of(kind) == kind


def test_very_long_reasons_take_no_time() -> None:
    for character in "a/'\"`.-0:<":
        assert len(kind_of(character * 100_000)) <= 2000


def test_reasons_without_end_take_bounded_memory() -> None:
    failures: Failures = Counter()
    tracemalloc.start()
    for number in range(100_000):
        word = "".join(chr(97 + int(digit)) for digit in str(number))  # nothing that could be taken out
        count_failure(failures, "crashed", f"the method says {word}")
        count_failure(failures, "corrupt", f"broken at byte {number}")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert failures.total() == 200_000
    assert failures["corrupt", "broken at byte N"] == 100_000
    assert len(failures) <= REASONS_KEPT + 2
    assert peak < 2**20
