"""A sample that is spread over a whole input, taken in one pass over its listing."""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable
from dataclasses import dataclass

from ovss_ray.images.listing import ImageRef


@dataclass(frozen=True)
class Survey:
    """What one pass over a listing tells.

    Attributes:
        images: images listed.
        size_bytes: their size; None if the listing does not give that of every image.
        sample: the chosen images, in an order that has nothing to do with that of the listing.
    """

    images: int
    size_bytes: int | None
    sample: tuple[ImageRef, ...]


def survey(images: Iterable[ImageRef], *, wanted: int, block: int = 1) -> Survey:
    """Count images and choose some of them at random; memory holds the chosen ones only, however long the listing is.

    The listing is divided into blocks of `block` consecutive images, and those blocks are chosen whose position and
    first address have the smallest hash: the same input gives the same sample, and every block is as likely as another.

    Args:
        images: the listing.
        wanted: how many images to choose (1 or more); all of them if there are fewer.
        block: images that are chosen together, because a run reads them together (1 or more).
    """
    chosen: list[tuple[int, int, list[ImageRef]]] = []  # a heap whose top is the block to drop next
    capacity = -(-wanted // block)
    members: list[ImageRef] | None = None
    count, size_bytes, sizes_known = 0, 0, True
    for position, image in enumerate(images):
        if position % block == 0:
            members = _enter(chosen, capacity, position, image.uri)
        if members is not None:
            members.append(image)
        count += 1
        sizes_known = sizes_known and image.size_bytes is not None
        size_bytes += image.size_bytes or 0
    sample = [image for _, _, block_images in sorted(chosen, reverse=True) for image in block_images]
    return Survey(count, size_bytes if sizes_known and count else None, tuple(sample[:wanted]))


def _enter(
    chosen: list[tuple[int, int, list[ImageRef]]], capacity: int, position: int, uri: str
) -> list[ImageRef] | None:
    """The list that the block's images go to, or None if the block is not among the chosen so far."""
    digest = hashlib.blake2b(f"{position}\t{uri}".encode("utf-8", "surrogateescape"), digest_size=8).digest()
    entry: tuple[int, int, list[ImageRef]] = (-int.from_bytes(digest, "big"), position, [])
    if len(chosen) < capacity:
        heapq.heappush(chosen, entry)
    elif entry > chosen[0]:
        heapq.heapreplace(chosen, entry)
    else:
        return None
    return entry[2]
