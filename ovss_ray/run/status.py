"""How far runs are, as their directories tell, from any machine: progress, signs of life, failures."""

from __future__ import annotations

from collections.abc import Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from ovss_ray.errors import OvssError
from ovss_ray.images.stores import StorageOptions, explained, open_store
from ovss_ray.labels.layout import CRASHED_FOLDER, DRIVERS_FOLDER, RUN_FILE, SUMMARY_FILE
from ovss_ray.labels.reading import Run, open_run
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.heartbeat import Beat, Listener, read_beats
from ovss_ray.run.progress import duration
from ovss_ray.run.summary import top_reasons

Activity = Literal["planning", "loading", "running", "stopping", "stopped", "silent", "finished"]

COUNTED_SHARDS = 256  # a second or two in an object store
RUNS_AT_ONCE = 8
_ORDER = ("running", "loading", "planning", "stopping")  # of several drivers, what the first of these does counts


@dataclass(frozen=True)
class RunState:
    """How far a run is.

    Attributes:
        method, clip, classes: None while the run is planned.
        images: images of the run; None while it is planned.
        images_done: those of the shards that are written; images labelled again do not count again.
        additions: what came after the planning, as {kind, created_at, images, shards, shards_done}.
        crashed: images that ended their worker, and are not tried again.
        activity: "planning", "loading" (models and workers), "running", "stopping"; "stopped" by an error, a signal, or
            because there is more to do than when the last driver finished; "silent": the last driver has said nothing
            for longer than it should, or its process is gone; "finished": every shard is written.
        since: since when; the last sign of life of a silent driver. ISO 8601 in UTC, by the clock of the driver's
            machine; None if no driver has left a sign.
        reason: why it stopped, or is taken for silent.
        last_sign_at, last_sign_age_s: of the driver that is heard of last; the age by this machine's clock.
        images_per_s, remaining_s: as the drivers that are alive say; None unless it is running.
        drivers: the last sign of each driver, the latest first.
        statuses: images by status; None where that would take reading every shard.
        failures, failure_kinds: the most frequent kinds of reasons, as in `RunSummary`; None likewise.
        continue_with: the command that goes on with the run.
        warnings: why labels mean nothing, as the run said when it began.
    """

    run: str
    method: str | None
    clip: str | None
    classes: int | None
    images: int | None
    images_done: int
    shards: int | None
    shards_done: int
    additions: list[dict[str, Any]]
    crashed: int
    activity: Activity
    since: str | None
    reason: str | None
    last_sign_at: str | None
    last_sign_age_s: float | None
    images_per_s: float | None
    remaining_s: float | None
    drivers: list[dict[str, Any]]
    statuses: dict[str, int] | None
    failures: list[dict[str, Any]] | None
    failure_kinds: int | None
    continue_with: str
    warnings: tuple[str, ...] = ()

    @property
    def failed(self) -> int | None:
        """Images without labels; None if not counted."""
        return None if self.statuses is None else sum(self.statuses.values()) - self.statuses.get("ok", 0)

    def pace(self) -> str:
        """What the run does, and since when, in a sentence."""
        if self.activity in ("finished", "stopped"):
            since = f" at {_short(self.since)}" if self.since else ""
            return f"{self.activity}{since}{f': {self.reason}' if self.reason else ''}"
        assert self.last_sign_age_s is not None
        ago = duration(self.last_sign_age_s)
        if self.activity == "silent":
            when = f" ({ago} ago)" if self.last_sign_age_s else ""
            return f"no sign of life since {_short(self.last_sign_at)}{when}: {self.reason}"
        rate = f", {self.images_per_s:.1f} images/s" if self.images_per_s else ""
        left = f", {duration(self.remaining_s)} left" if self.remaining_s is not None else ""
        alive = [f"{driver['host']} (process {driver['pid']})" for driver in self.drivers if driver["is_alive"]]
        where = f"on {alive[0]}" if len(alive) == 1 else f"by {len(alive)} drivers"
        return f"{self.activity}{rate}{left}; {where} since {_short(self.since)}, last sign of life {ago} ago"


