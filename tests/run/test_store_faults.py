"""Reading and writing a run directory in stores that fail: a real S3 server behind a proxy, and a file system."""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ovss_ray.errors import InputError, RunFailedError
from ovss_ray.images.stores import open_store
from ovss_ray.run.directory import WRITE_ATTEMPTS, RunDirectory, StoreUnavailableError
from tests.faults import (
    IGNORES_CONDITION,
    LOST_REPLY,
    RESET,
    STALL,
    TRUNCATED,
    UNCONDITIONAL,
    FaultyEndpoint,
    FileFault,
    HttpFault,
    fails,
    faulty_file_system,
    slow,
    status,
)

SHARD = "shards/00000007.parquet"
OURS, THEIRS = b"ours" * 500, b"theirs" * 500


@pytest.fixture
def store(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyEndpoint]:
    """The proxy before the bucket `s3`."""
    with FaultyEndpoint(s3_endpoint) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url)
        yield endpoint


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def directory(store: FaultyEndpoint, s3: str, waits: list[float]) -> RunDirectory:
    """A run directory behind the proxy; the requests that prepared it are forgotten."""
    quick = {"s3": {"config_kwargs": {"read_timeout": 0.5}}}
    made = RunDirectory(f"{s3}/run", quick, sleep=waits.append)
    made.prepare()
    store.requests.clear()
    return made


def files_of(bucket: str) -> dict[str, bytes]:
    """All files of a bucket, asked for directly."""
    fs, root = open_store(bucket)
    fs.invalidate_cache()
    return {path.removeprefix(f"{root}/"): fs.cat_file(path) for path in fs.find(root)}


PASSING = [
    status(429),
    status(500),
    status(503),
    status(400, "RequestTimeout"),
    status(409),
    slow(0.05),
    STALL,
    RESET,
    LOST_REPLY,
    TRUNCATED,
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.kind}{fault.status or ''}")
def test_a_file_is_written_whole_and_created_once_whatever_passes(
    fault: HttpFault, store: FaultyEndpoint, directory: RunDirectory, s3: str
) -> None:
    # aiohttp itself asks once more when a connection is reset, so four are seen as two.
    store.plan.add(fault, method="PUT", first=4 if fault in (RESET, LOST_REPLY) else 2)
    assert directory.create(SHARD, OURS) is True
    assert files_of(s3) == {f"run/{SHARD}": OURS}
    assert {request.headers.get("if-none-match") for request in store.asked("PUT")} == {"*"}
    assert directory.create(SHARD, THEIRS) is False
    directory.replace("summary.json", OURS)
    assert files_of(s3) == {f"run/{SHARD}": OURS, "run/summary.json": OURS}


def test_a_put_whose_reply_got_lost_once_is_ours(store: FaultyEndpoint, directory: RunDirectory, s3: str) -> None:
    store.plan.add(LOST_REPLY, method="PUT", first=1)  # repeated by aiohttp: all that we see is a refusal
    assert directory.create(SHARD, OURS) is True
    assert files_of(s3) == {f"run/{SHARD}": OURS}


def test_a_large_file_is_one_put_too(store: FaultyEndpoint, directory: RunDirectory, s3: str) -> None:
    large = bytes(101 * 2**20)  # from 100 MB on s3fs would send it in parts
    patient = RunDirectory(directory.uri)  # a busy machine takes its time for so much
    store.plan.add(LOST_REPLY, method="PUT", first=1)
    assert patient.create(SHARD, large) is True
    assert {request.method for request in store.asked()} == {"PUT", "HEAD", "GET"}
    assert files_of(s3) == {f"run/{SHARD}": large}


@pytest.mark.parametrize("same_length", [True, False])
def test_a_race_that_was_lost_stays_lost_when_the_reply_gets_lost_too(
    same_length: bool, store: FaultyEndpoint, directory: RunDirectory, s3: str
) -> None:
    theirs = OURS[::-1] if same_length else THEIRS
    assert RunDirectory(directory.uri).create(SHARD, theirs)
    store.plan.clear()
    store.plan.add(LOST_REPLY, method="PUT", first=4)
    assert directory.create(SHARD, OURS) is False
    assert files_of(s3) == {f"run/{SHARD}": theirs}


