"""Scenes labelled by two methods with the tiny CLIP, and scored: real runs for comparisons and pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ovss_ray.demo.scenes import CLASSES, write_scenes
from ovss_ray.evaluation.evaluate import evaluate_run
from ovss_ray.evaluation.ground_truth import GroundTruth, open_folder_truth
from ovss_ray.evaluation.result import Evaluation
from ovss_ray.run.driver import run_job
from ovss_ray.spec import JobSpec

SCENES = 8
ENLARGED = "00003"
"""One scene is three times as large as the others."""

_RUNS: dict[str, dict[str, Any]] = {
    "maskclip": {"method": "maskclip"},
    "coarser": {"method": "maskclip", "settings": {"stride": 56}},
    "clipbase": {"method": "clipbase"},
}


@dataclass(frozen=True)
class ScoredDemo:
    """A folder with images/, labels/ and three runs over the images, each scored: maskclip, coarser, clipbase."""

    folder: Path
    truth: GroundTruth
    evaluations: dict[str, Evaluation]

    @property
    def labels(self) -> Path:
        return self.folder / "labels"

    def evaluate(self, run: str, labels: Path) -> Evaluation:
        """One of the runs against other label images."""
        return evaluate_run(str(self.folder / run), open_folder_truth(str(labels), list(CLASSES)), engine="local")


def make_scored_demo(folder: Path) -> ScoredDemo:
    write_scenes(folder, SCENES, 0)
    for path, resample in (
        (folder / f"images/{ENLARGED}.jpg", Image.Resampling.BICUBIC),
        (folder / f"labels/{ENLARGED}.png", Image.Resampling.NEAREST),
    ):
        image = Image.open(path)
        image.resize((3 * image.width, 3 * image.height), resample).save(path)
    for name, how in _RUNS.items():
        job = {"input": str(folder / "images"), "run": str(folder / name), "classes": list(CLASSES), "clip": "demo",
               "engine": "local", "shard_size": 3, **how}  # fmt: skip
        run_job(JobSpec.build(job, source="test"))
    truth = open_folder_truth(str(folder / "labels"), list(CLASSES))
    found = {name: evaluate_run(str(folder / name), truth, engine="local") for name in _RUNS}
    return ScoredDemo(folder, truth, found)


def read_labels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)
