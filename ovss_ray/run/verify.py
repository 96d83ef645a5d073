"""Every file of a run against its manifest: what is missing, what is damaged, what does not belong."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

import pyarrow as pa
import pyarrow.parquet as pq

from ovss_ray.images.stores import StorageOptions, explained
from ovss_ray.labels.checking import ExpectedShard, check_footer, check_shard
from ovss_ray.labels.classes import check_classes
from ovss_ray.labels.layout import (
    ADDITIONS_FOLDER,
    CLASSES_FILE,
    MANIFEST_FOLDER,
    SHARDS_FOLDER,
    Part,
    addition_name,
    shard_name,
)
from ovss_ray.labels.reading import Run, open_run
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.manifest import ManifestReader, digest_of

REQUESTS_AT_ONCE = 16

Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class DamagedFile:
    """One file and what is wrong with it."""

    name: str
    problems: tuple[str, ...]

    @property
    def reason(self) -> str:
        """The first problem, and how many more there are."""
        more = f" (and {len(self.problems) - 1} more)" if len(self.problems) > 1 else ""
        return self.problems[0] + more


@dataclass(frozen=True)
class Verification:
    """What was found.

    Attributes:
        run: the run directory.
        shards: number of shards of the run.
        checked: number of shards that are written, and were checked.
        images: images in them, those labelled again counted each time.
        footers_only: whether nothing but the footers was looked at.
        missing: shards that are not written yet.
        damaged: shard files that are not what they should be, and classes.parquet if it is not.
        damaged_manifest: manifest files that are not what they should be, or missing.
        stray: files that do not belong to the run; they are no part of it.
            yield f"{len(self.removed):,} damaged files were removed; make them again: {self.continue_with}"
        elif self.damaged:
            yield f"Remove the damaged files (--remove-damaged does it), then make them again: {self.continue_with}"
    """

    run: str
    shards: int
    checked: int
    images: int
    footers_only: bool
    missing: list[int] = field(default_factory=list)
    damaged: list[DamagedFile] = field(default_factory=list)
    damaged_manifest: list[DamagedFile] = field(default_factory=list)
    stray: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    continue_with: str = ""

    @property
    def exit_code(self) -> int:
        """0 all is there and sound, 5 shards are missing, 6 files are damaged (and were not removed)."""
        if self.damaged_manifest or len(self.damaged) > len(self.removed):
            return 6
        return 5 if self.missing or self.removed else 0

    def missing_ranges(self, longest: int = 20) -> str:
        """The missing shards as "1-3, 7"; the first ranges and the number if there are many."""
        ranges: list[list[int]] = []
        for shard in self.missing:
            if ranges and ranges[-1][1] == shard - 1:
                ranges[-1][1] = shard
            else:
                ranges.append([shard, shard])
        shown = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:longest]]
        return ", ".join(shown) + (f" and more, {len(self.missing):,} in all" if len(ranges) > longest else "")

    def advice(self) -> Iterator[str]:
        """What to do about what was found, a sentence each."""
        if self.damaged_manifest:
            yield "Restore the damaged files of the manifest from a copy; labels that are written can be read without."
        if self.removed:
            yield f"{len(self.removed):,} damaged files were removed; make them again: {self.continue_with}"
        elif self.damaged:
            yield f"Remove the damaged files (--remove-damaged does it), then make them again: {self.continue_with}"
        if self.missing:
            yield f"Label the missing shards: {self.continue_with}"
        if self.stray:
            yield "Remove the stray files; those in shards/ keep the run from being read."
        if self.exit_code == 0:
            yield "Nothing is missing or damaged."


def verify_run(
    run: str,
    *,
    footers_only: bool = False,
    remove_damaged: bool = False,
    storage_options: StorageOptions | None = None,
    watch: Watch | None = None,
) -> Verification:
    """Check every shard of a run, and its manifest.

    Reads all files once, one shard per thread in memory, and decodes every label map: about 3 ms of one core for an
    image of 512 x 512. With `footers_only` two small requests per shard, which tell truncated files, files of another
    run or place, and wrong numbers of rows, but no flipped bit.

    Args:
        run: the run directory.
        footers_only: leave everything but the footers and the manifest's sizes unread.
        remove_damaged: remove the `damaged` files, so that continuing the run makes them again, and nothing else.
        storage_options: fsspec options by protocol.
        watch: called with the number of shards checked so far, and the number to check.

    Raises:
        SettingError: there is no run.
        OvssError: the store cannot be reached, or `run.json` or a record of an addition cannot be read.
    """
    directory = RunDirectory(run, storage_options)
    with open_run(run, storage_options) as opened:
        checker = _Checker(opened, directory, footers_only)
        manifest = opened.manifest
        written = sorted(shard for shard in directory.done_shards() if shard < manifest.shards)
        damaged = []
        with ThreadPoolExecutor(_threads(directory)) as threads:
            for done, (shard, problems) in enumerate(checker.check_all(written, threads), 1):
                if watch is not None:
                    watch(done, len(written))
                if problems:
                    damaged.append(DamagedFile(shard_name(shard), tuple(problems)))
        damaged += _damaged_classes(opened, directory)
        removed = [file.name for file in damaged] if remove_damaged else []
        for name in removed:
            directory.remove(name)
        return Verification(
            run=directory.uri,
            shards=manifest.shards,
            checked=len(written),
            images=sum(map(manifest.images_in, written)),
            footers_only=footers_only,
            missing=sorted(set(range(manifest.shards)) - set(written)),
            damaged=damaged,
            damaged_manifest=checker.damaged_manifest,
            stray=_stray_files(opened, directory),
            removed=removed,
            continue_with=directory.continue_command,
        )


class _Checker:
    def __init__(self, run: Run, directory: RunDirectory, footers_only: bool) -> None:
        self._run = run
        self._directory = directory
        self._footers_only = footers_only
        self._rows = ManifestReader(run.manifest, directory)
        self.damaged_manifest, self._untrusted = _check_manifest(run, directory, footers_only)

    def check_all(self, shards: Sequence[int], threads: ThreadPoolExecutor) -> Iterator[tuple[int, list[str]]]:
        """The problems of each shard, in order; a bounded number of shards is under way at any time."""
        waiting = iter(shards)
        running: list[tuple[int, Future[list[str]]]] = []
        while True:
            for shard in islice(waiting, 2 * REQUESTS_AT_ONCE - len(running)):
                running.append((shard, threads.submit(self._check, shard)))
            if not running:
                return
            shard, future = running.pop(0)
            yield shard, future.result()

    def _check(self, shard: int) -> list[str]:
        name = shard_name(shard)
        if self._footers_only:
            with explained(f"{self._directory.uri}/{name}"):
                file = self._directory.fs.open(self._directory.path(name), "rb", cache_type="none")
            with file:
                return check_footer(file, self._expected(shard, None))
        data = self._directory.read(name)
        if data is None:
            return ["it was removed while the run was checked"]
        return check_shard(data, self._expected(shard, self._images(shard)))

    def _images(self, shard: int) -> list[tuple[int, str]] | None:
        manifest = self._run.manifest
        part = manifest.parts[manifest.place_of(shard)[0]]
        if part.name in self._untrusted:
            return None
        return [(row.image_id, row.uri) for row in self._rows.rows(shard)]

    def _expected(self, shard: int, images: list[tuple[int, str]] | None) -> ExpectedShard:
        run = self._run
        return ExpectedShard(
            shard,
            run.fingerprint,
            run.manifest.images_in(shard),
            images,
            run.vocabulary,
            confidence=run.job.get("confidence_map", "none") != "none",
            smallest_component=run.job.get("components"),
        )


def _damaged_classes(run: Run, directory: RunDirectory) -> list[DamagedFile]:
    stored = directory.read(CLASSES_FILE)
    problem = None if stored is None else check_classes(stored, run.vocabulary)  # runs of older versions have none
    return [] if problem is None else [DamagedFile(CLASSES_FILE, (problem,))]


def _threads(directory: RunDirectory) -> int:
    """Cores bind where files are near, requests where they are far."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, REQUESTS_AT_ONCE) if directory.is_local else REQUESTS_AT_ONCE


