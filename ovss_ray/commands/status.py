"""The command `status`: how far runs are."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ovss_ray.flags import AsJson, StorageOptionsJson, parse_storage_options
from ovss_ray.printable import printable
from ovss_ray.terminal import out, say, say_json

if TYPE_CHECKING:
    from ovss_ray.errors import OvssError
    from ovss_ray.run.status import RunState

WATCH_EVERY_S = 5.0
WATCH_SHARE = 20.0  # times as long as a look takes: large runs in object stores take many requests


def status(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run directory, or a folder of runs.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Look again every few seconds until the run is finished, or Ctrl-C.")
    ] = False,
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
    """How far a run is, what it does, and why images failed; also while it runs, from another machine.

    Planning, loading, running, stopping, stopped (when and why), finished; or no sign of life, and since when. Of a
    folder of runs, a table. A few listings and small files, whatever the size of a run. Statuses are counted for runs
    of up to 256 shards, and known of complete ones; for others say --full.

    Example: ovss-ray status runs/first --watch
    """
    from ovss_ray.run.heartbeat import Listener
    from ovss_ray.run.status import find_runs, read_status, read_statuses

    options = parse_storage_options(storage_options)
    listener = Listener()

    def look() -> _Found:
        runs = find_runs(run, options)
        if runs is None:
            return _One(read_status(run, options, full=full, listener=listener))
        return _Many(runs, read_statuses(runs, options, full=full, listener=listener))

    if not watch:
        found = look()
        if as_json:
            say_json(found.record())
        else:
            out.print(*found.shown(), sep="\n", soft_wrap=True)
        return
    try:
        _watch(look, as_json)
    except KeyboardInterrupt:
        return  # the usual way to stop looking


class _One:
    """The state of one run."""

    def __init__(self, state: RunState) -> None:
        self._state = state
        self.is_finished = state.activity == "finished"

    def record(self) -> Any:
        return asdict(self._state)

    def shown(self) -> list[RenderableType]:
        return [Text(printable(line)) for line in _lines(self._state)]

    def brief(self) -> str:
        """One line, without the name of the run."""
        return _brief(self._state)


class _Many:
    """The states of the runs of a folder."""

    def __init__(self, runs: list[str], states: list[RunState | OvssError]) -> None:
        self._rows = list(zip(runs, states, strict=True))
        self.is_finished = all(getattr(state, "activity", "finished") == "finished" for state in states)

    def record(self) -> Any:
        return [{"run": run, "error": str(s)} if isinstance(s, Exception) else asdict(s) for run, s in self._rows]

    def shown(self) -> list[RenderableType]:
        table = Table(box=None, pad_edge=False)
        for title in ("run", "state"):
            table.add_column(title, overflow="fold")
        for title in ("images", "done", "images/s", "failed", "last sign"):
            table.add_column(title, justify="right")
        problems = []
        for run, state in self._rows:
            name = printable(run.rsplit("/", 1)[-1])
            if isinstance(state, Exception):
                table.add_row(name, "cannot be read")
                problems.append(Text(printable(str(state))))
            else:
                table.add_row(name, *_cells(state))
        return [table, *problems]

    def brief(self) -> str:
        """How many runs do what."""
        doing: dict[str, int] = {}
        for _, state in self._rows:
            activity = getattr(state, "activity", "cannot be read")
            doing[activity] = doing.get(activity, 0) + 1
        return ", ".join(f"{count:,} {activity}" for activity, count in doing.items())


_Found = _One | _Many


def _watch(look: Callable[[], _Found], as_json: bool) -> None:
    """In place on a terminal, else line by line."""
    from rich.live import Live

    if out.is_terminal and not as_json:
        with Live(console=out, auto_refresh=False) as screen:
            _look_on(look, lambda found: screen.update(Group(*found.shown()), refresh=True))
        return
    if as_json:
        _look_on(look, lambda found: out.print(json.dumps(found.record()), soft_wrap=True))
    else:
        _look_on(look, lambda found: say(f"{time.strftime('%H:%M:%S')}  {found.brief()}"))


def _look_on(look: Callable[[], _Found], show: Callable[[_Found], None]) -> None:
    while True:
        began = time.monotonic()
        found = look()
        show(found)
        if found.is_finished:
            return
        time.sleep(max(WATCH_EVERY_S, WATCH_SHARE * (time.monotonic() - began)))


def _lines(state: RunState) -> list[str]:
    from ovss_ray.run.summary import failure_lines

    if state.shards is None:
        return [state.run, state.pace()]
    counted = "statuses not counted, --full does" if state.statuses is None else _counts(state.statuses)
    lines = [
        f"{state.run}: {state.method} on {state.clip}, {state.classes} classes",
        f"shards  {state.shards_done:,} of {state.shards:,} finished ({_fraction(state)})",
        f"images  {state.images_done:,} of {state.images:,}: {counted}",
        state.pace(),
    ]
    for added in state.additions:
        lines.append(
            f"{added['kind']:<7} {added['images']:,} images at {added['created_at']}, "
            f"{added['shards_done']:,} of {added['shards']:,} shards finished"
        )
    lines += [f"Warning: {warning}" for warning in state.warnings]
    if state.crashed:
        lines.append(f"{state.crashed:,} images ended their worker and are set aside")
    lines += [f"  {line}" for line in failure_lines(state.failures or [], state.failure_kinds)]
    if state.activity in ("stopped", "silent"):
        lines += ["Continue with:", f"  {state.continue_with}"]
    return lines


def _brief(state: RunState) -> str:
    if state.shards is None:
        return state.pace()
    failed = "" if not state.failed else f", {state.failed:,} failed"
    return f"{state.images_done:,} of {state.images:,} images{failed}; {state.pace()}"


def _cells(state: RunState) -> list[str]:
    from ovss_ray.run.progress import duration

    return [
        "no sign of life" if state.activity == "silent" else state.activity,
        "" if state.images is None else f"{state.images:,}",
        "" if state.shards is None else _fraction(state),
        f"{state.images_per_s:.1f}" if state.images_per_s else "",
        "?" if state.failed is None else f"{state.failed:,}",
        "" if state.last_sign_age_s is None else f"{duration(state.last_sign_age_s)} ago",
    ]


def _fraction(state: RunState) -> str:
    return f"{state.shards_done / state.shards:.1%}" if state.shards else "100%"


def _counts(statuses: dict[str, int]) -> str:
    return ", ".join(f"{count:,} {name}" for name, count in sorted(statuses.items())) or "none yet"