@pytest.mark.parametrize("fault", [status(503), status(500), status(409), RESET], ids=lambda fault: fault.kind)
def test_what_does_not_pass_is_given_up_after_so_many_attempts(
    fault: HttpFault, store: FaultyEndpoint, directory: RunDirectory, s3: str, waits: list[float]
) -> None:
    store.plan.add(fault, method="PUT")
    with pytest.raises(StoreUnavailableError, match=f"{s3}/run/{SHARD} could not be written in 7 attempts: ."):
        directory.create(SHARD, OURS)
    assert len(waits) == WRITE_ATTEMPTS - 1
    assert len(store.asked("PUT")) in (WRITE_ATTEMPTS, 2 * WRITE_ATTEMPTS)  # twice: aiohttp after a reset
    store.plan.clear()
    assert directory.create(SHARD, OURS) is True


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (status(403), "AccessDenied.*; check the permissions"),
        (status(403, "QuotaExceeded"), ".*QuotaExceeded.*; check the permissions"),
        (status(507), ".*InsufficientStorage.*; make room there"),
        (status(404, "NoSuchBucket"), "NoSuchBucket.*; check that the folder or bucket exists"),
    ],
    ids=lambda value: value.code if isinstance(value, HttpFault) else "",
)
def test_what_is_refused_is_not_tried_again(
    fault: HttpFault, said: str, store: FaultyEndpoint, directory: RunDirectory, waits: list[float]
) -> None:
    store.plan.add(fault, method="PUT")
    for write in (directory.create, directory.replace):
        with pytest.raises(RunFailedError, match=f"{SHARD} cannot be written: {said}"):
            write(SHARD, OURS)
    assert (len(store.asked("PUT")), waits) == (2, [])


@pytest.mark.parametrize("fault", [status(412), status(404, "NoSuchUpload")], ids=lambda fault: fault.code)
def test_a_refusal_that_cannot_be_true_is_not_believed(
    fault: HttpFault, store: FaultyEndpoint, directory: RunDirectory, s3: str
) -> None:
    store.plan.add(fault, method="PUT", first=2)
    assert directory.create(SHARD, OURS) is True
    assert files_of(s3) == {f"run/{SHARD}": OURS}
    assert len(store.asked("PUT")) == 3


@pytest.mark.parametrize(
    "fault", [UNCONDITIONAL, status(501), status(400), status(405, "MethodNotAllowed")], ids=lambda fault: fault.code
)
def test_a_store_that_knows_no_conditional_put_gets_plain_ones(
    fault: HttpFault, store: FaultyEndpoint, s3: str
) -> None:
    # Of the puts that probe the store, the first two carry a condition; where it is refused, only the first.
    store.plan.add(fault, method="PUT", path="*/.tmp/*", first=2 if fault is UNCONDITIONAL else 1)
    directory = RunDirectory(f"{s3}/run")
    directory.prepare()
    assert not directory.conditional_put
    assert files_of(s3) == {}
    store.plan.add(LOST_REPLY, method="PUT", path=f"*/{SHARD}", first=1)
    assert directory.create(SHARD, OURS) is True
    assert directory.create(SHARD, THEIRS) is False
    assert files_of(s3) == {f"run/{SHARD}": OURS}
    assert not any("if-none-match" in request.headers for request in store.asked("PUT", f"*/{SHARD}"))


@pytest.mark.parametrize("fault", [status(503), status(409), RESET, LOST_REPLY], ids=lambda fault: fault.kind)
def test_probing_survives_what_passes(fault: HttpFault, store: FaultyEndpoint, s3: str, waits: list[float]) -> None:
    for method in ("PUT", "DELETE"):
        store.plan.add(fault, method=method, path="*/.tmp/*", nth=[1, 2, 4])
    directory = RunDirectory(f"{s3}/run", sleep=waits.append)
    directory.prepare()
    assert directory.conditional_put
    assert files_of(s3) == {}


