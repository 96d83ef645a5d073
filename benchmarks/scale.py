"""What planning, the driver and continuing cost at scale: rates, CPU time and memory.

    python benchmarks/scale.py [--images 10000000] [--shards 100020] [--only planning,driver] [--folder KEPT]

Every measurement runs in a fresh process, so that its memory is its own. Where others use the machine at the same time
CPU seconds tell more than seconds; both are kept. With all parts at their default sizes this takes half an hour and
5 GB of disk, most of it for a manifest of 100 million images, which `--folder` keeps for the next time.

Parts: `planning` (manifests of synthetic images), `listing` (list files, and an S3 server), `driver` (what a shard
costs the driver, with workers that do next to nothing), `resume` (a run of 100 million images, all shards but 20 done).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import scale_driving
import scale_planning

from ovss_ray.labels.layout import SUMMARY_FILE, shard_name
from ovss_ray.run.apart import call_apart

PACKAGES = ("ray", "pyarrow", "duckdb", "torch", "s3fs", "numpy")
BUCKET_KEYS = 100_000
OPEN_SHARDS = 20
READS = 200
SCHEDULED = 10_000
CLUSTER_SIZES = (1, 64, 1000)


def measure_planning(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """`write_manifest` alone."""
    return {names: call_apart(scale_planning.plan, options.images, names, folder) for names in ("random", "sequential")}


def measure_listing(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """`list_images` alone."""
    found = {kind: call_apart(scale_planning.read_list, options.images, kind, folder) for kind in ("parquet", "csv")}
    return {**found, "s3": call_apart(scale_planning.list_bucket, BUCKET_KEYS)}


def measure_driver(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Shards of one tiny picture: labelled, and only linked, by Ray actors; and the scheduler without Ray."""
    shards = options.driver_shards
    labelled = call_apart(scale_driving.label_pictures, folder, "labelled", shards, 1)
    shutil.copyfile(f"{folder}/labelled/{shard_name(0)}", f"{folder}/{scale_driving.TEMPLATE}")
    linked = call_apart(scale_driving.label_pictures, folder, "linked", shards, 1, ready_made=True)
    scheduler = {workers: call_apart(scale_driving.schedule, workers, SCHEDULED) for workers in CLUSTER_SIZES}
    return {"noop_segmenter": labelled, "ready_made_shards": linked, "scheduler_cpu_us_per_shard": scheduler}


def measure_resume(options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Plan, read and continue a run of `--shards` times 1,024 images."""
    kept, run = Path(folder, "large.json"), f"{folder}/large"
    if not kept.exists():
        call_apart(scale_driving.label_pictures, folder, "template", 3, scale_planning.SHARD_SIZE)
        planned = call_apart(scale_driving.write_large_run, folder, "template", options.shards, OPEN_SHARDS)
        kept.write_text(json.dumps(planned))
    manifest = scale_driving.large_manifest(run)
    reading = call_apart(scale_planning.read_shards, manifest, run, READS)
    rounds = []
    for _ in range(options.rounds):
        for shard in range(manifest.shards - OPEN_SHARDS, manifest.shards):
            Path(run, shard_name(shard)).unlink(missing_ok=True)
        Path(run, SUMMARY_FILE).unlink(missing_ok=True)
        rounds.append(call_apart(scale_driving.continue_run, folder, time.time()))
    best = min(rounds, key=lambda found: found["first_new_shard_s"])
    return {"planning": json.loads(kept.read_text()), "reading": reading, "rounds": len(rounds), "continuing": best}


PARTS: dict[str, Callable[[argparse.Namespace, str], dict[str, Any]]] = {
    "planning": measure_planning,
    "listing": measure_listing,
    "driver": measure_driver,
    "resume": measure_resume,
}


def circumstances() -> dict[str, Any]:
    """When, on what and with what."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, {platform.system()}",
        "load_average_before": round(os.getloadavg()[0], 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000_000, help="of `planning` and of list files")
    parser.add_argument("--shards", type=int, default=100_020, help="of the large run, with 1,024 images each")
    parser.add_argument("--driver-shards", type=int, default=10_000, help="of `driver`, with one image each")
    parser.add_argument("--rounds", type=int, default=3, help="of continuing the large run; the quickest counts")
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--folder", help="keep what is written, and use the large run that is there")
    parser.add_argument("--output", type=Path, help="JSON file for the results; parts not measured now stay in it")
    options = parser.parse_args()
    place: AbstractContextManager[str]
    place = tempfile.TemporaryDirectory() if options.folder is None else nullcontext(options.folder)
    with place as folder:
        for name in options.only.split(","):
            now = circumstances()
            found = {**now, **PARTS[name](options, folder)}
            print(json.dumps({name: found}, indent=1), flush=True)
            if options.output:
                results = json.loads(options.output.read_text()) if options.output.exists() else {}
                options.output.write_text(json.dumps({**results, name: found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
