"""Two writers of one run in a store that ignores conditional writes: no run mixes their labels or loses images."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import TypeVar

import pytest

from ovss_ray.errors import DamagedRunError, RunFailedError, RunMismatchError
from ovss_ray.images.stores import open_store
from ovss_ray.labels.additions import Addition
from ovss_ray.labels.reading import open_run
from ovss_ray.labels.shard import read_shard_metadata
from ovss_ray.run import alone, heartbeat
from ovss_ray.run.additions import continue_run, extend_run, load_job
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.driver import run_job
from ovss_ray.run.files import StoredFiles
from ovss_ray.run.heartbeat import Beat, Heartbeat, read_beats
from ovss_ray.run.progress import SilentReporter
from ovss_ray.run.text import load_text
from ovss_ray.run.verify import verify_run
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import load_vocabulary
from tests.faults import UNCONDITIONAL, FaultyEndpoint
from tests.processes import run_together
from tests.run.conftest import CLIP

MakeSpec = Callable[..., JobSpec]
T = TypeVar("T")


@pytest.fixture
def store(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyEndpoint]:
    """The proxy before the bucket `s3`, which takes the conditions out of all puts."""
    import s3fs

    with FaultyEndpoint(s3_endpoint) as endpoint:
        endpoint.plan.add(UNCONDITIONAL, method="PUT")
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url)
        s3fs.S3FileSystem.clear_instance_cache()
        yield endpoint


def fingerprints(run: str) -> set[str]:
    fs, root = open_store(run)
    fs.invalidate_cache()
    found = set()
    for path in fs.find(f"{root}/shards"):
        with fs.open(path, "rb") as file:
            found.add(read_shard_metadata(file)["fingerprint"])
    return found


def test_two_drivers_that_start_with_different_classes(store: FaultyEndpoint, s3: str, photos: Path) -> None:
    run = f"{s3}/run"
    job = ["label", str(photos), run, "--templates", "single", "--clip", CLIP, "--shard-size", "8", "--engine", "local"]
    told = dict(run_together([*job, "--classes", "cat,dog"], [*job, "--classes", "sky,grass,tree"]))
    assert told.keys() == {0, 4}, told
    assert "ignores conditional writes" in told[0]
    assert "was started with other settings" in told[4]
    with open_run(run) as opened:
        assert fingerprints(run) == {opened.fingerprint}
        assert opened.status_counts() == {"ok": 40}
    assert verify_run(run).exit_code == 0


def test_only_one_of_many_drivers_plans_at_a_time(
    store: FaultyEndpoint, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "LOOK_EVERY_S", 0.05)
    inside, most, planned = 0, 0, 0
    lock = threading.Lock()

    def plan() -> None:
        nonlocal inside, most, planned
        directory = RunDirectory(f"{s3}/run", conditional_put=False)
        with Heartbeat(directory, "planning") as heart:
            alone.wait_for_turn(directory, heart, SilentReporter())
            with lock:
                inside += 1
                most = max(most, inside)
            time.sleep(0.2)
            with lock:
                inside -= 1
                planned += 1

    drivers = [threading.Thread(target=plan) for _ in range(4)]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(60)
    assert (most, planned) == (1, 4)


class TestClaims:
    """Of drivers on other machines, whose clocks are wrong."""

    @pytest.fixture
    def directory(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
        monkeypatch.setattr(alone, "LOOK_EVERY_S", 0.05)
        monkeypatch.setattr(heartbeat, "_SLACK_S", 0.7)
        directory = RunDirectory(str(tmp_path / "run"))
        directory.prepare()
        return directory

    @staticmethod
    def claim(directory: RunDirectory, behind_s: float, *, claims: bool = True) -> None:
        at = (datetime.now(timezone.utc) - timedelta(seconds=behind_s)).isoformat()
        name = "20200101T000000-00000000"
        beat = Beat(driver=name, host="far-away", pid=1, package_version="1", state="planning", claims=claims,
                    started_at=at, since=at, beat_at=at, every_s=0.1)  # fmt: skip
        directory.replace(f"drivers/{name}.json", beat.model_dump_json().encode())

    @pytest.mark.parametrize("behind_s", [300.0, -7200.0])
    def test_one_that_goes_on_writing_keeps_its_claim(self, behind_s: float, directory: RunDirectory) -> None:
        happened = []

        def plan() -> None:
            with Heartbeat(directory, "planning") as heart:
                alone.wait_for_turn(directory, heart, SilentReporter())
                happened.append("the second has its turn")

        self.claim(directory, behind_s)
        second = threading.Thread(target=plan)
        second.start()
        for _ in range(40):  # longer than its patience of a second
            time.sleep(0.05)
            self.claim(directory, behind_s)
        happened.append("the first is done")
        self.claim(directory, behind_s, claims=False)
        second.join(60)
        assert happened == ["the first is done", "the second has its turn"]

    @pytest.mark.parametrize("behind_s", [300.0, -7200.0])
    def test_that_of_a_dead_one_lapses(self, behind_s: float, directory: RunDirectory) -> None:
        self.claim(directory, behind_s)
        with Heartbeat(directory, "planning") as heart:
            planning = threading.Thread(
                target=alone.wait_for_turn, args=(directory, heart, SilentReporter()), daemon=True
            )
            planning.start()
            planning.join(60)
            assert not planning.is_alive()
            assert [beat.driver for beat in read_beats(directory)] == [heart.driver]


class Order:
    """The first thread that has begun to write a file waits before it does, until another is done or must wait."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
        self.go_on = threading.Event()
        held: list[str] = []
        write = StoredFiles.replace

        def replace(files: StoredFiles, path: str, data: bytes) -> None:
            if path.endswith(name) and not held:
                held.append(path)
                assert self.go_on.wait(120)
            write(files, path, data)

        monkeypatch.setattr(StoredFiles, "replace", replace)

    def of(self, *calls: Callable[[], T]) -> list[T | Exception]:
        """What came of two calls at once."""

        def call(called: Callable[[], T]) -> T | Exception:
            try:
                return called()
            except RunFailedError as error:
                return error
            finally:
                self.go_on.set()

        with ThreadPoolExecutor(len(calls)) as threads:
            return list(threads.map(call, calls))


