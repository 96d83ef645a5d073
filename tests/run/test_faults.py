"""Runs in which processes really die, hang, lose their device or node: nothing is lost, and the cause is named."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from ovss_ray import open_run
from ovss_ray.errors import RunFailedError, SettingError
from ovss_ray.labels.shard import read_shard_metadata
from ovss_ray.run import engines
from ovss_ray.run.driver import run_job
from ovss_ray.run.summary import RunSummary
from ovss_ray.spec import JobSpec
from tests.run.conftest import draw_photos
from tests.run.faulty import METHOD, draw_fault

SHARD_SIZE = 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four shards of good pictures; faults sort behind them or, named 0..., before them."""
    return draw_photos(tmp_path / "photos", 32)


@pytest.fixture
def spec_of(make_spec: Callable[..., JobSpec], folder: Path, tmp_path: Path) -> Callable[..., JobSpec]:
    def make(**fields: Any) -> JobSpec:
        settings = {"journal": str(tmp_path / "journal"), **fields.pop("settings", {})}
        values = {"engine": "ray", "workers": 1, "cpus_per_worker": 1, "batch_size": 4, "shard_size": SHARD_SIZE}
        return make_spec(**{"input": str(folder), "method": METHOD, "settings": settings, **values, **fields})

    return make


@pytest.fixture
def one_node() -> Iterator[None]:
    """A Ray of its own for each test: a worker that hangs must not reach the next one."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A cluster whose head has no room for workers; `add_node` gives it some."""
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False)
    yield made
    ray.shutdown()
    made.shutdown()


def outcome(run: str) -> dict[str, tuple[str, str | None]]:
    """Status and reason of the images that have no labels, by file name; every image is there exactly once."""
    with open_run(run) as opened:
        rows = opened.sql("SELECT uri, status, error FROM images ORDER BY image_id").fetchall()
        assert len(rows) == len({uri for uri, _, _ in rows}) == opened.num_images
    return {Path(uri).name: (status, error) for uri, status, error in rows if status != "ok"}


def pids_of(run: str) -> set[int]:
    return {int(read_shard_metadata(str(path))["pid"]) for path in Path(run, "shards").iterdir()}


