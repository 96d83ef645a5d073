"""The parts of `scale.py` that drive workers and continue runs. Each call wants a fresh process: it is the driver."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import wraps
from itertools import repeat
from pathlib import Path
from typing import Any

from PIL import Image
from scale_planning import SHARD_SIZE, memory_mib, synthetic_images

from ovss_ray.images.references import ImageRef
from ovss_ray.labels.layout import Manifest, shard_name
from ovss_ray.run import engines
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.events import Assign, LoadWorker, ShardDone, StartWorker, WorkerJoined, WorkerPlaced
from ovss_ray.run.manifest import write_manifest
from ovss_ray.run.pool import ShardReported, WorkerPool
from ovss_ray.run.reports import ShardReport
from ovss_ray.run.scheduler import Scheduler
from ovss_ray.run.stats import WorkerProgress
from ovss_ray.spec import JobSpec

PICTURE_PX = 8
LINKS_PER_FILE = 30_000  # file systems allow 65,000 and fewer
FIRST_SHARD = "first new shard"
TEMPLATE = "shard.parquet"  # beside the runs, of the workers that only link it


def job(folder: str, run: str, **fields: Any) -> JobSpec:
    """A job with the segmenter that does nothing, on Ray actors."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)  # where Ray's workers find it
    values = {
        "input": f"{folder}/pictures.txt", "run": f"{folder}/{run}", "classes": "a,b", "templates": "single",
        "clip": "ovss-demo/random", "method": "noop:NoOp", **fields,
    }  # fmt: skip
    return JobSpec.build(values, source="benchmark")


def label_pictures(folder: str, run: str, shards: int, shard_size: int, ready_made: bool = False) -> dict[str, Any]:
    """Label one tiny picture again and again: what a shard costs the driver between the first and the last.

    Args:
        ready_made: workers only link a file that is there, to show what the driver could do with faster ones.
    """
    from ovss_ray.run.driver import run_job

    picture = Path(folder) / "picture.png"
    Image.new("RGB", (PICTURE_PX, PICTURE_PX), "green").save(picture)
    Path(folder, "pictures.txt").write_text(f"{picture}\n" * shards * shard_size)
    if ready_made:
        engines._WorkerProcess = LinkingWorker  # type: ignore[assignment,misc]
    clock = _ShardClock()
    spec = job(folder, run, shard_size=shard_size, workers=2 if ready_made else 1, cpus_per_worker=1)
    summary = run_job(spec)
    if summary.labelled != shards * shard_size:
        raise AssertionError(f"{summary.labelled} of {shards * shard_size} pictures were labelled")
    return {"shards": shards, "workers": spec.workers, **clock.result()}


class _ShardClock:
    """Notes time, CPU time and memory of this process whenever shards are reported."""

    def __init__(self) -> None:
        self._marks: list[tuple[int, float, float]] = []
        self._rss_mib: list[float] = []
        poll = WorkerPool.poll

        @wraps(poll)
        def noting(pool: WorkerPool, timeout_s: float) -> Any:
            events = poll(pool, timeout_s)
            if count := sum(isinstance(event, ShardReported) for event in events):
                before = self._marks[-1][0] if self._marks else 0
                self._marks.append((before + count, time.perf_counter(), time.process_time()))
                self._rss_mib.append(memory_mib())
            return events

        WorkerPool.poll = noting  # type: ignore[method-assign]

    def result(self) -> dict[str, float]:
        (first, began, cpu_began), (last, ended, cpu_ended) = self._marks[0], self._marks[-1]
        return {
            "driver_cpu_ms_per_shard": round(1000 * (cpu_ended - cpu_began) / (last - first), 3),
            "shards_per_s": round((last - first) / (ended - began), 1),
            "rss_growth_mib": round(self._rss_mib[-1] - self._rss_mib[0], 1),
        }


class LinkingWorker:
    """Stands in for the actor: answers at once, and makes a shard by linking a ready one."""

    def __init__(self, job: Any, cpus: int) -> None:
        del cpus
        self._job = job
        self._template = Path(job.spec.run).parent / TEMPLATE
        self._done = 0

    def call(self, method: str, *arguments: Any) -> Any:
        if method == "label_shard":
            return self._label(arguments[0].shard)
        if method == "progress":
            return self._progress()
        if method == "encode_text":
            from noop import NoOp

            return NoOp().encode_vocabulary(self._job.vocabulary)
        return None

    def _progress(self) -> WorkerProgress:
        return WorkerProgress(images={"ok": self._done})

    def _label(self, shard: int) -> ShardReport:
        os.link(self._template, Path(self._job.spec.run) / shard_name(shard))
        self._done += 1
        return ShardReport(shard, True, {"ok": 1}, {}, 1, 0.001, self._progress())


