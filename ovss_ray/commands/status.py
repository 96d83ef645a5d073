"""The command `status`: how far runs are."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from ovss_ray.commands.outcomes import say_failures
from ovss_ray.flags import AsJson, RunPlace, StorageOptionsJson, parse_storage_options
from ovss_ray.terminal import say, say_json


def status(
    run: RunPlace,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Count statuses and reasons of failure in any case: reads a "
            "little of every shard (three requests each in an object store).",
        ),
    ] = False,
    as_json: AsJson = False,
    storage_options: StorageOptionsJson = None,
) -> None:
    """How far a run is, whether it still goes on, and why images failed; also while it runs, from another machine.

    A listing and a few footers, whatever the size of the run. Statuses are counted for runs of up to 256 shards, and
    known of complete ones; for others say --full.
    """
    from ovss_ray.run.summary import read_status

    state = read_status(run, parse_storage_options(storage_options), full=full)
    if as_json:
        say_json(asdict(state))
        return
    say(f"{state.run}: {state.method} on {state.clip}, {state.classes} classes")
    say(f"shards  {state.shards_done:,} of {state.shards:,} finished ({state.shards_done / state.shards:.1%})")
    statuses = "statuses not counted, --full does" if state.statuses is None else _counts(state.statuses)
    say(f"images  {state.images_done:,} of {state.images:,}: {statuses}")
    if state.last_shard_at is not None:
        say(state.pace())
    for added in state.additions:
        say(f"{added['kind']:<7} {added['images']:,} images at {added['created_at']}, "
             f"{added['shards_done']:,} of {added['shards']:,} shards finished")  # fmt: skip
    if state.crashed:
        say(f"{state.crashed:,} images ended their worker and are set aside")
    say_failures(state.failures or [], state.failure_kinds)
    if state.activity in ("stopped", "not begun"):
        say("Continue with:", f"  {state.continue_with}")


def _counts(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(statuses.items())) or "none yet"