@pytest.mark.usefixtures("one_node")
class TestPoison:
    def test_the_image_is_found_and_its_neighbours_are_labelled(
        self, spec_of: Callable[..., JobSpec], folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        draw_fault(folder / "a" / "0004x", "segfault")
        draw_fault(folder / "b" / "9999", "decode")
        launched = count_launches(monkeypatch)
        spec = spec_of()
        summary = run_job(spec)
        assert summary.statuses == {"ok": 32, "crashed": 2}
        bad = outcome(spec.run)
        assert {name: status for name, (status, _) in bad.items()} == {"0004x.png": "crashed", "9999.bmp": "crashed"}
        assert all("died" in (error or "") for _, error in bad.values())
        assert len(launched) <= 1 + 2 * 4  # 2 + log2(micro-batch) deaths for each
        # A shard that is labelled again does not touch it again.
        (Path(spec.run) / "shards" / "00000000.parquet").unlink()
        launched.clear()
        run_job(spec)
        assert outcome(spec.run) == bad
        assert len(launched) == 1

    @pytest.mark.parametrize("fault", ["exit", "kill"])
    def test_whatever_ends_the_process(self, fault: str, spec_of: Callable[..., JobSpec], folder: Path) -> None:
        for path in sorted(folder.rglob("*.jpg"))[4:]:
            path.unlink()
        draw_fault(folder / "a" / "0000", fault)
        spec = spec_of(batch_size=1)
        assert run_job(spec).statuses == {"ok": 4, "crashed": 1}
        (noted,) = Path(spec.run, "crashed").iterdir()
        assert json.loads(noted.read_text())["image_id"] == 0


CGROUPS = Path("/sys/fs/cgroup")


@contextmanager
def control_group(limit: int) -> Iterator[Path]:
    """A control group, of either version, whose processes may take so many bytes together."""
    version1 = (CGROUPS / "memory").is_dir()
    group = CGROUPS / ("memory/" if version1 else "") / f"ovss-ray-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError:
        pytest.skip("makes a control group, which takes root")
    try:
        (group / ("memory.limit_in_bytes" if version1 else "memory.max")).write_text(str(limit))
    except OSError:
        group.rmdir()
        pytest.skip("makes a control group, which takes root")
    yield group
    wait_for(lambda: not (group / "cgroup.procs").read_text())
    group.rmdir()


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A control group whose processes may take half a GB."""
    with control_group(2**29) as group:
        yield group


def test_an_image_that_takes_the_memory_of_the_node_is_found_among_workers_that_rays_monitor_kills(
    spec_of: Callable[..., JobSpec], folder: Path
) -> None:
    """Ray takes a control group of 6 GB for its machine, and ends workers when 2.7 GB of it are in use."""
    import psutil

    if psutil.virtual_memory().available < 6 * 2**30:
        pytest.skip("takes 6 GB of memory")
    for path in sorted(folder.rglob("*.jpg"))[7:]:
        path.unlink()
    draw_fault(folder / "a" / "0000x", "grow")
    spec = spec_of(workers=2, shard_size=4, batch_size=1)
    flags = ["--workers", "2", "--cpus-per-worker", "1", "--shard-size", "4", "--batch-size", "1"]
    job = [spec.input, spec.run, "--classes", "cat,dog", "--clip", spec.clip, "--templates", "single", *flags]
    # Ray looks at the root of all control groups, as it is in a container: that is ours in a mount namespace.
    script = 'mount --bind "$1" "$2"; echo $$ > "$2/cgroup.procs"; shift 2; exec "$@"'
    command = [sys.executable, "-m", "ovss_ray", "label", *job, "--method", METHOD]
    monitor = {"RAY_memory_usage_threshold": "0.45", "RAY_memory_monitor_refresh_ms": "50"}
    with control_group(6 * 2**30) as group:
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-euc", script, "sh", str(group), str(group.parent), *command],
            env=os.environ | monitor, stderr=subprocess.PIPE, text=True, timeout=400,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = json.loads(Path(spec.run, "summary.json").read_text())
    assert summary["statuses"] == {"ok": 7, "out_of_memory": 1}
    status, error = outcome(spec.run)["0000x.png"]
    assert status == "out_of_memory"
    assert error is not None
    assert "was killed because the memory of its node ran out" in error
    assert summary["session"]["worker_deaths"]["out_of_memory"] >= 3
    # Whom Ray ends decides whether the image is found while both work, or one alone; `test_scheduler.py` has all cases.
    limited = "killed for want of memory: 1 worker is used from now on" in done.stderr
    assert summary["session"]["workers_limited_to"] == (1 if limited else None)
    assert ("the memory is found: 2 workers are used again" in done.stderr) == limited


def test_what_the_kernel_ends_for_want_of_memory_is_told_as_such(
    spec_of: Callable[..., JobSpec], folder: Path, small_cgroup: Path
) -> None:
    for path in sorted(folder.rglob("*.jpg"))[3:]:
        path.unlink()
    draw_fault(folder / "a" / "0000x", "grow")
    spec = spec_of(batch_size=1, settings={"cgroup": str(small_cgroup)})
    summary = run_job(spec)
    assert summary.statuses == {"ok": 3, "out_of_memory": 1}
    assert "the kernel has ended a process for want of memory" in (outcome(spec.run)["0000x.png"][1] or "")


def count_launches(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    launched: list[None] = []
    real = engines.RayEngine.launch

    def launch(*arguments: Any) -> Any:
        launched.append(None)
        return real(*arguments)

    monkeypatch.setattr(engines.RayEngine, "launch", launch)
    return launched


@pytest.mark.usefixtures("one_node")
def test_an_image_that_never_ends_becomes_a_timeout_row(spec_of: Callable[..., JobSpec], folder: Path) -> None:
    for path in sorted(folder.rglob("*.jpg"))[8:]:
        path.unlink()
    draw_fault(folder / "a" / "0000x", "hang")
    spec = spec_of(batch_timeout_s=5.0)
    assert run_job(spec).statuses == {"ok": 8, "timeout": 1}
    assert outcome(spec.run) == {"0000x.png": ("timeout", "one micro-batch or image took over 5 s (hang)")}


class TestMemory:
    """Out of memory as PyTorch raises it on a GPU; the sizes that fit are the segmenter's."""

    def test_micro_batches_shrink_and_nothing_is_lost(self, spec_of: Callable[..., JobSpec], tmp_path: Path) -> None:
        spec = spec_of(engine="local", batch_size=8, settings={"fits": 3})
        assert run_job(spec).statuses == {"ok": 32}
        sizes = [int(line.split()[1]) for line in (tmp_path / "journal").read_text().splitlines()]
        assert sum(sizes) == 32 + 1  # and the made-up image of the warm-up
        assert max(sizes) == 2  # half of four

    def test_one_large_image_goes_through_in_little_memory(self, spec_of: Callable[..., JobSpec], folder: Path) -> None:
        draw_fault(folder / "a" / "0000x", "too-large")
        assert run_job(spec_of(engine="local")).statuses == {"ok": 33}

    def test_an_image_that_never_fits_becomes_a_row(self, spec_of: Callable[..., JobSpec]) -> None:
        spec = spec_of(engine="local", settings={"fits": 0}, max_failed_fraction=1.0, limit=3)
        assert run_job(spec).statuses == {"out_of_memory": 3}
        assert outcome(spec.run)["0001.jpg"] == ("out_of_memory", "90 x 120 pixels do not fit into the memory")


class TestDevices:
    @pytest.mark.usefixtures("one_node")
    def test_a_process_that_lost_its_device_is_replaced(self, spec_of: Callable[..., JobSpec], folder: Path) -> None:
        for path in sorted(folder.rglob("*.jpg"))[4:]:
            path.unlink()
        draw_fault(folder / "a" / "0000x", "device-lost")
        spec = spec_of()
        assert run_job(spec).statuses == {"ok": 4, "crashed": 1}
        assert "illegal memory access" in (outcome(spec.run)["0000x.png"][1] or "")

    def test_a_broken_gpu_is_set_aside_and_the_other_does_the_work(
        self, spec_of: Callable[..., JobSpec], cluster: Cluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        cluster.add_node(num_cpus=2, num_gpus=2)
        spec = spec_of(device="cpu", workers=2, gpus_per_worker=1, settings={"broken_gpu": "1", "seconds": 0.05})
        with caplog.at_level("INFO", logger="ovss_ray"):
            assert run_job(spec).statuses == {"ok": 32}
        assert len(pids_of(spec.run)) == 1
        assert any("/1 is set aside" in record.getMessage() for record in caplog.records)

    def test_if_every_gpu_is_broken_the_run_stops_and_says_why(
        self, spec_of: Callable[..., JobSpec], cluster: Cluster
    ) -> None:
        cluster.add_node(num_cpus=2, num_gpus=1)
        spec = spec_of(device="cpu", gpus_per_worker=1, settings={"broken_gpu": "0"})
        with pytest.raises(RunFailedError, match=r"(?s)every GPU.*illegal memory access.*0 of 4 shards"):
            run_job(spec)


class TestNodes:
    def test_a_lost_node_costs_no_attempt(self, spec_of: Callable[..., JobSpec], cluster: Cluster) -> None:
        spot = cluster.add_node(num_cpus=1)
        spec = spec_of(settings={"seconds": 0.25}, max_shard_attempts=1)
        with labelling(spec) as summary:
            wait_for(lambda: shards_of(spec.run) >= 1)
            cluster.add_node(num_cpus=1)
            cluster.remove_node(spot, allow_graceful=False)
            assert summary.result().statuses == {"ok": 32}
        assert len(pids_of(spec.run)) == 2
        attempts = {read_shard_metadata(str(path))["attempt"] for path in Path(spec.run, "shards").iterdir()}
        assert attempts == {"1"}

    def test_workers_join_as_nodes_appear(
        self, spec_of: Callable[..., JobSpec], cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ovss_ray.run.pool.SURVEY_EVERY_S", 0.5)
        cluster.add_node(num_cpus=4)
        spec = spec_of(workers="auto", shard_size=2, settings={"seconds": 2.0})
        with labelling(spec) as summary:
            wait_for(lambda: shards_of(spec.run) >= 1)
            cluster.add_node(num_cpus=4)
            assert summary.result().statuses == {"ok": 32}
        assert len(pids_of(spec.run)) == 2

    def test_workers_wait_for_a_cluster_that_grows_on_demand(
        self, spec_of: Callable[..., JobSpec], cluster: Cluster
    ) -> None:
        with pytest.raises(SettingError, match="say with workers = N how many to ask for"):
            run_job(spec_of(workers="auto", gpus_per_worker=1, device="cpu"))
        with labelling(spec_of(workers=1, gpus_per_worker=1, device="cpu")) as summary:
            cluster.add_node(num_cpus=1, num_gpus=1)
            assert summary.result().statuses == {"ok": 32}

    def test_a_node_that_is_told_to_go_is_left_in_time(
        self, spec_of: Callable[..., JobSpec], cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("ovss_ray.run.pool.SURVEY_EVERY_S", 0.2)
        spot = cluster.add_node(num_cpus=1)
        spec = spec_of(settings={"seconds": 0.5}, shard_size=2, max_shard_attempts=1)
        with labelling(spec) as summary:
            wait_for(lambda: shards_of(spec.run) >= 1)
            cluster.add_node(num_cpus=1)
            drain_node(spot.node_id, deadline_s=60)
            assert summary.result().statuses == {"ok": 32}
        assert len(pids_of(spec.run)) == 2


@pytest.mark.usefixtures("one_node")
class TestTail:
    def test_the_slowest_shard_gets_a_second_copy(
        self, spec_of: Callable[..., JobSpec], folder: Path, tmp_path: Path
    ) -> None:
        draw_fault(folder / "b" / "9999", "slow-once")
        spec = spec_of(workers=2, shard_size=3, batch_timeout_s=3600)
        assert run_job(spec).statuses == {"ok": 33}
        (slow,) = [line.split()[1] for line in (tmp_path / "journal").read_text().splitlines() if "slow" in line]
        last = read_shard_metadata(f"{spec.run}/shards/00000010.parquet")
        assert last["pid"] != slow

    def test_a_worker_that_wakes_late_changes_nothing(self, spec_of: Callable[..., JobSpec]) -> None:
        """One worker is stopped in the middle of a shard, and goes on when everything is done by others."""
        spec = spec_of(workers=2, shard_size=2, batch_size=1, batch_timeout_s=3600, settings={"seconds": 0.3})
        with labelling(spec) as summary:
            wait_for(lambda: shards_of(spec.run) >= 9)
            stopped = min(pids_of(spec.run))
            os.kill(stopped, signal.SIGSTOP)
            assert summary.result().statuses == {"ok": 32}
        before = {path.name: path.read_bytes() for path in Path(spec.run, "shards").iterdir()}
        os.kill(stopped, signal.SIGCONT)
        time.sleep(2.0)
        assert {path.name: path.read_bytes() for path in Path(spec.run, "shards").iterdir()} == before
        assert not list(Path(spec.run).glob(".tmp/*"))


class TestBreaker:
    def test_many_failures_stop_the_run_early_and_loudly(
        self, spec_of: Callable[..., JobSpec], tmp_path: Path, photos: Path
    ) -> None:
        listed = tmp_path / "list.txt"
        good = [str(path) for path in sorted(photos.rglob("*.jpg"))]
        listed.write_text("\n".join(good + [f"/nowhere/{number}.jpg" for number in range(2000)]))
        spec = spec_of(engine="local", input=str(listed), shard_size=40)
        with pytest.raises(RunFailedError, match=r"(?s)images failed, more than max_failed_fraction = 0.2.*not_found"):
            run_job(spec)
        assert 1 <= shards_of(spec.run) < 20
        more = spec.model_copy(update={"max_failed_fraction": 1.0})
        assert run_job(more).statuses == {"ok": 40, "not_found": 2000}

    def test_a_few_bad_images_do_not(self, spec_of: Callable[..., JobSpec], folder: Path) -> None:
        for number in range(15):
            (folder / f"{number}.jpg").write_bytes(b"")
        counts = Counter(run_job(spec_of(engine="local")).statuses)
        assert counts == {"ok": 32, "corrupt": 15}


def shards_of(run: str) -> int:
    folder = Path(run) / "shards"
    return len(list(folder.iterdir())) if folder.is_dir() else 0


def wait_for(condition: Callable[[], bool], timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def labelling(spec: JobSpec) -> Iterator[Future[RunSummary]]:
    """The run goes on in a thread while the main thread does something to its cluster."""
    with ThreadPoolExecutor(1) as executor:
        yield executor.submit(run_job, spec)


def drain_node(node_id: str, deadline_s: float) -> None:
    """What a spot notice does to a node in Ray."""
    from ray._raylet import GcsClient
    from ray.core.generated import autoscaler_pb2

    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    deadline_ms = int((time.time() + deadline_s) * 1000)
    accepted, why = client.drain_node(node_id, reason, "spot notice", deadline_ms)
    assert accepted, why
