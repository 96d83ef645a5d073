"""The run directory on a local disk and on a real S3 server."""

from __future__ import annotations

import errno
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ovss_ray.errors import InputError, RunFailedError
from ovss_ray.labels.layout import shard_name
from ovss_ray.run.directory import RunDirectory, is_final
from ovss_ray.run.driver import run_job
from ovss_ray.spec import JobSpec


@pytest.fixture(params=["local", "s3"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> RunDirectory:
    uri = str(tmp_path / "run") if request.param == "local" else f"{request.getfixturevalue('s3')}/some/run"
    made = RunDirectory(uri)
    made.prepare()
    return made


def test_a_file_is_created_at_most_once(directory: RunDirectory) -> None:
    assert directory.conditional_put
    assert directory.create("shards/00000000.parquet", b"first") is True
    assert directory.create("shards/00000000.parquet", b"second") is False
    assert directory.read("shards/00000000.parquet") == b"first"


def test_of_many_writers_at_once_exactly_one_wins(directory: RunDirectory) -> None:
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: directory.create("shards/00000007.parquet", b"%d" % n * 1000), range(8)))
    assert Counter(won) == {True: 1, False: 7}
    assert directory.read("shards/00000007.parquet") == b"%d" % won.index(True) * 1000


def test_done_shards_are_the_files_that_exist(directory: RunDirectory) -> None:
    assert directory.done_shards() == set()
    for shard in (3, 0, 12345678):
        directory.create(shard_name(shard), b"x")
    directory.create("shards/notes.txt", b"somebody's file")
    assert directory.done_shards() == {0, 3, 12345678}


def test_replace_read_and_remove(directory: RunDirectory) -> None:
    assert directory.read("summary.json") is None
    directory.replace("summary.json", b'{"a": 1}')
    directory.replace("summary.json", b'{"a": 2}')
    assert directory.read_json("summary.json") == {"a": 2}
    directory.remove("summary.json")
    directory.remove("summary.json")
    assert not directory.exists("summary.json")


def test_damaged_json_is_explained(directory: RunDirectory) -> None:
    directory.replace("run.json", b'{"a": ')
    with pytest.raises(RunFailedError, match="run.json is damaged"):
        directory.read_json("run.json")


def test_preparing_leaves_nothing_but_empty_folders(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path / "run"))
    directory.prepare()
    leftover = tmp_path / "run" / ".tmp" / "host-1-abc"
    leftover.parent.mkdir()
    leftover.write_bytes(b"what a killed process left")
    directory.prepare()
    assert sorted(path.name for path in (tmp_path / "run").rglob("*")) == ["manifest", "shards"]


def test_the_probe_leaves_no_object_behind(s3: str) -> None:
    directory = RunDirectory(f"{s3}/run")
    directory.prepare()
    assert directory.fs.find(s3) == []


def test_a_store_without_conditional_put_still_keeps_the_first_file(s3: str) -> None:
    directory = RunDirectory(f"{s3}/run", conditional_put=False)
    assert directory.create("shards/00000001.parquet", b"first")
    assert not directory.create("shards/00000001.parquet", b"second")
    assert directory.read("shards/00000001.parquet") == b"first"


def test_a_place_that_cannot_be_written_is_refused_before_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="cannot be written"):
        RunDirectory(str(tmp_path / "file" / "run")).prepare()


def test_a_bucket_that_is_not_there_is_refused_before_the_start(s3: str) -> None:
    with pytest.raises(InputError, match="no-such-bucket.* cannot be written"):
        RunDirectory("s3://no-such-bucket-anywhere/run").prepare()


def test_a_store_out_of_reach_is_explained(make_spec: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    nobody = {"s3": {"endpoint_url": "http://127.0.0.1:9"}}
    with pytest.raises(InputError, match="s3://bucket/run cannot be read: the store cannot be reached"):
        run_job(make_spec(run="s3://bucket/run", storage_options=nobody))


def _create_and_die(uri: str, name: str, size: int) -> None:
    directory = RunDirectory(uri)
    os.link = lambda *_: os._exit(9)  # type: ignore[assignment]  # the process ends between writing and linking
    directory.create(name, b"x" * size)


def test_a_writer_killed_before_the_link_leaves_no_shard(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path / "run"))
    directory.prepare()
    process = multiprocessing.get_context("spawn").Process(
        target=_create_and_die, args=(directory.uri, "shards/00000000.parquet", 10_000)
    )
    process.start()
    process.join()
    assert process.exitcode == 9
    assert len(list((tmp_path / "run" / ".tmp").iterdir())) == 1
    assert directory.done_shards() == set()
    directory.prepare()
    assert not (tmp_path / "run" / ".tmp").exists()


def test_a_temporary_swept_by_another_process_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDirectory(str(tmp_path / "run"))
    directory.prepare()
    real_link = os.link
    sweeps = iter([True])

    def link_after_sweep(source: str, target: str) -> None:
        if next(sweeps, False):
            RunDirectory(directory.uri).prepare()  # another driver starts just now
        real_link(source, target)

    monkeypatch.setattr(os, "link", link_after_sweep)
    assert directory.create("shards/00000000.parquet", b"labels")
    assert directory.read("shards/00000000.parquet") == b"labels"


def test_writers_at_once_write_everything_and_leave_no_folder_of_temporaries(tmp_path: Path) -> None:
    directory = RunDirectory(str(tmp_path / "run"))
    directory.prepare()
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda number: directory.create(f"crashed/{number}.json", b"{}"), range(400)))
    directory.replace("summary.json", b"{}")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "crashed",
        "manifest",
        "shards",
        "summary.json",
    ]
    assert len(list((tmp_path / "run" / "crashed").iterdir())) == 400


def test_which_write_errors_are_final() -> None:
    assert is_final(OSError(errno.ENOSPC, "No space left on device"))
    assert is_final(PermissionError("Forbidden"))
    assert not is_final(OSError(errno.ECONNRESET, "reset"))
    assert not is_final(TimeoutError("slow"))
