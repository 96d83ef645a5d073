"""Images planned once before, looked up again: where they are now, and which version of them is there."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby, islice

from ovss_ray.errors import ImageError, InputError
from ovss_ray.images.containers import Container, ContainerReader, OtherFiles
from ovss_ray.images.fetching import Fetcher
from ovss_ray.images.members import split_member
from ovss_ray.images.reach import USERS_WORD, Reach
from ovss_ray.images.references import ImageRef, Wanted
from ovss_ray.images.versions import is_weak

_LOG = logging.getLogger(__name__)

_BATCH = 4096
_THREADS = 32

Planned = tuple[int, ImageRef]


def look_up_again(
    images: Iterable[Planned],
    fetcher: Fetcher,
    wanted_of: Callable[[int], Wanted],
    reach_of: Callable[[int], Reach] = lambda _: USERS_WORD,
) -> Iterator[Planned]:
    """The same images in the same order, each with the size, version and position that it has now.

    A file of its own is asked for those facts that were planned: one request, or nothing for a local file without any.
    A tar or Parquet file that changed, or of which no tag of a store vouches that it did not, is listed again. Members
    of tars are found by their names (of several with one name the last, which is what unpacking gives, unless they are
    where they were), images of Parquet files by their rows, as their addresses say; what is kept with them comes along
    from there. An image that is no longer there loses its position and becomes a `not_found` row when it is read; what
    cannot be looked up now is left to the reading, too.

    Args:
        images: ids and images, in the order of the files that hold them.
        fetcher: says what is there.
        wanted_of: how the input of an image, by its id, was listed.
        reach_of: what the address of an image, by its id, may lead to.
    """

    def look_up(group: Sequence[Planned]) -> Sequence[Planned]:
        first = group[0][0]
        return _looked_up(group, fetcher, wanted_of(first), reach_of(first))

    iterator = iter(images)
    with ThreadPoolExecutor(_THREADS) as threads:
        while batch := list(islice(iterator, _BATCH)):
            groups = [list(group) for _, group in groupby(batch, key=_file_of)]
            for found in threads.map(look_up, groups):
                yield from found


def _file_of(image: Planned) -> str | int:
    """The file that holds an image together with its neighbours; a number for a file of its own."""
    member = split_member(image[1].uri)
    return image[0] if member is None else member.file


def _looked_up(group: Sequence[Planned], fetcher: Fetcher, wanted: Wanted, reach: Reach) -> Sequence[Planned]:
    image_id, ref = group[0]
    member = split_member(ref.uri)
    if member is not None:
        return _in_container(member.file, group, fetcher, wanted, reach)
    if ref.size_bytes is None and ref.etag is None:
        return group
    try:
        now = fetcher.version(ref.uri, reach=reach)
    except ImageError:
        return [(image_id, replace(ref, size_bytes=None, etag=None))]
    return [(image_id, replace(ref, size_bytes=now.size_bytes, etag=now.tag if ref.etag is None else now.mark))]


def _in_container(
    file: str, group: Sequence[Planned], fetcher: Fetcher, wanted: Wanted, reach: Reach
) -> Sequence[Planned]:
    try:
        mark = fetcher.version(file, reach=reach).mark
    except ImageError as error:
        gone = error.status == "not_found"
        return [(image_id, replace(ref, etag=None)) for image_id, ref in group] if gone else group
    # Size and time may be those of another file (`cp -p`, `touch -r`, tars that are built with fixed times).
    if mark is not None and not is_weak(mark) and all(ref.etag == mark for _, ref in group):
        return group
    asked = {ref.uri for _, ref in group}
    found: dict[str, ImageRef] = {}
    as_planned: set[ImageRef] = set()
    try:
        reader = ContainerReader(wanted, fetcher.storage_options, OtherFiles(), reach)
        for ref in reader.images(Container(file, chosen=False)):
            if isinstance(ref, ImageRef) and ref.uri in asked:
                found[ref.uri] = ref
                as_planned.add(ref)
    except InputError as error:
        _LOG.warning("%s", error)
        return [(image_id, found.get(ref.uri, ref)) for image_id, ref in group]
    return [
        (image_id, ref if ref in as_planned else found.get(ref.uri) or _without_place(ref)) for image_id, ref in group
    ]


def _without_place(ref: ImageRef) -> ImageRef:
    return ImageRef(ref.uri, extra=ref.extra)
