"""The weights that the package ships: small, loadable like any others, and as good as their record says."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch

from ovss_ray.demo import scoring
from ovss_ray.demo.scenes import CLASSES, FIRST_TRAINING_SEED, draw_scene
from ovss_ray.demo.scoring import TEST_SEEDS, VALIDATION_SEEDS, score_clip
from ovss_ray.models.sources import DEMO_ARCHITECTURE, register_demo, resolve_weights
from ovss_ray.segmenters import load_segmenter
from ovss_ray.vocabulary import load_vocabulary

WEIGHTS = resolve_weights("demo")
SCENES = 16


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    text = (resources.files("ovss_ray") / "demo" / "clip" / "training.json").read_text()
    return dict(json.loads(text))


@pytest.fixture(scope="module")
def scores() -> dict[str, scoring.Score]:
    return score_clip("demo", TEST_SEEDS[:SCENES])


def test_all_files_together_stay_under_8_megabytes() -> None:
    assert WEIGHTS.path is not None
    assert sum(file.stat().st_size for file in Path(WEIGHTS.path).parent.iterdir()) <= 8_000_000


def test_open_clip_loads_them_like_any_others() -> None:
    register_demo()
    model = open_clip.create_model(DEMO_ARCHITECTURE, pretrained=WEIGHTS.path)
    assert model.visual.conv1.weight.shape[-1] == 8
    assert all(torch.isfinite(value).all() for value in model.state_dict().values())
    assert model.state_dict()["token_embedding.weight"].abs().sum() > 0


def test_seeds_are_disjoint() -> None:
    assert not set(TEST_SEEDS) & set(VALIDATION_SEEDS)
    assert max(*TEST_SEEDS, *VALIDATION_SEEDS) < FIRST_TRAINING_SEED


@pytest.mark.parametrize("readout", scoring.READOUTS)
def test_the_recorded_score_is_reproduced(
    readout: str, record: dict[str, Any], scores: dict[str, scoring.Score]
) -> None:
    """On a part of the scenes, so up to their spread."""
    assert scores[readout].miou == pytest.approx(record["scores"][readout]["miou"], abs=0.07)
    assert scores[readout].pixel_accuracy == pytest.approx(record["scores"][readout]["pixel_accuracy"], abs=0.07)


def test_a_score_is_the_one_of_its_label_maps(scores: dict[str, scoring.Score]) -> None:
    """Recounted with sets of pixels from the labels that MaskCLIP gives."""
    segmenter = load_segmenter("maskclip", clip="demo", device="cpu", dtype="float32")
    text = segmenter.encode_vocabulary(load_vocabulary(list(CLASSES)))
    drawn = [draw_scene(seed) for seed in TEST_SEEDS[:SCENES]]
    found = np.stack([result.labels for result in segmenter.segment([scene.image for scene in drawn], text)])
    true = np.stack([scene.labels for scene in drawn])
    ious = [((found == c) & (true == c)).sum() / ((found == c) | (true == c)).sum() for c in range(len(CLASSES))]
    assert scores["maskclip_official"].miou == pytest.approx(float(np.mean(ious)), abs=1e-3)


def test_random_weights_score_near_nothing() -> None:
    register_demo()
    torch.manual_seed(0)
    random = score_clip(open_clip.create_model(DEMO_ARCHITECTURE), range(2000, 2003))
    assert random["maskclip_official"].miou < 0.15


def test_record_tells_how_to_train_again(record: dict[str, Any]) -> None:
    assert record["command"].startswith("python -m ovss_ray.demo.training ")
    assert record["settings"]["seed"] >= 0
    assert record["steps"] > 0
    assert set(record["scores"]) == set(scoring.READOUTS)
    assert all(set(score["class_iou"]) == set(CLASSES) for score in record["scores"].values())