def read_status(
    run: str, storage_options: StorageOptions | None = None, *, full: bool = False, listener: Listener | None = None
) -> RunState:
    """Read the state of a run: two listings and a few small files, whatever its size.

    Args:
        run: the run directory.
        storage_options: fsspec options by protocol.
        full: count images by status in any case, which reads a little of every shard. Otherwise it is done for up to
            256 shards, and taken from `summary.json` if the run is complete.
        listener: for those who read it again and again: whoever writes while they look is alive, and whoever does not
            is gone, whatever the clocks.

    Raises:
        SettingError: there is no run in this place.
    """
    directory = RunDirectory(run, storage_options)
    beats = read_beats(directory)
    alive = (listener or Listener()).alive(beats)
    if beats and not directory.exists(RUN_FILE):
        return _planned(directory, beats, alive)
    with open_run(run, storage_options) as opened:
        done = set(opened.shards_done())
        manifest = opened.manifest
        complete = len(done) == manifest.shards
        statuses, failures, kinds = _outcomes(opened, directory, complete=complete, full=full)
        rates = [beat.images_per_s for beat in alive if beat.images_per_s]
        rows_left = manifest.rows - sum(map(manifest.images_in, done))
        return RunState(
            run=run,
            method=opened.job["method"],
            clip=opened.job["clip"],
            warnings=opened.warnings,
            classes=opened.vocabulary.num_classes,
            images=manifest.images,
            images_done=sum(manifest.images_in(shard) for shard in done if manifest.first_id(shard) is not None),
            shards=manifest.shards,
            shards_done=len(done),
            additions=_additions(opened, done),
            crashed=len(directory.files_in(CRASHED_FOLDER)),
            **_life(beats, alive, complete=complete and (_said_so(beats) or directory.exists(SUMMARY_FILE))),
            images_per_s=sum(rates) if rates and not complete else None,
            remaining_s=_remaining(alive, sum(rates), rows_left) if rates and not complete else None,
            statuses=statuses,
            failures=failures,
            failure_kinds=kinds,
            continue_with=directory.continue_command,
        )


def find_runs(folder: str, storage_options: StorageOptions | None = None) -> list[str] | None:
    """The runs in a folder, by name; None if the folder is a run itself, or is not there, or holds no run.

    Raises:
        InputError: the folder cannot be listed.
    """
    place = folder.rstrip("/")
    fs, root = open_store(place or "/", storage_options)
    fs.invalidate_cache()
    with explained(place):
        if _is_run(fs, root):
            return None
        try:
            found = fs.ls(root, detail=True)
        except (FileNotFoundError, NotADirectoryError):
            return None
        names = [entry["name"].rstrip("/") for entry in found if entry["type"] == "directory"]
        with ThreadPoolExecutor(RUNS_AT_ONCE) as threads:
            runs = [name for name, is_run in zip(names, threads.map(lambda name: _is_run(fs, name), names)) if is_run]  # noqa: B905 (as many)
    return sorted(f"{place}/{name.rsplit('/', 1)[-1]}" for name in runs) or None


def read_statuses(
    runs: Sequence[str],
    storage_options: StorageOptions | None = None,
    *,
    full: bool = False,
    listener: Listener | None = None,
) -> list[RunState | OvssError]:
    """The states of several runs in their order; where one cannot be read, the reason."""

    def read(run: str) -> RunState | OvssError:
        try:
            return read_status(run, storage_options, full=full, listener=listener)
        except OvssError as error:
            return error

    with ThreadPoolExecutor(RUNS_AT_ONCE) as threads:
        return list(threads.map(read, runs))


def _is_run(fs: Any, root: str) -> bool:
    return bool(fs.exists(f"{root}/{RUN_FILE}") or fs.exists(f"{root}/{DRIVERS_FOLDER}"))


