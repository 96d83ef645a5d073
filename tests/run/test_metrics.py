"""The metrics of real runs, scraped from Ray's Prometheus endpoint over HTTP."""

from __future__ import annotations

import os
import re
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from ovss_ray.images.stores import open_store
from ovss_ray.labels.shard import read_shard_metadata
from ovss_ray.run.driver import run_job
from ovss_ray.spec import JobSpec
from tests.faults import FaultyEndpoint, status
from tests.run.conftest import draw_photos
from tests.run.faulty import METHOD

MakeSpec = Callable[..., JobSpec]
Samples = dict[str, dict[str, float]]


@pytest.fixture
def exporting_ray(s3: str) -> Iterator[str]:
    """A Ray that knows the keys of the bucket and sends its metrics every second; the address that serves them."""
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100 * 2**20,
        log_to_driver=False,
        _system_config={"metrics_report_interval_ms": 1000},
    )
    (node,) = ray.nodes()
    yield f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ray.shutdown()


def scrape(address: str, run: str) -> Samples:
    """The samples of a run by metric, then by the tag that tells them apart."""
    with urllib.request.urlopen(address, timeout=10) as reply:
        text = reply.read().decode()
    found: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            name, labels = sample.name.removeprefix("ray_ovss_ray_"), sample.labels
            if name != sample.name and labels["run"] == run and "le" not in labels:
                assert labels["method"] == METHOD
                tag = labels.get("status") or labels.get("stage") or labels.get("kind") or labels.get("state") or ""
                found.setdefault(name, {})[tag] = sample.value
    return found


def documented() -> set[str]:
    """The metrics that docs/monitoring.md names."""
    page = Path(__file__).parents[2] / "docs" / "monitoring.md"
    return set(re.findall(r"\bray_ovss_ray_(\w+)", page.read_text()))


def wait_for(address: str, run: str, is_there: Callable[[Samples], bool]) -> Samples:
    deadline = time.monotonic() + 60
    while True:
        try:
            samples = scrape(address, run)
        except OSError:  # the agent that serves them starts later than Ray
            samples = {}
        if is_there(samples) or time.monotonic() > deadline:
            return samples
        time.sleep(0.2)


def kill_a_worker(run: Path) -> None:
    """Kill the process that has written the first shard."""
    while not (files := list(run.glob("shards/*.parquet"))):
        time.sleep(0.02)
    os.kill(int(read_shard_metadata(str(files[0]))["pid"]), signal.SIGKILL)


def test_metrics_agree_with_the_summary_and_go_on_in_the_next_session(
    make_spec: MakeSpec, exporting_ray: str, s3: str, s3_endpoint: str, tmp_path: Path
) -> None:
    photos = draw_photos(tmp_path / "photos", 13)
    (photos / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    fs, root = open_store(s3)
    fs.put(f"{photos}/", f"{root}/photos/", recursive=True)
    run = tmp_path / "watched"
    with FaultyEndpoint(s3_endpoint) as endpoint:
        endpoint.plan.add(status(503), method="GET", path="*/00*.jpg", first=2)
        spec = make_spec(
            input=f"{s3}/photos", run=str(run), method=METHOD, settings={"seconds": 0.1}, engine="ray", workers=1,
            cpus_per_worker=1, shard_size=2, storage_options={"s3": {"endpoint_url": endpoint.url}},
        )  # fmt: skip
        killer = threading.Thread(target=kill_a_worker, args=(run,))
        killer.start()
        summary = run_job(spec)
        killer.join()
    samples = wait_for(exporting_ray, "watched", lambda found: found.get("run_shards_finished") == {"": 7})

    assert samples["images_total"] == {"ok": 13, "corrupt": 1} == summary.statuses
    assert summary.session is not None
    assert samples["stage_seconds_total"] == pytest.approx(summary.session["stage_seconds"], abs=0.001)
    assert samples["fetch_retries_total"] == summary.session["fetch_retries"]
    assert samples["fetch_retries_total"]["throttled"] >= 10
    assert samples["worker_deaths_total"] == {"crashed": 1} == summary.session["worker_deaths"]
    assert summary.session["crashed_images"] == 0
    assert samples["shard_retries_total"][""] in (1, 2)  # the shard on the device, and the one behind it
    for name, value in {"run_images": 14, "run_images_finished": 14, "run_shards": 7, "gpus_set_aside": 0}.items():
        assert samples[name] == {"": value}
    assert samples["images_per_second"][""] > 0
    assert samples["workers"] == {"starting": 0, "ready": 0}
    assert samples["shard_seconds_count"] == {"": 7}

    there = samples.keys() - {"shard_seconds_count", "shard_seconds_sum"} | {"shard_seconds_bucket"}
    assert documented() == there | {"crashed_images_total"}  # which appears with the first of them

    (run / "shards" / "00000000.parquet").unlink()
    run_job(spec.model_copy(update={"storage_options": {}}))
    again = wait_for(exporting_ray, "watched", lambda found: sum(found.get("images_total", {}).values()) == 16)
    assert sum(again["images_total"].values()) == 16
    assert again["run_shards_finished"] == {"": 7}
    assert again["shard_seconds_count"] == {"": 8}
    assert again["worker_deaths_total"] == {"crashed": 1}
