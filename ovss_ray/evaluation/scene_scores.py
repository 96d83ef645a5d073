"""How well every method segments the demo's synthetic scenes, as recorded by `python -m ovss_ray.demo.scene_scores`."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD = Path(__file__).with_name("scene_scores.json")


@dataclass(frozen=True)
class SceneScore:
    """mIoU on the scenes in 0..1, with sliding windows and with the whole image in one pass.

    None where a method has no such way, or cannot use the tiny CLIP.
    """

    windows: float | None = None
    whole: float | None = None


def read_record() -> dict[str, Any]:
    """The record: the digest of the weights, the seeds of the scenes, and the scores by method."""
    return dict(json.loads(RECORD.read_text())) if RECORD.exists() else {"scores": {}}


def recorded_scores() -> dict[str, SceneScore]:
    """The scores by method."""
    return {method: SceneScore(**score) for method, score in read_record()["scores"].items()}