def test_two_drivers_with_the_same_settings_that_do_not_hear_each_other(
    store: FaultyEndpoint, s3: str, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ovss_ray.run.driver.wait_for_turn", lambda *_: None)  # each was taken for dead by the other
    spec = make_spec(run=f"{s3}/run", limit=16)
    summaries = Order(monkeypatch, "run.json").of(lambda: run_job(spec), lambda: run_job(spec))
    assert [getattr(summary, "statuses", summary) for summary in summaries] == [{"ok": 16}] * 2
    assert run_job(spec).statuses == {"ok": 16}
    assert verify_run(spec.run).exit_code == 0


class Waiting(SilentReporter):
    """Lets the other writer go on as soon as this one waits for it."""

    def __init__(self, order: Order) -> None:
        self._order = order

    def message(self, text: str) -> None:
        super().message(text)
        self._order.go_on.set()


def test_of_two_that_extend_a_run_at_once_one_is_told_to_try_again(
    store: FaultyEndpoint, s3: str, make_spec: MakeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alone, "LOOK_EVERY_S", 0.05)
    spec = make_spec(run=f"{s3}/run", limit=4)
    run_job(spec)
    order = Order(monkeypatch, "additions/00001.json")

    def extend() -> Addition | None:
        return extend_run(load_job(spec.run), {"limit": 8}, reporter=Waiting(order))

    came = order.of(extend, extend)
    (refused,) = (outcome for outcome in came if isinstance(outcome, RunFailedError))
    assert "another process has just added images" in str(refused)
    assert continue_run(load_job(spec.run)).statuses == {"ok": 12}


def test_a_driver_whose_run_was_replaced_stops_before_it_writes_more(
    store: FaultyEndpoint, s3: str, make_spec: MakeSpec
) -> None:
    spec = make_spec(run=f"{s3}/run", method="tests.run.faulty:Faulty", settings={"seconds": 0.1})
    fs, root = open_store(spec.run)

    def replace() -> None:
        other = RunDirectory(spec.run, conditional_put=False)
        while not other.done_shards():
            time.sleep(0.05)
        record = other.read_json("run.json")
        assert record is not None
        other.replace("run.json", json.dumps({**record, "fingerprint": "0" * 64}).encode())

    late = threading.Thread(target=replace)
    late.start()
    with pytest.raises(RunMismatchError, match="another driver has started a run with other settings in"):
        run_job(spec)
    late.join(30)
    fs.invalidate_cache()
    assert 1 <= len(fs.ls(f"{root}/shards")) <= 3


@pytest.fixture
def mixed(make_spec: MakeSpec, tmp_path: Path) -> JobSpec:
    """A run of which one shard was labelled under other classes."""
    other = make_spec(run=str(tmp_path / "other"), classes="sky,tree", limit=24)
    run_job(other)
    spec = make_spec(limit=24)
    run_job(spec)
    for name in ("shards/00000001.parquet", "shards/00000002.parquet", "summary.json"):
        (Path(spec.run) / name).unlink()
    shutil.copy(Path(other.run) / "shards" / "00000001.parquet", Path(spec.run) / "shards" / "00000001.parquet")
    return spec


def test_a_run_does_not_end_well_with_shards_of_two_fingerprints(mixed: JobSpec) -> None:
    for _ in range(2):
        with pytest.raises(DamagedRunError, match="shards/00000001.parquet was labelled under other settings"):
            run_job(mixed)
        assert not (Path(mixed.run) / "summary.json").exists()
    assert verify_run(mixed.run, footers_only=True, remove_damaged=True).removed == ["shards/00000001.parquet"]
    assert run_job(mixed).statuses == {"ok": 24}


def test_a_shard_of_another_fingerprint_is_not_taken_for_done(mixed: JobSpec, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = RunDirectory.done_shards
    calls = iter([True])  # the driver looks once, before the other driver's shard is there
    monkeypatch.setattr(RunDirectory, "done_shards", lambda self: listed(self) - ({1} if next(calls, False) else set()))
    with pytest.raises(RunFailedError, match="00000001.parquet was labelled under other settings, by another driver"):
        run_job(mixed)


def test_text_of_other_classes_is_not_used(mixed: JobSpec) -> None:
    directory = RunDirectory(mixed.run)
    assert load_text(directory, load_vocabulary(mixed.classes, templates="single")) is not None
    with pytest.raises(RunFailedError, match="text.parquet was encoded for other classes"):
        load_text(directory, load_vocabulary("sky,tree", templates="single"))
