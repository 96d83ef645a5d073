"""The peak memory of a worker on large images, beside the bound that docs/memory.md promises.

    python benchmarks/memory.py [--jpegs 24] [--pngs 20] [--output benchmarks/memory.json]

A worker in a process of its own labels one small image first, and what it takes then is its base. Then photographs of
24 megapixels (JPEG) and images of 100 megapixels (PNG), with a segmenter that does nothing, so that it is the pipeline
that is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from PIL import Image

HERE = Path(__file__).parent
MIB = 2**20


def draw(folder: Path, kind: str, images: int, size: tuple[int, int]) -> Path:
    """A folder with so many names of one picture: it is read and decoded under each."""
    folder.mkdir(parents=True)
    tile = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    part = Image.fromarray(tile).resize((500, 500), Image.Resampling.BICUBIC)
    picture = Image.new("RGB", size)
    for top in range(0, size[1], 500):
        for left in range(0, size[0], 500):
            picture.paste(part, (left, top))
    first = folder / f"0000.{kind}"
    picture.save(first, **({"compress_level": 1} if kind == "png" else {}))
    for number in range(1, images):
        os.link(first, folder / f"{number:04d}.{kind}")
    return folder


def peak_bytes() -> int:
    """The largest resident memory of this process since `forget_peak`."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def label(folders: list[Path], place: Path, method: str, prefetch_mib: int) -> list[dict[str, float]]:
    """Label folder after folder in this process, which is then the worker; the first one is the base."""
    from ovss_ray.run.driver import run_job
    from ovss_ray.spec import JobSpec

    found = []
    for number, folder in enumerate(folders):
        values = {
            "input": str(folder), "run": str(place / f"run-{number}"), "classes": "cat,dog", "templates": "single",
            "method": method, "clip": "demo", "engine": "local", "prefetch_mib": prefetch_mib,
        }  # fmt: skip
        forget_peak()
        start = time.perf_counter()
        summary = run_job(JobSpec.build(values, source="benchmark"))
        seconds = time.perf_counter() - start
        found.append({"peak_mib": peak_bytes() / MIB, "seconds": seconds, "ok": summary.statuses.get("ok", 0)})
    return found


def measure(folders: list[Path], place: Path, method: str, prefetch_mib: int) -> list[dict[str, float]]:
    """`label` in a fresh process."""
    task = json.dumps([[str(folder) for folder in folders], str(place), method, prefetch_mib])
    done = subprocess.run(
        [sys.executable, __file__, "--task", task],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path])},
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    found: list[dict[str, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--jpegs", type=int, default=24)
    parser.add_argument("--pngs", type=int, default=20)
    parser.add_argument("--method", default="noop:NoOp")
    parser.add_argument("--prefetch-mib", type=int, default=1024)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.task:
        folders, place, method, prefetch_mib = json.loads(options.task)
        print(json.dumps(label([Path(folder) for folder in folders], Path(place), method, prefetch_mib)))
        return
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        cases = {
            "base": draw(place / "base", "jpg", 1, (100, 100)),
            f"{options.jpegs} JPEGs of 24 MP": draw(place / "jpegs", "jpg", options.jpegs, (6000, 4000)),
            f"{options.pngs} PNGs of 100 MP": draw(place / "pngs", "png", options.pngs, (10000, 10000)),
        }
        rows = dict(zip(cases, measure(list(cases.values()), place, options.method, options.prefetch_mib), strict=True))
    base = rows.pop("base")["peak_mib"]
    for (case, row), megapixels in zip(rows.items(), (24, 100), strict=True):
        row["bound_mib"] = base + options.prefetch_mib + 16 * megapixels * 1e6 / MIB
        print(f"{case}: {row['peak_mib']:.0f} MiB, bound {row['bound_mib']:.0f} MiB, {row['seconds']:.0f} s")
    result = {
        "method": options.method, "prefetch_mib": options.prefetch_mib, "base_mib": base, "cases": rows,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {version('torch')}",
    }  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