def _check_manifest(run: Run, directory: RunDirectory, footers_only: bool) -> tuple[list[DamagedFile], set[str]]:
    """What is wrong with the manifest, and the parts that cannot be trusted: each by itself, then each planning."""
    manifest = run.manifest
    damaged = []
    for part in manifest.parts:
        problem = _part_problem(part, manifest.shard_size, directory)
        if problem is not None:
            damaged.append(DamagedFile(part.name, (problem,)))
    untrusted = {file.name for file in damaged}
    for parts, digest in () if footers_only else _plannings(run):
        names = [part.name for part in parts]
        problem = _digest_problem(parts, digest, directory) if untrusted.isdisjoint(names) else None
        if problem is not None:
            damaged.append(DamagedFile(names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}", (problem,)))
            untrusted.update(names)
    return damaged, untrusted


def _plannings(run: Run) -> Iterator[tuple[Sequence[Part], str]]:
    """The parts that the run was planned with and those of each addition, with the digest over their images."""
    later = sum(len(addition.parts) for addition in run.additions)
    parts = run.manifest.parts
    yield parts[: len(parts) - later], run.manifest.digest
    for addition in run.additions:
        yield addition.parts, addition.digest


def _part_problem(part: Part, shard_size: int, directory: RunDirectory) -> str | None:
    try:
        with directory.fs.open(directory.path(part.name), "rb") as file:
            footer = pq.read_metadata(file)
    except FileNotFoundError:
        return "it is missing"
    except (pa.ArrowException, OSError) as error:
        return f"it cannot be read: {error}"
    sizes = [footer.row_group(group).num_rows for group in range(footer.num_row_groups)]
    if sum(sizes) != part.rows:
        return f"it has {sum(sizes)} rows, its record says {part.rows}"
    if any(size != shard_size for size in sizes[:-1]):
        return f"its row groups are not shards of {shard_size} images"
    return None


def _digest_problem(parts: Sequence[Part], digest: str, directory: RunDirectory) -> str | None:
    try:
        if digest_of(parts, directory) != digest:
            return "its images are not those that were planned (the digest differs)"
    except (pa.ArrowException, OSError, ValueError) as error:
        return f"it cannot be read: {error}"
    return None


def _stray_files(run: Run, directory: RunDirectory) -> list[str]:
    """Files in the folders of manifest, additions and shards that are no part of the run."""
    parts = {part.name for part in run.manifest.parts}
    records = {addition_name(number) for number in range(1, len(run.additions) + 1)}
    stray = [name for name in directory.files_in(MANIFEST_FOLDER) if name not in parts]
    stray += [name for name in directory.files_in(ADDITIONS_FOLDER) if name not in records]
    for name in directory.files_in(SHARDS_FOLDER):
        stem = name.rpartition("/")[2].removesuffix(".parquet")
        if not (stem.isdigit() and int(stem) < run.manifest.shards and name == shard_name(int(stem))):
            stray.append(name)
    return sorted(name for name in stray if not name.endswith("/"))  # some stores list the folder itself
