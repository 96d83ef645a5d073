"""Score a CLIP on held-out scenes, with the simplest ways of reading dense labels off it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ovss_ray.demo.scenes import CLASSES, draw_scene
from ovss_ray.evaluation.confusion import ConfusionMatrix
from ovss_ray.models.sources import DEMO_ARCHITECTURE
from ovss_ray.segmenters import Segmenter, load_segmenter
from ovss_ray.vocabulary import load_vocabulary

VALIDATION_SEEDS = range(1000, 1016)
"""Scenes that the training watches."""
TEST_SEEDS = range(2000, 2100)
"""Scenes of the recorded scores."""
_BATCH = 20

READOUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "maskclip_official": ("maskclip", {"variant": "official"}),
    "maskclip_reduced": ("maskclip", {"variant": "reduced"}),
    "clipbase": ("clipbase", {}),
}


@dataclass(frozen=True)
class Score:
    """mIoU over all classes, IoU by class, share of pixels labelled right; fractions in 0..1."""

    miou: float
    pixel_accuracy: float
    class_iou: dict[str, float]


def score_clip(clip: str | Path | nn.Module, seeds: Sequence[int]) -> dict[str, Score]:
    """Scores of every read-out.

    Args:
        clip: "demo", the file of other weights of the demo architecture, or a model.
        seeds: of the scenes, each 192 x 256.
    """
    chosen = f"{DEMO_ARCHITECTURE}//{clip}" if isinstance(clip, Path) else clip
    return {
        name: score_segmenter(
            load_segmenter(method, clip=chosen, device="cpu", dtype="float32", **settings),
            seeds,
        )
        for name, (method, settings) in READOUTS.items()
    }


def score_segmenter(segmenter: Segmenter, seeds: Sequence[int]) -> Score:
    """The score of one segmenter; the classes are given by their names and the usual templates.

    Args:
        seeds: of the scenes, each 192 x 256.
    """
    text = segmenter.encode_vocabulary(load_vocabulary(list(CLASSES)))
    matrix = ConfusionMatrix(len(CLASSES))
    for start in range(0, len(seeds), _BATCH):
        scenes = [draw_scene(seed) for seed in seeds[start : start + _BATCH]]
        for scene, segmentation in zip(scenes, segmenter.segment([scene.image for scene in scenes], text), strict=True):
            matrix.update(segmentation.labels, scene.labels)
    class_iou = {label: round(float(iou), 4) for label, iou in zip(CLASSES, matrix.class_iou, strict=True)}
    return Score(round(matrix.miou, 4), round(matrix.pixel_accuracy, 4), class_iou)
