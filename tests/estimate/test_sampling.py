"""The sample of a listing: as large as asked for, spread over all of it, the same every time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ovss_ray.estimate.estimate import divide, part_size
from ovss_ray.estimate.sampling import survey
from ovss_ray.images.listing import ImageRef


def listing(count: int, size_bytes: int | None = 10) -> list[ImageRef]:
    return [ImageRef(f"s3://bucket/{number:06d}.jpg", size_bytes) for number in range(count)]


def positions(sample: tuple[ImageRef, ...]) -> list[int]:
    return [int(image.uri[-10:-4]) for image in sample]


def test_every_tenth_of_a_listing_has_its_share() -> None:
    sample = survey(listing(10_000), wanted=1000).sample
    tenths = [0] * 10
    for position in positions(sample):
        tenths[position // 1000] += 1
    assert sum(tenths) == 1000
    assert all(70 <= share <= 130 for share in tenths)  # three standard deviations are 28


def test_the_order_of_the_sample_is_not_that_of_the_listing() -> None:
    found = positions(survey(listing(10_000), wanted=1000).sample)
    halves = [sum(position < 5000 for position in found[part : part + 250]) for part in range(0, 1000, 250)]
    assert all(95 <= below <= 155 for below in halves)


def test_the_same_listing_gives_the_same_sample() -> None:
    assert survey(iter(listing(500)), wanted=50) == survey(iter(listing(500)), wanted=50)


@given(st.integers(1, 60), st.integers(1, 40), st.integers(1, 12))
def test_no_image_twice_and_as_many_as_there_are(count: int, wanted: int, block: int) -> None:
    found = survey(listing(count), wanted=wanted, block=block)
    assert found.images == count
    assert len(set(found.sample)) == len(found.sample)
    assert len(found.sample) <= wanted
    if count <= wanted:
        assert sorted(positions(found.sample)) == list(range(count))
    elif block == 1:
        assert len(found.sample) == wanted


def test_blocks_are_taken_whole() -> None:
    found = positions(survey(listing(1000), wanted=40, block=8).sample)
    blocks = [found[start : start + 8] for start in range(0, 40, 8)]
    assert all(block == list(range(block[0], block[0] + 8)) and block[0] % 8 == 0 for block in blocks)


def test_bytes_are_known_only_if_all_are() -> None:
    assert survey(listing(7), wanted=2).size_bytes == 70
    assert survey([*listing(7), ImageRef("s3://bucket/999999.jpg")], wanted=2).size_bytes is None


@pytest.mark.parametrize(
    ("images", "batch_size", "size"),
    [
        (128, 8, 32),  # four parts of four micro-batches
        (128, 32, 32),  # four parts of one micro-batch
        (1024, 8, 128),  # not more than eight parts
        (130, 8, 33),
        (12, 8, 6),  # two parts at least, of however few images
        (3, 8, 2),
        (1, 8, 1),
        (20, 8, 10),
    ],
)
def test_parts_of_a_sample(images: int, batch_size: int, size: int) -> None:
    assert part_size(images, batch_size) == size


def test_images_beyond_the_sample_warm_up() -> None:
    found = listing(12)
    images, size = divide(found, sample_images=8, batch_size=2)
    assert (images, size) == ([*found[8:12], *found[:8]], 2)


def test_too_few_images_warm_up_and_are_sampled() -> None:
    found = listing(3)
    images, size = divide(found, sample_images=128, batch_size=1)
    assert (images, size) == ([found[0], found[1], *found], 1)
