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
from ovss_ray.segmenters import load_segmenter
from ovss_ray.vocabulary import load_vocabulary

VALIDATION_SEEDS = range(1000, 1016)
"""Scenes that the training watches."""
TEST_SEEDS = range(2000, 2100)
"""Scenes of the recorded scores."""

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
    scenes = [draw_scene(seed) for seed in seeds]
    vocabulary = load_vocabulary(list(CLASSES))
    scores = {}
    for name, (method, settings) in READOUTS.items():
        chosen = f"{DEMO_ARCHITECTURE}//{clip}" if isinstance(clip, Path) else clip
        segmenter = load_segmenter(method, clip=chosen, device="cpu", dtype="float32", **settings)
        text = segmenter.encode_vocabulary(vocabulary)
        matrix = ConfusionMatrix(len(CLASSES))
        for scene, segmentation in zip(scenes, segmenter.segment([scene.image for scene in scenes], text), strict=True):
            matrix.update(segmentation.labels, scene.labels)
        class_iou = {label: round(float(iou), 4) for label, iou in zip(CLASSES, matrix.class_iou, strict=True)}
        scores[name] = Score(round(matrix.miou, 4), round(matrix.pixel_accuracy, 4), class_iou)
    return scores