def test_a_store_that_lets_nothing_be_deleted_can_be_used(
    store: FaultyEndpoint, s3: str, caplog: pytest.LogCaptureFixture
) -> None:
    store.plan.add(status(403), method="DELETE")
    directory = RunDirectory(f"{s3}/run")
    with caplog.at_level(logging.WARNING):
        directory.prepare()
    assert directory.conditional_put
    assert "cannot be removed without permission to delete" in caplog.text


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (status(403), "access is denied; check the credentials"),
        (status(503), "the store is too busy to answer; try again later"),
        (status(500), "the store answers with an error of its own; try again later"),
        (RESET, "the store cannot be reached; check the endpoint and the network"),
    ],
    ids=lambda value: f"{value.kind}{value.status}" if isinstance(value, HttpFault) else "",
)
def test_a_store_that_cannot_be_used_is_explained_at_the_start(
    fault: HttpFault, said: str, store: FaultyEndpoint, s3: str, waits: list[float]
) -> None:
    directory = RunDirectory(f"{s3}/run", sleep=waits.append)
    store.plan.add(fault)
    with pytest.raises(InputError, match=f"{s3}/run cannot be written: {said}"):
        directory.prepare()
    with pytest.raises(InputError, match=f"{s3}/run/run.json cannot be read: {said}"):
        directory.read_json("run.json")


@pytest.mark.parametrize(
    "fault",
    [fault for fault in PASSING if fault.status not in (400, 409)],
    ids=lambda fault: f"{fault.kind}{fault.status or ''}",
)
def test_reading_survives_what_passes(
    fault: HttpFault, store: FaultyEndpoint, directory: RunDirectory, waits: list[float]
) -> None:
    directory.create(SHARD, OURS)
    directory.replace("run.json", b'{"a": 1}')
    store.plan.clear()
    store.plan.add(fault, method="GET", path="*/run/run.json", first=2)
    store.plan.add(fault, method="HEAD", first=2)
    assert directory.read_json("run.json") == {"a": 1}
    assert directory.exists("run.json")


@pytest.mark.parametrize("fault", [status(503), RESET, TRUNCATED], ids=lambda fault: fault.kind)
def test_listing_survives_what_passes(fault: HttpFault, store: FaultyEndpoint, directory: RunDirectory) -> None:
    directory.create(SHARD, OURS)
    store.plan.clear()
    store.plan.add(fault, method="GET", path="*list-type=2*", first=1)
    assert directory.done_shards() == {7}
    store.plan.clear()
    store.plan.add(fault, method="GET", path="*list-type=2*", first=1)
    assert directory.files_in("shards") == [SHARD]
    assert any(request.fault for request in store.asked())


def test_a_missing_file_is_asked_for_once(store: FaultyEndpoint, directory: RunDirectory, waits: list[float]) -> None:
    assert directory.read("run.json") is None
    assert (len(store.asked()), waits) == (1, [])


def test_a_listing_that_is_forbidden_is_explained(
    store: FaultyEndpoint, directory: RunDirectory, waits: list[float]
) -> None:
    store.plan.add(status(403), path="*list-type=2*")
    with pytest.raises(InputError, match="run/shards cannot be read: access is denied"):
        directory.done_shards()
    assert waits == []


def test_a_file_that_cannot_be_read_for_long_is_explained(
    store: FaultyEndpoint, directory: RunDirectory, waits: list[float]
) -> None:
    store.plan.add(status(409, "Conflict"), method="GET")
    with pytest.raises(StoreUnavailableError, match="run/run.json could not be read in 5 attempts: .*Conflict"):
        directory.read("run.json")
    assert len(waits) == 4


