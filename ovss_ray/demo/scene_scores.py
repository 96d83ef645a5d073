"""Score every method on the synthetic scenes with the package's own tiny CLIP, and record it for the table of methods.

    python -m ovss_ray.demo.scene_scores [METHOD ...]

This checks that a method segments; it ranks nothing. The tiny CLIP was trained so that its patches can be read as
MaskCLIP reads them, which favours methods that do much the same.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from dataclasses import asdict
from typing import Any

import torch

from ovss_ray.demo.scoring import TEST_SEEDS, score_segmenter
from ovss_ray.evaluation.scene_scores import RECORD, SceneScore, read_record
from ovss_ray.models.sources import resolve_weights
from ovss_ray.segmenters import DenseSegmenter, Segmenter, get_method, load_segmenter, method_names

log = logging.getLogger(__name__)


def score_method(method: str, seeds: range = TEST_SEEDS) -> SceneScore:
    """Score a method with its default settings, with windows and without; takes minutes for the slow ones."""
    if "CLIP ViT" not in get_method(method).card.models:
        return SceneScore()
    if not issubclass(get_method(method), DenseSegmenter):
        return SceneScore(whole=score_segmenter(_load(method), seeds).miou)
    windows = window_settings(get_method(method), _load(method).tower.image_size)
    return SceneScore(*(score_segmenter(_load(method, **each), seeds).miou for each in (windows, {"crop": 0})))


def window_settings(method: type[Segmenter], image_size: int) -> dict[str, int]:
    """The settings that give a dense method windows: none if it has its own, else windows of the model's input size."""
    return {"crop": image_size} if method.Settings.model_fields["crop"].default == 0 else {}


def _load(method: str, **settings: Any) -> Any:
    return load_segmenter(method, clip="demo", device="cpu", dtype="float32", **settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("methods", nargs="*", default=method_names(), metavar="METHOD")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(os.cpu_count() or 1)
    record, digest = read_record(), resolve_weights("demo").digest
    if record.get("weights") != digest:
        record = {"scores": {}}
    record |= {"weights": digest, "test_seeds": [TEST_SEEDS.start, TEST_SEEDS.stop - 1]}
    for method in parser.parse_args().methods:
        record["scores"][method] = asdict(score_method(method))
        record["scores"] = dict(sorted(record["scores"].items()))
        log.info("%s: %s", method, record["scores"][method])
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
