"""Two drivers on one run in a store that ignores "create only if absent": there the last writer wins.

Such a store cannot tell who of two comes first, but it keeps what each of them writes under a name of its own. So the
drivers take turns at planning (`wait_for_turn`, Lamport's one-bit algorithm on their beats), of which the second then
finds `run.json`; likewise those who record an addition. That fails only where a driver was taken for dead and comes
back. Therefore a driver and its workers look again and again whether `run.json` is still theirs (`find_stranger`), no
shard of another fingerprint is taken for done, nor counted at the end, and no part of the manifest is removed here that
may be another's: of two drivers with the same settings each labels from its own.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from ovss_ray.errors import OvssError, RunMismatchError
from ovss_ray.labels.layout import RUN_FILE
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.heartbeat import Beat, Heartbeat, Listener, read_beats, remove_beat
from ovss_ray.run.progress import Reporter

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0


def warn_of_store(directory: RunDirectory) -> None:
    """Say what a store without conditional put means."""
    if not directory.conditional_put:
        log.warning(
            "the store of %s ignores conditional writes: of several drivers started here at once one plans while the "
            "others wait, and all look whether the run is still theirs; one at a time is safer",
            directory.uri,
        )


def wait_for_turn(
    directory: RunDirectory,
    heart: Heartbeat,
    reporter: Reporter,
    *,
    record: str = RUN_FILE,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Claim the planning of a new run, or of an addition; return when no other driver claims it, or when it exists.

    A driver that sees the claim of an earlier one withdraws its own; one that sees only later ones waits for them to
    withdraw. A claim lapses with its driver, whom this one has heard nothing of for as long as its beats may take:
    clocks do not count. The own claim stays until `heart` drops it.

    Args:
        record: the file that exists when the run, or the addition, does.

    Raises:
        RunFailedError, StoreUnavailableError: the claim cannot be written.
        InputError, StoreUnavailableError: those of others cannot be read.
    """
    listener = Listener()
    told = False
    while True:
        heart.claim(True)
        others = _claimants(directory, heart, listener)
        if not others:
            return
        while any(other.driver < heart.driver for other in others):
            heart.claim(False)
            told = told or _tell(others[0], directory, reporter)
            if directory.exists(record):
                return
            sleep(LOOK_EVERY_S)
            others = _claimants(directory, heart, listener)
        if directory.exists(record):
            return
        told = told or not others or _tell(others[0], directory, reporter)
        sleep(LOOK_EVERY_S if others else 0.0)


def find_stranger(directory: RunDirectory, fingerprint: str) -> RunMismatchError | None:
    """The error that there is another run in this place by now; None if there is not, or if nobody can tell."""
    try:
        record = directory.read_json(RUN_FILE)
    except OvssError:  # what the store suffers from shows elsewhere
        return None
    if record is None or record.get("fingerprint") == fingerprint:
        return None
    return RunMismatchError(
        f"another driver has started a run with other settings in {directory.uri} at the same time, and its store "
        "cannot tell who was first; this one stops. Label into another run directory, and remove the shards that are "
        f"not of the run that is there now: ovss-ray verify {directory.uri} --fast --remove-damaged"
    )


def _claimants(directory: RunDirectory, heart: Heartbeat, listener: Listener) -> list[Beat]:
    claims = [beat for beat in read_beats(directory) if beat.driver != heart.driver and beat.claims]
    others = listener.not_given_up(claims)
    for beat in claims:
        if beat not in others:
            remove_beat(directory, beat.driver)
    return others


def _tell(other: Beat, directory: RunDirectory, reporter: Reporter) -> bool:
    reporter.message(
        f"Waiting for another driver on {other.where}, which plans a run or an addition in {directory.uri}"
    )
    return True
