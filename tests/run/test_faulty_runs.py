"""Whole runs where the store fails, where the disk is full or locked, and where two drivers meet on one directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from ovss_ray import open_run
from ovss_ray.errors import RunFailedError
from ovss_ray.images import backoff
from ovss_ray.images.listing import list_images
from ovss_ray.images.stores import open_store
from ovss_ray.run.directory import WRITE_ATTEMPTS, RunDirectory
from ovss_ray.run.driver import run_job
from ovss_ray.run.manifest import write_manifest
from ovss_ray.spec import JobSpec
from tests.faults import LOST_REPLY, RESET, TRUNCATED, FaultyEndpoint, HttpFault, status
from tests.processes import run_together
from tests.run.conftest import CLIP

MakeSpec = Callable[..., JobSpec]
IMAGES, SHARD_SIZE = 40, 8
SHARDS = [f"shards/{shard:08d}.parquet" for shard in range(IMAGES // SHARD_SIZE)]
RUN_FILES = ["classes.parquet", "run.json", "summary.json", "text.parquet", *SHARDS]


@pytest.fixture
def store(s3: str, s3_endpoint: str, photos: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyEndpoint]:
    """The proxy before the bucket `s3`, which holds the photos; waits between attempts are short."""
    import s3fs

    fs, root = open_store(s3)
    fs.put(f"{photos}/", f"{root}/photos/", recursive=True)
    monkeypatch.setattr(backoff, "FIRST_WINDOW_S", 0.01)
    with FaultyEndpoint(s3_endpoint) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url)
        s3fs.S3FileSystem.clear_instance_cache()  # or those that know the server itself would be used again
        yield endpoint


def files_of(run: str) -> list[str]:
    fs, root = open_store(run)
    fs.invalidate_cache()
    names = [path.removeprefix(f"{root}/") for path in fs.find(root)]
    return sorted(name for name in names if not name.startswith("drivers/"))


def shards_of(run: str) -> dict[str, bytes]:
    fs, root = open_store(run)
    return {name: fs.cat_file(f"{root}/{name}") for name in files_of(run) if name.startswith("shards/")}


def label_maps(run: str) -> dict[str, np.ndarray]:
    with open_run(run) as opened:
        names = {
            number: uri.rsplit("/", 1)[-1] for number, uri in opened.sql("SELECT image_id, uri FROM images").fetchall()
        }
        return {names[number]: labels for number, labels in opened.label_maps()}


def assert_complete(run: str) -> None:
    """Every image exactly once, and no file that does not belong."""
    with open_run(run) as opened:
        (part,) = opened.manifest.parts  # of two plannings at once, the one that counts may have another name
        assert files_of(run) == sorted([part.name, *RUN_FILES])
        rows = opened.sql("SELECT count(*), count(DISTINCT image_id), count(DISTINCT uri), max(image_id) FROM images")
        assert rows.fetchall() == [(IMAGES, IMAGES, IMAGES, IMAGES - 1)]


# -- a store that fails ------------------------------------------------------------------------------------------------


def test_a_run_in_a_store_that_often_fails_is_complete_and_right(
    make_spec: MakeSpec, store: FaultyEndpoint, s3: str, tmp_path: Path
) -> None:
    run_job(make_spec(run=str(tmp_path / "undisturbed")))
    for seed, fault in enumerate([status(503), status(500), RESET, LOST_REPLY, TRUNCATED]):
        store.plan.add(fault, method="GET", path="*/photos/*.jpg", share=0.08, seed=seed)
        store.plan.add(fault, method="PUT", path="*/run/*", share=0.1, seed=seed)
        store.plan.add(fault, share=0.01, seed=seed)
    summary = run_job(make_spec(input=f"{s3}/photos", run=f"{s3}/run", fetch_attempts=8))
    assert len([request for request in store.asked() if request.fault]) > 15
    store.plan.clear()
    assert summary.statuses == {"ok": IMAGES}
    assert_complete(f"{s3}/run")
    expected, found = label_maps(str(tmp_path / "undisturbed")), label_maps(f"{s3}/run")
    assert found.keys() == expected.keys()
    for name in expected:
        np.testing.assert_array_equal(found[name], expected[name])


def test_what_an_image_cannot_be_read_for_is_in_its_row(make_spec: MakeSpec, store: FaultyEndpoint, s3: str) -> None:
    expected = {
        "0000.jpg": "not_found",
        "0001.jpg": "forbidden",
        "0002.jpg": "fetch_failed",
        "0003.jpg": "fetch_failed",
    }
    for name, fault in zip(expected, [status(404), status(403), status(503), TRUNCATED], strict=True):
        store.plan.add(fault, method="GET", path=f"*/{name}")
    run_job(make_spec(input=f"{s3}/photos", run=f"{s3}/run", fetch_attempts=3))
    with open_run(f"{s3}/run") as run:
        rows = run.sql("SELECT uri, status, error FROM images WHERE status != 'ok'").fetchall()
    assert {uri.rsplit("/", 1)[-1]: said for uri, said, _ in rows} == expected
    reasons = {uri.rsplit("/", 1)[-1]: error for uri, _, error in rows}
    assert "SlowDown" in reasons["0002.jpg"]
    assert "attempt 3 of 3" in reasons["0003.jpg"]
    assert [len(store.asked("GET", f"*/{name}")) for name in expected] == [1, 1, 3, 3]
    assert_complete(f"{s3}/run")


@pytest.mark.parametrize(
    "name", ["run.json", "classes.parquet", "text.parquet", "shards/00000002.parquet", "summary.json"]
)
def test_a_reply_lost_after_the_put_took_place_stops_nothing(
    name: str, make_spec: MakeSpec, store: FaultyEndpoint, s3: str
) -> None:
    store.plan.add(LOST_REPLY, method="PUT", path=f"*/run/{name}", first=4)
    assert run_job(make_spec(input=f"{s3}/photos", run=f"{s3}/run")).labelled == IMAGES
    assert len(store.asked("PUT", f"*/run/{name}")) == 5
    assert_complete(f"{s3}/run")


@pytest.mark.parametrize(
    ("fault", "name", "said"),
    [
        (status(403), "manifest/00000.parquet", "manifest/00000.parquet cannot be written: AccessDenied"),
        (status(403), "run.json", "run.json cannot be written: AccessDenied"),
        (status(403), "shards/00000002.parquet", "00000002.parquet cannot be written: AccessDenied.*check the perm"),
        (
            status(507),
            "shards/00000000.parquet",
            "00000000.parquet cannot be written: .*InsufficientStorage.*make room",
        ),
    ],
    ids=lambda value: "" if isinstance(value, HttpFault) else value[:12],
)
def test_a_write_that_is_refused_stops_the_run_and_the_same_command_continues(
    fault: HttpFault, name: str, said: str, make_spec: MakeSpec, store: FaultyEndpoint, s3: str
) -> None:
    store.plan.add(fault, method="PUT", path=f"*/run/{name}")
    spec = make_spec(input=f"{s3}/photos", run=f"{s3}/run")
    with pytest.raises(RunFailedError, match=f"(?s){s3}/run/.*{said}"):
        run_job(spec)
    assert len(store.asked("PUT", f"*/run/{name}")) == 1
    store.plan.clear()
    kept = shards_of(f"{s3}/run")
    assert run_job(spec).labelled == IMAGES
    assert_complete(f"{s3}/run")
    now = shards_of(f"{s3}/run")
    assert {shard: now[shard] for shard in kept} == kept


def test_a_shard_that_cannot_be_written_for_long_stops_the_run_and_the_same_command_continues(
    make_spec: MakeSpec, store: FaultyEndpoint, s3: str
) -> None:
    store.plan.add(status(503), method="PUT", path="*/shards/00000002.parquet")
    spec = make_spec(input=f"{s3}/photos", run=f"{s3}/run", max_shard_attempts=2)
    with pytest.raises(RunFailedError, match=r"(?s)00000002.parquet could not be written in 7 attempts: SlowDown"):
        run_job(spec)
    assert len(store.asked("PUT", "*/shards/00000002.parquet")) == 2 * WRITE_ATTEMPTS
    store.plan.clear()
    assert run_job(spec).labelled == IMAGES
    assert_complete(f"{s3}/run")


# -- two drivers -------------------------------------------------------------------------------------------------------


def arguments(source: str, run: str) -> list[str]:
    job = ["label", source, run, "--classes", "cat,dog,grass,sky", "--templates", "single", "--clip", CLIP]
    return [*job, "--shard-size", str(SHARD_SIZE), "--engine", "local"]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, photos: Path, tmp_path: Path) -> tuple[str, str]:
    """Images, and a place for a run."""
    if request.param == "local":
        return str(photos), str(tmp_path / "run")
    s3 = request.getfixturevalue("s3")
    request.getfixturevalue("store")
    return f"{s3}/photos", f"{s3}/run"


def test_two_drivers_that_start_one_run_both_finish_it(place: tuple[str, str]) -> None:
    outcomes = run_together(arguments(*place), arguments(*place))
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert_complete(place[1])


def test_another_planning_under_way_is_not_mixed_in(make_spec: MakeSpec, photos: Path, tmp_path: Path) -> None:
    """Another process has listed other images, but its run does not exist yet."""
    ours = RunDirectory(str(tmp_path / "run"))
    ours.prepare()
    late = write_manifest(list_images(str(photos / "a")), ours, SHARD_SIZE)
    assert run_job(make_spec()).labelled == IMAGES
    assert_complete(str(tmp_path / "run"))
    assert not Path(ours.path(late.parts[0].name)).exists()


def test_two_drivers_that_continue_one_run_both_finish_it(place: tuple[str, str], make_spec: MakeSpec) -> None:
    source, run = place
    run_job(make_spec(input=source, run=run))
    fs, root = open_store(run)
    fs.rm([f"{root}/{name}" for name in SHARDS[1:]] + [f"{root}/summary.json"])
    kept = shards_of(run)
    outcomes = run_together(arguments(source, run), arguments(source, run))
    assert [code for code, _ in outcomes] == [0, 0], outcomes
    assert_complete(run)
    assert shards_of(run)[SHARDS[0]] == kept[SHARDS[0]]


# -- disks -------------------------------------------------------------------------------------------------------------


def on_a_small_disk(script: str, folder: Path, kib: int) -> subprocess.CompletedProcess[str]:
    """Run a shell script in which `folder` is a disk of its own; its arguments are in $@."""
    namespace = ["unshare", "--map-root-user", "--mount", "sh", "-euc"]
    mount = f'mount -t tmpfs -o size={kib}k tmpfs "{folder}"\n'
    try:
        subprocess.run([*namespace, mount], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a disk in a namespace of its own")
    return subprocess.run([*namespace, mount + script], capture_output=True, text=True)


def test_a_full_disk_stops_the_run_and_the_same_command_continues(photos: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    command = subprocess.list2cmdline([sys.executable, "-m", "ovss_ray", *arguments(str(photos), f"{disk}/run")])
    script = f"""
        head -c 3000k /dev/zero > {disk}/others
        code=0; {command} || code=$?
        echo "stopped with $code"
        [ ! -e {disk}/run/.tmp ]
        rm {disk}/others
        {command}
        cp -r {disk}/run {tmp_path}/kept
    """
    done = on_a_small_disk(script, disk, kib=3060)
    assert done.returncode == 0, done
    assert "stopped with 5" in done.stdout
    assert "No space left on device; make room there" in done.stderr
    assert "Traceback" not in done.stderr
    assert_complete(str(tmp_path / "kept"))


def test_a_locked_folder_is_refused_before_any_work(photos: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    (run / "shards").mkdir(parents=True)
    (run / "manifest").mkdir()
    run.chmod(0o555)
    command = [sys.executable, "-m", "ovss_ray", *arguments(str(photos), str(run))]
    if os.geteuid() == 0:  # the superuser writes everywhere, but for this
        setpriv = shutil.which("setpriv")
        if setpriv is None:
            pytest.skip("the superuser cannot give up this right here")
        command = [setpriv, "--bounding-set=-dac_override", "--inh-caps=-dac_override", *command]
    done = subprocess.run(command, capture_output=True, text=True)
    run.chmod(0o755)
    assert done.returncode == 3, done
    assert f"{run} cannot be written: {run} is read-only; check the permissions" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path.name for path in run.iterdir()} == {"shards", "manifest"}
