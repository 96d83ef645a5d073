"""A run that exists made to grow: images that were not there when it was planned, and failed ones once more.

An addition is more parts of the manifest and one record. The parts are written first, under names that nobody else
uses; they count once the record exists, which is created once. So a writer that is killed or loses leaves the run as
it was.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import re
import uuid
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from itertools import accumulate, islice
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ovss_ray.errors import IMAGE_FAILURES, OvssError, RunFailedError, SettingError, nearest
from ovss_ray.images.fetching import Fetcher
from ovss_ray.images.limits import AS_THE_RUN, Limits
from ovss_ray.images.listing import ImageRef
from ovss_ray.images.reach import Reach
from ovss_ray.images.references import Wanted
from ovss_ray.images.replanning import look_up_again
from ovss_ray.images.splits import reach_of
from ovss_ray.images.stores import StorageOptions
from ovss_ray.labels.additions import Addition, read_additions
from ovss_ray.labels.layout import MANIFEST_FOLDER, RUN_FILE, AdditionKind, Manifest, addition_name
from ovss_ray.labels.reading import open_run
from ovss_ray.naming import note_file, setting_name
from ovss_ray.run.alone import wait_for_turn
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.driver import run_job
from ovss_ray.run.heartbeat import Heartbeat
from ovss_ray.run.job import LISTING_SETTINGS, images_of, resolve, take_over
from ovss_ray.run.manifest import ManifestReader, stored_images, stored_uris, write_parts
from ovss_ray.run.preflight import check_images
from ovss_ray.run.progress import Reporter, SilentReporter
from ovss_ray.run.summary import RunSummary
from ovss_ray.spec import JobSpec
from ovss_ray.version import __version__
from ovss_ray.vocabulary import Vocabulary

_BATCH = 1 << 16
_PART_NAME = re.compile(r"(\d{5,})-[0-9a-f]{8}-\d{5}\.parquet")


@dataclass(frozen=True)
class StoredJob:
    """A run that exists, and the job that continues it.

    Attributes:
        spec: the job of `run.json`, with the changes asked for.
        vocabulary: the classes of the run.
        limits: how large images of the run may be; those of `spec` may be raised for a retry.
        manifest: the images, those of earlier additions included.
        additions: how many additions there are.
        directory: the run directory.
    """

    spec: JobSpec
    vocabulary: Vocabulary
    limits: Limits
    manifest: Manifest
    additions: int
    directory: RunDirectory


def load_job(
    run: str, changes: Mapping[str, Any] | None = None, *, storage_options: StorageOptions | None = None
) -> StoredJob:
    """Read back the job of a run.

    Args:
        run: the run directory.
        changes: fields of `JobSpec` that replace those of the run: how to work, such as `workers` or
            `fetch_attempts`. One that changes labels is refused when the run is continued.
        storage_options: fsspec options by protocol; a run directory holds none.

    Raises:
        SettingError: there is no run, or a change is not valid.
        OvssError: the run cannot be read.
    """
    with open_run(run, storage_options) as opened:
        stored = {**opened.job, "run": run, "storage_options": storage_options or {}}
        note_file(stored)
        own = JobSpec.build(stored, source=f"{run}/{RUN_FILE}")
        note_file(stored.keys() - (changes or {}).keys())
        spec = JobSpec.build({**stored, **(changes or {})}, source="command line")
        directory = RunDirectory(run, storage_options)
        return StoredJob(spec, opened.vocabulary, own.limits, opened.manifest, len(opened.additions), directory)


def check_job(job: StoredJob) -> None:
    """Make sure that the run can be continued from here, before anything is added to it.

    Raises:
        WeightsError: the weights are not here.
        RunMismatchError: settings, weights or version of the package are not those of the run.
    """
    record = job.directory.read_json(RUN_FILE)
    assert record is not None  # `load_job` has just read it
    own = job.spec.model_copy(update=job.limits._asdict())
    take_over(resolve(own, job.vocabulary), record, [], run=job.directory.uri)


def check_listing(job: StoredJob, changes: Mapping[str, Any]) -> None:
    """Make sure that the images to extend a run by can be listed; see `extend_run` for `changes` and errors."""
    check_images(_listing(job, changes))


def _listing(job: StoredJob, changes: Mapping[str, Any]) -> JobSpec:
    return JobSpec.build({**job.spec.model_dump(), "limit": None, **changes}, source="command line")


def extend_run(
    job: StoredJob, changes: Mapping[str, Any] | None = None, *, reporter: Reporter | None = None
) -> Addition | None:
    """List the input again and add the images that the run does not have, told by their URIs.

    Lists as the run did, its sample included (chosen by hash of the URI, so the same images are in it), but without
    its limit. Reads the URIs of the whole manifest and keeps 8 bytes of each: for ten million images 80 MB (twice that
    for a moment) and half a minute. (The chance that one of ten million new URIs has the 8 bytes of one of ten million
    known, and is left out, is 1 in 180,000.) Images that vanished, or changed under the same URI, stay as they are.

    Args:
        job: the run.
        changes: replace settings of the listing: `input` and `LISTING_SETTINGS`; `limit` counts new images only.
        reporter: shows how many images were found, and says if another addition is waited for.

    Returns:
        What was added, or None if the run has all images already.

    Raises:
        InputError: the input cannot be listed.
        SettingError: a change is not valid.
        RunFailedError: another addition was recorded meanwhile; nothing of this one is kept.
    """
    listing = _listing(job, changes or {})
    settings = {name: getattr(listing, name) for name in LISTING_SETTINGS}
    known = KnownUris()
    for uris in stored_uris(job.manifest, job.directory):
        known.add(uris)
    found = images_of(listing.model_copy(update={"limit": None}))
    fresh = _new(found if reporter is None else reporter.counting(found), known)
    images = enumerate(islice(fresh, listing.limit), job.manifest.images)
    return _append(job, "extend", images, {"input": listing.input, **settings}, reporter=reporter)


def retry_run(
    job: StoredJob, statuses: Sequence[str] | None = None, *, reporter: Reporter | None = None
) -> Addition | None:
    """Add the images without labels as new shards, so that they are labelled once more.

    They are planned again, see `look_up_again`: those that changed since are taken as they are now.
    The latest outcome of each image counts; images that an earlier retry lists and has not come to are left out. If
    the job's `max_pixels` or `max_bytes` is larger than that of the run, it holds for these images only.

    Args:
        job: the run.
        statuses: only images with one of these; all but "ok" if not given.
        reporter: says if another addition is waited for.

    Returns:
        What was added, or None if there is no such image.

    Raises:
        SettingError: an unknown status, or a smaller `max_pixels` or `max_bytes` than the run's.
        OvssError: no shard is written yet.
        RunFailedError: another addition was recorded meanwhile; nothing of this one is kept.
    """
    chosen = _check_statuses(IMAGE_FAILURES if statuses is None else statuses)
    asked = job.spec.limits
    for name, own in job.limits._asdict().items():
        value = getattr(asked, name)
        if value < own:
            raise SettingError(
                f"{setting_name(name)} = {value} is less than the run's {own}: a retry can raise it; leave it out"
            )
    failed = np.setdiff1d(_failed_images(job, chosen), _waiting_images(job), assume_unique=True)
    spec = job.spec
    fetcher = Fetcher(spec.storage_options, attempts=spec.fetch_attempts, timeout_s=spec.fetch_timeout_s)
    planned = stored_images(failed.tolist(), job.manifest, job.directory)
    images = look_up_again(planned, fetcher, _listings(job), _reaches(job))
    limits = asked.raised_over(job.limits)
    return _append(job, "retry", images, {"statuses": list(chosen)}, limits, reporter=reporter)


def continue_run(job: StoredJob, *, reporter: Reporter | None = None) -> RunSummary:
    """Label every image of the run that is not labelled yet; see `run_job`."""
    spec = job.spec.model_copy(update=job.limits._asdict())  # others are in the record of the retry that they hold for
    return run_job(spec, reporter=reporter or SilentReporter(), vocabulary=job.vocabulary)


class KnownUris:
    """A set of URIs at 8 bytes each: sorted arrays of hashes, each at least twice as long as the next."""

    def __init__(self) -> None:
        self._runs: list[NDArray[np.uint64]] = []

    def add(self, uris: Sequence[str]) -> NDArray[np.bool_]:
        """Add URIs; returns which of them were new, of equal ones the first."""
        keys = np.fromiter(map(_key, uris), np.uint64, len(uris))
        new = np.zeros(len(keys), np.bool_)
        new[np.unique(keys, return_index=True)[1]] = True
        for run in self._runs:
            new &= run[np.minimum(np.searchsorted(run, keys), len(run) - 1)] != keys
        if new.any():
            self._push(np.sort(keys[new]))
        return new

    def _push(self, run: NDArray[np.uint64]) -> None:
        while self._runs and len(self._runs[-1]) < 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort()
        self._runs.append(run)


def _key(uri: str) -> int:
    return int.from_bytes(hashlib.blake2b(uri.encode(), digest_size=8).digest(), "little")


def _new(images: Iterable[ImageRef], known: KnownUris) -> Iterator[ImageRef]:
    iterator = iter(images)
    while batch := list(islice(iterator, _BATCH)):
        new = known.add([ref.uri for ref in batch])
        yield from (batch[index] for index in np.flatnonzero(new))


def _check_statuses(statuses: Sequence[str]) -> Sequence[str]:
    for status in statuses:
        if status not in IMAGE_FAILURES:
            hint = nearest(status, IMAGE_FAILURES) or f"; there are {', '.join(IMAGE_FAILURES)}"
            raise SettingError(f"status {status!r} is not one that an image without labels can have{hint}")
    return statuses


def _listings(job: StoredJob) -> Callable[[int], Wanted]:
    """How the input of each image was listed: as the run's, or as that of the extension that added it."""
    additions = read_additions(job.directory.fs, job.directory.root, job.directory.uri)
    extensions = [addition for addition in additions if addition.kind == "extend"]
    counts = [addition.images for addition in extensions]
    firsts = list(accumulate(counts, initial=job.manifest.images - sum(counts)))[:-1]
    names = tuple(inspect.signature(Wanted.of).parameters)
    settings = [job.spec.model_dump(include=set(names)), *(addition.settings for addition in extensions)]
    listings = [Wanted.of(**{name: given[name] for name in names}) for given in settings]
    return lambda image_id: listings[bisect_right(firsts, image_id)]


