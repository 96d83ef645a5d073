"""How well every method segments the synthetic scenes with the package's own tiny CLIP, as data.

    python -m ovss_ray.demo.scene_scores [METHOD ...]

This checks that a method segments; it ranks nothing. The tiny CLIP was trained so that its patches can be read as
MaskCLIP reads them, which favours methods that do much the same.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ovss_ray.demo.scoring import TEST_SEEDS, score_segmenter
from ovss_ray.models.sources import resolve_weights
from ovss_ray.segmenters import DenseSegmenter, get_method, load_segmenter, method_names

log = logging.getLogger(__name__)

RECORD = Path(__file__).with_name("scene_scores.json")


@dataclass(frozen=True)
class SceneScore:
    """mIoU on the scenes in 0..1 with sliding windows and with the whole image in one pass; None where a method has no
    such way, or cannot use the tiny CLIP.
    """

    windows: float | None
    whole: float | None


def recorded_scores() -> dict[str, SceneScore]:
    """The scores that come with the package, by method."""
    scores: dict[str, Any] = _read()["scores"]
    return {method: SceneScore(**score) for method, score in scores.items()}


def score_method(method: str, seeds: range = TEST_SEEDS) -> SceneScore:
    """Score a method with its default settings but for the windows; takes minutes for the slow ones."""
    if not issubclass(get_method(method), DenseSegmenter):
        return SceneScore(None, score_segmenter(_load(method), seeds).miou)
    native = _load(method).tower.image_size
    windows, whole = (score_segmenter(_load(method, crop=crop), seeds).miou for crop in (native, 0))
    return SceneScore(windows, whole)


def _load(method: str, **settings: int) -> Any:
    return load_segmenter(method, clip="demo", device="cpu", dtype="float32", **settings)


def _read() -> dict[str, Any]:
    return dict(json.loads(RECORD.read_text())) if RECORD.exists() else {"scores": {}}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("methods", nargs="*", default=method_names(), metavar="METHOD")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(os.cpu_count() or 1)
    record = _read()
    digest = resolve_weights("demo").digest
    if record.get("weights") != digest:
        record = {"scores": {}}
    record |= {"weights": digest, "test_seeds": [TEST_SEEDS.start, TEST_SEEDS.stop - 1]}
    for method in parser.parse_args().methods:
        record["scores"][method] = asdict(score_method(method))
        log.info("%s: %s", method, record["scores"][method])
        record["scores"] = dict(sorted(record["scores"].items()))
        RECORD.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
