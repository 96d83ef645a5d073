"""The parts of `scale.py` that plan: manifests and listings of millions of images. Each call wants a fresh process."""

from __future__ import annotations

import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq

from ovss_ray.images.listing import list_images
from ovss_ray.images.references import ImageRef
from ovss_ray.labels.layout import Manifest
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.manifest import ManifestReader, write_manifest

SHARD_SIZE = 1024
LIST_BATCH = 1_000_000


def memory_mib(field: str = "VmRSS") -> float:
    """Resident memory of this process in MiB; with "VmHWM" its peak so far."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return round(int(found[1]) / 1024, 1)


def synthetic_images(count: int, names: str) -> Iterator[ImageRef]:
    """Images as a listing of S3 gives them: key, size and ETag.

    Args:
        names: "random" (sorted 128-bit names, as of content hashes) or "sequential".
    """
    draw = random.Random(0)
    step = (1 << 128) // max(count, 1)
    for number in range(count):
        name = f"{number:012d}" if names == "sequential" else f"{number * step + draw.getrandbits(64):032x}"
        yield ImageRef(f"s3://bucket/images/{name}.jpg", 20_000 + draw.getrandbits(19), draw.randbytes(16).hex())


def plan(images: int, names: str, folder: str) -> dict[str, Any]:
    """Write a manifest; the time that it takes to make the images up is not counted."""
    sample = images // 10
    making_s = _cpu_s(lambda: _drain(synthetic_images(sample, names))) * images / sample
    directory = RunDirectory(f"{folder}/plan-{names}")
    directory.prepare()
    before_mib, began = memory_mib(), time.perf_counter()
    manifest: list[Manifest] = []
    cpu_s = _cpu_s(lambda: manifest.append(write_manifest(synthetic_images(images, names), directory, SHARD_SIZE)))
    size = sum(Path(directory.path(part.name)).stat().st_size for part in manifest[0].parts)
    return {
        "images": images,
        "names": names,
        "images_per_cpu_s": round(images / (cpu_s - making_s)),
        "images_per_s": round(images / (time.perf_counter() - began)),
        "bytes_per_image": round(size / images, 1),
        "rss_before_mib": before_mib,
        "peak_rss_growth_mib": round(memory_mib("VmHWM") - before_mib, 1),
    }


def read_shards(manifest: Manifest, run: str, reads: int) -> dict[str, Any]:
    """Read shards of a large manifest as workers do: in order, and anywhere."""
    before_mib = memory_mib()
    reader = ManifestReader(manifest, RunDirectory(run))
    anywhere = random.Random(0).sample(range(manifest.shards), min(reads, manifest.shards))
    seconds = {}
    for order, shards in (("in_order", range(manifest.shards)), ("anywhere", anywhere)):
        seconds[order] = [_cpu_s(lambda shard=shard: reader.rows(shard)) for shard in islice(shards, reads)]
    return {
        "images": manifest.images,
        "shards": manifest.shards,
        "first_read_ms": round(1000 * seconds["in_order"][0], 2),
        "median_read_ms": {order: round(1000 * statistics.median(each), 2) for order, each in seconds.items()},
        "rss_before_mib": before_mib,
        "peak_rss_growth_mib": round(memory_mib("VmHWM") - before_mib, 1),
    }


def read_list(images: int, kind: str, folder: str) -> dict[str, Any]:
    """List the images of a list file on disk: URIs with sizes and ETags."""
    path = Path(folder) / f"images.{kind}"
    _write_list(path, images)
    return {"images": images, "source": f"{kind} list", **_listed(str(path), images)}


def list_bucket(keys: int) -> dict[str, Any]:
    """List a bucket of an S3 server on this machine, which takes most of the time: only CPU time tells something."""
    with _bucket(keys) as uri:
        return {"images": keys, "source": "S3 listing", **_listed(uri, keys)}


def _listed(source: str, images: int) -> dict[str, Any]:
    before_mib, began = memory_mib(), time.perf_counter()
    found: list[int] = []
    cpu_s = _cpu_s(lambda: found.append(_drain(list_images(source))))
    if found != [images]:
        raise AssertionError(f"{source}: {found} images listed of {images}")
    return {
        "images_per_cpu_s": round(images / cpu_s),
        "images_per_s": round(images / (time.perf_counter() - began)),
        "rss_before_mib": before_mib,
        "peak_rss_growth_mib": round(memory_mib("VmHWM") - before_mib, 1),
    }


def _write_list(path: Path, images: int) -> None:
    """In another process: writing takes memory that would be taken for that of reading."""
    if os.fork() == 0:
        refs = synthetic_images(images, "random")
        schema = pa.schema({"uri": pa.string(), "size_bytes": pa.int64(), "etag": pa.string()})
        write = pq.ParquetWriter if path.suffix == ".parquet" else pyarrow.csv.CSVWriter
        with write(str(path), schema) as writer:
            while batch := list(islice(refs, LIST_BATCH)):
                columns = [[ref.uri for ref in batch], [ref.size_bytes for ref in batch], [ref.etag for ref in batch]]
                writer.write_table(pa.table(columns, schema=schema))
        os._exit(0)
    if os.wait()[1]:
        raise RuntimeError(f"{path} could not be written")


SERVER = """
import sys
from moto.moto_server.threaded_moto_server import ThreadedMotoServer
from moto.s3.models import s3_backends
store = s3_backends["123456789012"]["aws"]
store.create_bucket("bucket", "us-east-1")
for number in range(int(sys.argv[1])):
    store.put_object("bucket", f"{number % 16:02d}/{number:012d}.jpg", b"1")
server = ThreadedMotoServer(port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""


@contextmanager
def _bucket(keys: int) -> Iterator[str]:
    """A bucket with keys in 16 folders, in a server (moto) with a process of its own."""
    command = [sys.executable, "-c", SERVER, str(keys)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        os.environ |= {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", "AWS_ACCESS_KEY_ID": "test",
                       "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1"}  # fmt: skip
        yield "s3://bucket"
        server.kill()


def _cpu_s(work: Callable[[], object]) -> float:
    """CPU seconds of this process, all threads included: others use the machine at the same time."""
    before = time.process_time()
    work()
    return time.process_time() - before


def _drain(images: Iterable[ImageRef]) -> int:
    return sum(1 for _ in images)
