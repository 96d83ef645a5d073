"""What the engine costs: a whole run against a bare loop over decoded images; same method, same micro-batches.

    python benchmarks/engine.py [--images 400] [--clip demo] [--rounds 3]

The bare loop holds all pixels in memory and throws its labels away: no Ray, no disk, no decoding, no statistics. The
run fetches, decodes, labels, summarises, encodes and writes. Start-up (loading the model, starting Ray) is left out of
both. Rounds alternate, and the median of the ratios is printed: compare ratios, not images per second.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ovss_ray.demo.scenes import CLASSES, write_scenes
from ovss_ray.run.driver import run_job
from ovss_ray.segmenters import load_segmenter
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import load_vocabulary

BATCH = 8


def bare_rate(pixels: list[np.ndarray], clip: str) -> float:
    """Images per second of the segmenter alone."""
    segmenter = load_segmenter("maskclip", clip=clip)
    text = segmenter.encode_vocabulary(load_vocabulary(list(CLASSES), templates="single"))
    segmenter.segment(pixels[:BATCH], text)
    start = time.perf_counter()
    for first in range(0, len(pixels), BATCH):
        segmenter.segment(pixels[first : first + BATCH], text)
    return len(pixels) / (time.perf_counter() - start)


def run_rate(folder: Path, run: Path, clip: str, engine: str) -> tuple[float, dict[str, float]]:
    """Images per second of a whole run, from its first image on, and its seconds by stage."""
    values = {
        "input": str(folder), "run": str(run), "classes": list(CLASSES), "templates": "single", "clip": clip,
        "engine": engine, "batch_size": BATCH, "shard_size": 32, "workers": 1,
    }  # fmt: skip
    session = run_job(JobSpec.build(values, source="benchmark")).session
    assert session is not None
    return session["images_per_s"], session["stage_seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--clip", default="demo")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    options = parser.parse_args()
    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as place:
        write_scenes(place, options.images)
        folder = Path(place) / "images"
        pixels = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
        ratios: dict[str, list[float]] = {"local": [], "ray": []}
        rates: dict[str, list[float]] = {"bare": [], "local": [], "ray": []}
        stages: dict[str, float] = {}
        for turn in range(options.rounds):
            for engine, found in ratios.items():
                bare = bare_rate(pixels, options.clip)
                rate, stages = run_rate(folder, Path(place) / f"{engine}-{turn}", options.clip, engine)
                rates["bare"].append(bare)
                rates[engine].append(rate)
                found.append(rate / bare)
                print(f"round {turn + 1}, {engine}: bare {bare:.1f}/s, run {rate:.1f}/s, ratio {rate / bare:.2f}")
    result = {
        "images": options.images,
        "clip": options.clip,
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}",
        "median_images_per_s": {name: round(statistics.median(values), 1) for name, values in rates.items()},
        "median_ratio_to_bare": {name: round(statistics.median(values), 3) for name, values in ratios.items()},
        "stage_seconds_of_last_run": stages,
    }
    print(json.dumps(result, indent=1))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