def schedule(workers: int, shards: int) -> float:
    """CPU microseconds of the pure scheduler per shard, every worker with two shards at a time."""
    scheduler = Scheduler(iter(range(shards)), remaining=shards, workers=workers)
    decisions, began = scheduler.start(), time.process_time()
    while decisions:
        decision = decisions.pop()
        match decision:
            case StartWorker():
                decisions = scheduler.handle(WorkerPlaced(decision.worker)) + decisions
            case LoadWorker():
                decisions = scheduler.handle(WorkerJoined(decision.worker)) + decisions
            case Assign():
                decisions = scheduler.handle(ShardDone(decision.worker, decision.task.shard)) + decisions
    if scheduler.remaining:
        raise AssertionError(f"{scheduler.remaining} shards were not given out")
    return round(1e6 * (time.process_time() - began) / shards, 1)


def write_large_run(folder: str, template_run: str, shards: int, open_shards: int) -> dict[str, Any]:
    """A run of `shards` times 1,024 images with all shards done but the last; these are of one real picture.

    The shards that are done are links to one of `template_run`, and so take no time and no room.
    """
    from ovss_ray.run.job import resolve, run_record, with_dtype
    from ovss_ray.run.text import load_text, save_text

    spec = job(folder, "large", shard_size=SHARD_SIZE, workers=1, cpus_per_worker=1)
    directory, template = RunDirectory(spec.run), RunDirectory(f"{folder}/{template_run}")
    directory.prepare()
    before_mib, began, cpu_began = memory_mib(), time.perf_counter(), time.process_time()
    manifest = write_manifest(_images(folder, (shards - open_shards) * SHARD_SIZE, open_shards), directory, SHARD_SIZE)
    found = {
        "images": manifest.images,
        "seconds": round(time.perf_counter() - began),
        "cpu_seconds": round(time.process_time() - cpu_began),
        "bytes_per_image": round(
            sum(Path(directory.path(part.name)).stat().st_size for part in manifest.parts) / manifest.images, 1
        ),
        "rss_before_mib": before_mib,
        "peak_rss_growth_mib": round(memory_mib("VmHWM") - before_mib, 1),
    }
    _link_shards(Path(template.path(shard_name(0))), directory, shards - open_shards)
    resolved = with_dtype(resolve(spec), "cpu")
    text = load_text(template, resolved.vocabulary)
    assert text is not None
    save_text(directory, text)
    record = run_record(resolved, manifest, created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"))
    directory.replace("run.json", json.dumps(record, indent=1).encode())
    return found


def _images(folder: str, done: int, open_shards: int) -> Iterator[ImageRef]:
    yield from synthetic_images(done, "sequential")
    yield from repeat(ImageRef(f"{folder}/picture.png"), open_shards * SHARD_SIZE)


def _link_shards(template: Path, directory: RunDirectory, count: int) -> None:
    for shard in range(count):
        if shard % LINKS_PER_FILE == 0:
            source = Path(directory.path(shard_name(shard)))
            shutil.copyfile(template, source)
        else:
            os.link(source, directory.path(shard_name(shard)))


def large_manifest(run: str) -> Manifest:
    """The manifest of a run."""
    record = RunDirectory(run).read_json("run.json")
    assert record is not None
    return Manifest.from_json(record["manifest"])


def continue_run(folder: str, asked_at: float) -> dict[str, Any]:
    """Continue the large run; when each step was done, and the driver's memory by then.

    Args:
        asked_at: when this process was started, in seconds since 1970.
    """
    marks: list[dict[str, Any]] = []

    def mark(name: str) -> None:
        seconds, cpu = time.time() - asked_at, time.process_time()
        marks.append(
            {"step": name, "after_s": round(seconds, 2), "driver_cpu_s": round(cpu, 2), "rss_mib": memory_mib()}
        )

    from ovss_ray.run import driver

    mark("modules of the driver imported")
    for owner, name, label in (
        (driver, "resolve", "job checked (a process that imports torch)"),
        (RunDirectory, "done_shards", "shards listed"),
        (driver, "open_engine", "Ray started"),
    ):
        setattr(owner, name, _then(getattr(owner, name), mark, label))
    seen = {WorkerPlaced: "worker's process up (torch imported)", WorkerJoined: "worker ready",
            ShardReported: FIRST_SHARD}  # fmt: skip
    poll = WorkerPool.poll

    def watching(pool: WorkerPool, timeout_s: float) -> Any:
        events = poll(pool, timeout_s)
        for event in events:
            if type(event) in seen:
                mark(seen.pop(type(event)))
        return events

    WorkerPool.poll = watching  # type: ignore[method-assign]
    driver.summarise_run = _before(driver.summarise_run, mark, "last shard")
    began = memory_mib()
    summary = driver.run_job(job(folder, "large", shard_size=SHARD_SIZE, workers=1, cpus_per_worker=1))
    mark("summary written")
    return {
        "shards": summary.shards,
        "first_new_shard_s": next(done["after_s"] for done in marks if done["step"] == FIRST_SHARD),
        "steps": marks,
        "baseline_rss_mib": began,
        "peak_rss_mib": memory_mib("VmHWM"),
    }


def _then(function: Any, mark: Any, label: str) -> Any:
    @wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        mark(label)
        return result

    return marked


def _before(function: Any, mark: Any, label: str) -> Any:
    @wraps(function)
    def marked(*args: Any, **kwargs: Any) -> Any:
        mark(label)
        return function(*args, **kwargs)

    return marked
