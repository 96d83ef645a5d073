"""Times in listings of S3 are read quickly, and as botocore reads them."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
import s3fs
from botocore.utils import parse_timestamp

from ovss_ray.images.drivers import open_bounded, read_time


@pytest.mark.parametrize(
    "value",
    ["2009-10-12T17:50:30.000Z", "2024-02-29T23:59:59Z", "Fri, 29 Nov 2024 20:00:00 GMT", "2009-10-12T17:50:30+02:00",
     1_700_000_000, "1700000000"],
)  # fmt: skip
def test_times_are_those_of_botocore(value: str | int) -> None:
    assert read_time(value) == parse_timestamp(value)


def test_listings_of_the_driver_still_tell_times(s3: str) -> None:
    s3fs.S3FileSystem().pipe_file(f"{s3}/a.jpg", b"1234")
    fs, path = open_bounded(s3, {}, requests=2, timeout_s=20)
    (info,) = fs.ls(path, detail=True)
    assert abs((datetime.now(timezone.utc) - info["LastModified"]).total_seconds()) < 3600