def _planned(directory: RunDirectory, beats: list[Beat], alive: list[Beat]) -> RunState:
    """The state of a run whose planning is under way, or was not finished."""
    return RunState(
        run=directory.uri,
        method=None,
        clip=None,
        classes=None,
        images=None,
        images_done=0,
        shards=None,
        shards_done=0,
        additions=[],
        crashed=0,
        **_life(beats, alive, complete=False),
        images_per_s=None,
        remaining_s=None,
        statuses={},
        failures=[],
        failure_kinds=0,
        continue_with="the command that started it",
    )


def _life(beats: list[Beat], alive: list[Beat], *, complete: bool) -> dict[str, Any]:
    """What the drivers do, or did."""
    if alive:
        told: Beat | None = min(alive, key=lambda beat: _ORDER.index(beat.state))
    else:
        told = max(beats, key=lambda beat: beat.beat_at, default=None)
    described = {
        "last_sign_at": None if told is None else max(beat.beat_at for beat in beats),
        "last_sign_age_s": None if told is None else min(beat.age_s for beat in beats),
        "drivers": [{**beat.model_dump(exclude={"process", "claims"}), "is_alive": beat in alive} for beat in beats],
    }
    return {**described, **_activity(told, told in alive, complete=complete)}


def _activity(told: Beat | None, is_alive: bool, *, complete: bool) -> dict[str, Any]:
    if complete and not is_alive:
        ended = told is not None and told.state == "finished"
        return {"activity": "finished", "since": told.since if told is not None and ended else None, "reason": None}
    if told is None:
        return {"activity": "stopped", "since": None, "reason": "no driver has left a sign of life here"}
    if is_alive:
        return {"activity": told.state, "since": told.since, "reason": None}
    if told.state == "stopped":
        return {"activity": "stopped", "since": told.since, "reason": told.reason}
    if told.state == "finished":
        return {"activity": "stopped", "since": told.since, "reason": "it was finished, and has more shards now"}
    if told.is_gone:
        reason = f"the driver's process ({told.pid}) is gone without a word; killed?"
    elif told.ahead_s > told.patience_s:
        reason = (
            f"the driver on {told.where} was killed, or cannot reach the run; its clock is {duration(told.ahead_s)} "
            "ahead of this machine's, so only --watch can tell"
        )
    else:
        reason = f"the driver on {told.where} was killed, or cannot reach the run (if both clocks are right)"
    return {"activity": "silent", "since": told.beat_at, "reason": reason}


def _said_so(beats: list[Beat]) -> bool:
    """Whether a driver has finished: one that has not may have found shards of another run at the very end."""
    return any(beat.state == "finished" for beat in beats)


def _remaining(alive: Sequence[Beat], rate: float, rows_left: int) -> float | None:
    return alive[0].remaining_s if len(alive) == 1 else rows_left / rate


def _additions(run: Run, done: Set[int]) -> list[dict[str, Any]]:
    """Parts of additions stand at the end of the manifest, in the order of their records."""
    described = []
    part = len(run.manifest.parts) - sum(len(addition.parts) for addition in run.additions)
    for addition in run.additions:
        first, part = part, part + len(addition.parts)
        shards = [shard for index in range(first, part) for shard in run.manifest.shards_of(index)]
        described.append(
            {
                "kind": addition.kind,
                "created_at": addition.created_at,
                "images": addition.images,
                "shards": len(shards),
                "shards_done": sum(shard in done for shard in shards),
            }
        )
    return described


def _outcomes(
    run: Run, directory: RunDirectory, *, complete: bool, full: bool
) -> tuple[dict[str, int] | None, list[dict[str, Any]] | None, int | None]:
    done = run.shards_done()
    if not done:
        return {}, [], 0
    if complete and not full:
        stored = directory.read_json(SUMMARY_FILE)
        if stored is not None and stored["shards"] == run.num_shards:
            return stored["statuses"], stored["failures"], stored.get("failure_kinds", len(stored["failures"]))
    if full or len(done) <= COUNTED_SHARDS:
        outcomes = run.outcomes()
        return outcomes.statuses, top_reasons(outcomes), len(outcomes.failures)
    return None, None, None


def _short(at: str | None) -> str:
    """A time for people: seconds are enough."""
    return "an unknown time" if at is None else f"{at[:19].replace('T', ' ')} UTC"
