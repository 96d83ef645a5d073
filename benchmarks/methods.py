"""What every method costs beside MaskCLIP: passes, time and memory, with sliding windows and in one pass.

    python benchmarks/methods.py [METHOD ...] [--clip ViT-B-16-quickgelu/random] [--images 2] [--rounds 3]

Images are synthetic scenes of 375 x 500 pixels, the usual size of PASCAL VOC, and the vocabulary is that of VOC20;
settings are the defaults of the method but for windows or none. Each way of running a method has a process of its own,
in which it takes turns with MaskCLIP, so that its share of MaskCLIP's images per second depends little on what else the
machine does. Random weights cost what trained ones cost, except where a method looks at its own labels: TagCLIP crops
once for each class that it takes for present.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from ovss_ray.demo.scene_scores import window_settings
from ovss_ray.demo.scenes import draw_scene
from ovss_ray.demo.training import describe_machine
from ovss_ray.segmenters import DenseSegmenter, Segmenter, get_method, load_segmenter, method_names
from ovss_ray.vocabulary import load_vocabulary

SIZE = (375, 500)
VIT, CONVNEXT = "ViT-B-16-quickgelu/random", "convnext_base_w/random"
BATCH = 2


@dataclass(frozen=True)
class Cost:
    """What one way of running a method costs.

    Attributes:
        inputs: pictures that enter the vision tower for each image: windows times views, and crops.
        calls: forward calls for each image, at the default size of a window batch and two images at a time.
        speed: images per second as a share of MaskCLIP's with sliding windows; the median of the rounds.
        images_per_s: the method's own, best of the rounds.
        peak_mib: memory that its first call took beyond what was there before.
    """

    inputs: float
    calls: float
    speed: float
    images_per_s: float
    peak_mib: float


class _TowerInputs:
    """Counts what enters the first convolution of any vision tower."""

    def __init__(self) -> None:
        self.pictures = self.calls = 0
        register_module_forward_pre_hook(self._count)

    def _count(self, module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 3:
            self.pictures += len(arguments[0])
            self.calls += 1


def measure(method: str, clip: str, count: int, rounds: int, settings: dict[str, Any]) -> Cost:
    """Measure one way of running a method in this process."""
    images = [draw_scene(seed, *SIZE).image for seed in range(count)]
    segmenter, reference = load_segmenter(method, clip=clip, **settings), load_segmenter("maskclip", clip=VIT)
    texts = [each.encode_vocabulary(load_vocabulary("voc20", templates="single")) for each in (segmenter, reference)]
    inputs = _TowerInputs()
    before = _reset_peak()
    segmenter.segment(images[:BATCH], texts[0])
    peak = _peak() - before
    pictures, calls = inputs.pictures / BATCH, inputs.calls / BATCH
    reference.segment(images[:BATCH], texts[1])
    rates = [
        [_rate(each, images, text) for each, text in zip((segmenter, reference), texts, strict=True)]
        for _ in range(rounds)
    ]
    return Cost(
        inputs=pictures,
        calls=calls,
        speed=round(statistics.median(own / other for own, other in rates), 3),
        images_per_s=round(max(own for own, _ in rates), 3),
        peak_mib=round(peak / 2**20),
    )


def _rate(segmenter: Segmenter, images: Sequence[np.ndarray], text: Any) -> float:
    start = time.perf_counter()
    for first in range(0, len(images), BATCH):
        segmenter.segment(images[first : first + BATCH], text)
    return len(images) / (time.perf_counter() - start)


def _reset_peak() -> float:
    """Start a new peak; returns the bytes in use now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> float:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024.0 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def ways(method: str) -> dict[str, dict[str, Any]]:
    """The ways of running a method, with their settings; one that is not dense has a single one."""
    if not issubclass(get_method(method), DenseSegmenter):
        return {"whole": {}}
    return {"windows": window_settings(get_method(method), 256 if method == "convclip" else 224), "whole": {"crop": 0}}


def measured_apart(options: argparse.Namespace, method: str, way: str) -> dict[str, float]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, method, "--way", way]
    for name in ("clip", "images", "rounds", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("methods", nargs="*", default=method_names(), metavar="METHOD")
    parser.add_argument("--clip", default=VIT, help="of all methods but convclip, which takes " + CONVNEXT)
    parser.add_argument("--images", type=int, default=2, help="in each round; an even number")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="1 where others use the machine too")
    parser.add_argument("--way", choices=("windows", "whole"), help="measure in this process and print JSON")
    parser.add_argument("--output", type=Path, help="JSON file for the result; what it has of other methods stays")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.way:
        (method,) = options.methods
        clip = CONVNEXT if method == "convclip" else options.clip
        print(json.dumps(asdict(measure(method, clip, options.images, options.rounds, ways(method)[options.way]))))
        return
    result = json.loads(options.output.read_text()) if options.output and options.output.exists() else {"methods": {}}
    result |= {"clip": options.clip, "size": SIZE, "images": options.images, "rounds": options.rounds}
    result |= {"threads": options.threads}
    result |= {"machine": torch.cuda.get_device_name() if torch.cuda.is_available() else describe_machine()}
    result |= {"torch": torch.__version__}
    for method in options.methods:
        result["methods"][method] = {way: measured_apart(options, method, way) for way in ways(method)}
        print(method, json.dumps(result["methods"][method]), flush=True)
        if options.output:
            result["methods"] = dict(sorted(result["methods"].items()))
            options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