# -- other drivers, by what they raise ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fault",
    [
        fails(OSError, errno.EIO, "Input/output error"),
        fails(TimeoutError, "slow"),
        fails(ConnectionResetError, "reset"),
        fails(ConnectionResetError, "the reply got lost", afterwards=True),
        fails(RuntimeError, "an exception of the driver's own"),
    ],
)
def test_writing_survives_what_any_driver_raises(fault: FileFault, tmp_path: Path, waits: list[float]) -> None:
    with faulty_file_system(tmp_path) as plan:
        directory = RunDirectory("gs://bucket/run", sleep=waits.append)
        directory.prepare()
        for method in ("pipe_file", "cat_file", "ls"):
            plan.add(fault, method=method, path="bucket/run/s*", first=2)
        assert directory.create(SHARD, OURS) is True
        assert directory.read(SHARD) == OURS
        assert directory.done_shards() == {7}
        assert directory.create(SHARD, THEIRS) is False
        directory.replace("summary.json", OURS)
    assert (tmp_path / "bucket" / "run" / SHARD).read_bytes() == OURS
    assert (tmp_path / "bucket" / "run" / "summary.json").read_bytes() == OURS


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (fails(OSError, errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device; make room there"),
        (fails(OSError, errno.EDQUOT, os.strerror(errno.EDQUOT)), "Disk quota exceeded; make room there, or raise"),
        (fails(OSError, errno.EROFS, os.strerror(errno.EROFS)), "Read-only file system; mount it writable"),
        (fails(PermissionError, errno.EACCES, os.strerror(errno.EACCES)), "Permission denied; check the permissions"),
        (fails(PermissionError, "Forbidden"), "Forbidden; check the permissions"),
        (fails(FileNotFoundError, "bucket"), "bucket; check that the folder or bucket exists"),
    ],
)
def test_what_any_driver_refuses_is_not_tried_again(
    fault: FileFault, said: str, tmp_path: Path, waits: list[float]
) -> None:
    with faulty_file_system(tmp_path) as plan:
        directory = RunDirectory("gs://bucket/run", sleep=waits.append)
        plan.add(fault, method="pipe_file")
        with pytest.raises(RunFailedError, match=f"gs://bucket/run/{SHARD} cannot be written: {said}"):
            directory.create(SHARD, OURS)
    assert waits == []


@pytest.mark.parametrize("fault", [IGNORES_CONDITION, fails(NotImplementedError, "mode"), fails(ValueError, "mode")])
def test_a_driver_that_knows_no_conditional_put_gets_plain_ones(fault: FileFault, tmp_path: Path) -> None:
    with faulty_file_system(tmp_path) as plan:
        plan.add(fault, method="pipe_file", first=2 if fault is IGNORES_CONDITION else 1)
        directory = RunDirectory("gs://bucket/run")
        directory.prepare()
        assert not directory.conditional_put
        assert directory.create(SHARD, OURS) is True
        assert directory.create(SHARD, THEIRS) is False
        assert directory.read(SHARD) == OURS
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [Path(SHARD).name]


# -- disks -------------------------------------------------------------------------------------------------------------


def test_a_link_over_nfs_whose_reply_got_lost_is_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(str(tmp_path / "run"))
    directory.prepare()
    real_link = os.link

    def linked_twice(source: str, target: str) -> None:
        real_link(source, target)
        real_link(source, target)

    monkeypatch.setattr(os, "link", linked_twice)
    assert directory.create(SHARD, OURS) is True
    assert directory.create(SHARD, THEIRS) is False
    assert directory.read(SHARD) == OURS
    assert not (tmp_path / "run" / ".tmp").exists()


def test_a_disk_without_hard_links_is_refused_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(source: str, target: str) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", unsupported)
    with pytest.raises(InputError, match="cannot be written: its file system has no hard links; use another disk"):
        RunDirectory(str(tmp_path / "run")).prepare()
    assert not (tmp_path / "run" / ".tmp").exists()