def _reaches(job: StoredJob) -> Callable[[int], Reach]:
    """What the address of each image may lead to."""
    spec = job.spec
    return lambda image_id: reach_of(
        job.manifest.source_of(image_id) or spec.input, spec.allow_schemes, spec.allow_hosts
    )


def _failed_images(job: StoredJob, statuses: Sequence[str]) -> NDArray[np.int64]:
    listed = ", ".join(f"'{status}'" for status in statuses)
    with open_run(job.directory.uri, job.directory.storage_options) as run:
        found = run.sql(f"SELECT image_id FROM images WHERE status IN ({listed}) ORDER BY image_id")
        ids: NDArray[np.int64] = found.fetchnumpy()["image_id"]
        return ids


def _waiting_images(job: StoredJob) -> list[int]:
    """Images of retries whose shards are not written yet."""
    done = job.directory.done_shards()
    reader = ManifestReader(job.manifest, job.directory)
    waiting = (shard for shards in job.manifest.retry_shards for shard in shards if shard not in done)
    return sorted({row.image_id for shard in waiting for row in reader.rows(shard)})


def _append(
    job: StoredJob,
    kind: AdditionKind,
    images: Iterable[tuple[int, ImageRef]],
    settings: dict[str, Any],
    limits: Limits = AS_THE_RUN,
    *,
    reporter: Reporter | None,
) -> Addition | None:
    directory, number = job.directory, job.additions + 1
    directory.prepare()
    token = uuid.uuid4().hex[:8]
    prefix = f"{MANIFEST_FOLDER}/{number:05d}-{token}"

    def write(index: int, data: bytes) -> str:
        name = f"{prefix}-{index:05d}.parquet"
        directory.create(name, data)
        return name

    try:
        parts, digest = write_parts(images, job.manifest.shard_size, write)
    except BaseException:
        _remove(directory, [name for name in directory.files_in(MANIFEST_FOLDER) if name.startswith(prefix)])
        raise
    if not parts:
        return None
    addition = Addition(
        kind=kind,
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        package_version=__version__,
        settings=settings,
        images=sum(part.rows for part in parts),
        digest=digest,
        parts=tuple(parts),
        **limits._asdict(),
    )
    # From here on the parts stay whatever fails: the record may have been created even if the reply is lost.
    if not _record(addition, number, directory, reporter or SilentReporter()):
        _remove(directory, [part.name for part in parts])
        raise RunFailedError(
            f"another process has just added images to {directory.uri} ({addition_name(number)}); nothing of this "
            "addition was kept, and the same command lists again what is still missing"
        )
    _sweep(directory, number, {part.name for part in (*job.manifest.parts, *parts)})
    return addition


def _record(addition: Addition, number: int, directory: RunDirectory, reporter: Reporter) -> bool:
    """Create the record; False if another process was faster."""
    name, content = addition_name(number), addition.model_dump_json(indent=1).encode()
    if directory.conditional_put:
        return directory.create(name, content)
    with Heartbeat(directory, "planning") as heart:
        wait_for_turn(directory, heart, reporter, record=name)
        directory.create(name, content)
        # What is there decides, not the answer: such a store may have taken two records.
        return directory.read(name) == content


def _sweep(directory: RunDirectory, number: int, counted: set[str]) -> None:
    """Remove parts that can no longer count: their number is taken by a record that does not name them.

    In a store without conditional put those of the last number stay: another record may take the place of this one.
    """
    last = number if directory.conditional_put else number - 1
    for name in directory.files_in(MANIFEST_FOLDER):
        match = _PART_NAME.fullmatch(name.rpartition("/")[2])
        if match and int(match[1]) <= last and name not in counted:
            _remove(directory, [name])


def _remove(directory: RunDirectory, names: Iterable[str]) -> None:
    for name in names:
        with contextlib.suppress(OSError, OvssError):  # an orphan does no harm; what led here matters more
            directory.remove(name)
