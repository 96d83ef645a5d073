"""Everything at once: workers that die at random, a driver that is killed, a store that fails, poison images.

The short form is part of the suite; `make chaos` runs the long one.
"""

from __future__ import annotations

import logging
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from ovss_ray import open_run
from ovss_ray.images.stores import open_store
from tests.faults import LOST_REPLY, RESET, TRUNCATED, FaultyEndpoint, status
from tests.processes import kill_tree
from tests.run.conftest import CLIP, draw_photos
from tests.run.faulty import METHOD, draw_fault
from tests.run.test_interruption import Finished

log = logging.getLogger(__name__)

IMAGES = int(os.environ.get("OVSS_CHAOS_IMAGES", "120"))
LONG = IMAGES >= 1000
KILL_RATE = 0.01 if LONG else 0.04  # of micro-batches; the short form has few
SHARD_SIZE = 20 if LONG else 10
BATCH_SIZE = 4
WORKERS = 2
DRIVER_KILLS = 2 if LONG else 1
LOST_PER_KILL = 1.5  # shards
ROOT = Path(__file__).parents[2]


@pytest.fixture
def endpoint(s3: str, s3_endpoint: str, tmp_path: Path) -> FaultyEndpoint:
    """Where the command finds the bucket with the photographs, two of them deadly: 5 % of its requests go wrong."""
    folder = draw_photos(tmp_path / "photos", IMAGES)
    draw_fault(folder / "a" / f"{IMAGES // 3:04d}x", "segfault")
    draw_fault(folder / "b" / f"{IMAGES // 2:04d}x", "decode")
    fs, bucket = open_store(s3)
    fs.put(f"{folder}/", f"{bucket}/photos/", recursive=True)
    endpoint = FaultyEndpoint(s3_endpoint)
    for seed, fault in enumerate((RESET, status(503), status(500), TRUNCATED, LOST_REPLY)):
        endpoint.plan.add(fault, share=0.01, seed=seed)
    return endpoint


def command(bucket: str, journal: Path) -> list[str]:
    return [
        *(sys.executable, "-m", "ovss_ray", "label", f"{bucket}/photos", f"{bucket}/run"),
        *("--classes", "cat,dog,grass,sky", "--templates", "single", "--clip", CLIP, "--method", METHOD),
        *("--set", f"journal={journal}", "--set", f"kill_rate={KILL_RATE}"),
        *("--shard-size", str(SHARD_SIZE), "--batch-size", str(BATCH_SIZE), "--max-shard-attempts", "8"),
        *("--workers", str(WORKERS), "--cpus-per-worker", "1", "--fetch-timeout-s", "10"),
    ]


def start(arguments: list[str], url: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "AWS_ENDPOINT_URL": url, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    return subprocess.Popen(arguments, start_new_session=True, text=True, cwd=ROOT, env=environment, **pipes)


@pytest.mark.timeout(3600 if LONG else 900)
def test_every_image_is_there_exactly_once_and_little_work_is_lost(
    endpoint: FaultyEndpoint, s3: str, tmp_path: Path
) -> None:
    journal = tmp_path / "journal"
    shards = Finished(f"{s3}/run")
    total = -(-(IMAGES + 2) // SHARD_SIZE)
    chance = random.Random(0)
    with endpoint:
        for kill in range(DRIVER_KILLS):
            process = start(command(s3, journal), endpoint.url)
            target = total * (kill + 1) // (DRIVER_KILLS + 1)
            while process.poll() is None and shards.count() < target:
                time.sleep(0.05)
            time.sleep(chance.uniform(0, 1))
            assert process.poll() is None, process.communicate()[1]
            kill_tree(process.pid)
            process.communicate()
            shards.look()
        process = start(command(s3, journal), endpoint.url)
        _, messages = process.communicate()
    assert process.returncode == 0, messages
    assert shards.look() == total
    assert_rows(s3)
    assert_little_is_lost(journal)


def assert_rows(bucket: str) -> None:
    with open_run(f"{bucket}/run") as run:
        rows = run.sql("SELECT count(*), count(DISTINCT image_id), count(DISTINCT uri) FROM images").fetchall()
        assert rows == [(IMAGES + 2, IMAGES + 2, IMAGES + 2)]
        assert run.status_counts() == {"ok": IMAGES, "crashed": 2}
        crashed = run.sql("SELECT uri FROM images WHERE status = 'crashed' ORDER BY uri").fetchall()
        assert [Path(uri).name for (uri,) in crashed] == [f"{IMAGES // 3:04d}x.png", f"{IMAGES // 2:04d}x.bmp"]


def assert_little_is_lost(journal: Path) -> None:
    """The journal has a line for each micro-batch that went through the network, that of the warm-up first."""
    segmented: Counter[str] = Counter()
    for line in journal.read_text().splitlines():
        process, images = line.split()
        segmented[process] += int(images)
    warm_ups = len(segmented)
    kills = len(segmented) - WORKERS
    lost = segmented.total() - warm_ups - IMAGES
    log.info("%d workers died; %d images labelled in vain, %.2f shards each", kills, lost, lost / kills / SHARD_SIZE)
    assert kills >= DRIVER_KILLS
    assert lost <= LOST_PER_KILL * SHARD_SIZE * kills
