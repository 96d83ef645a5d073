"""How well the reward of `ovss-ray choose` orders candidates as their mIoU does, on the demo's synthetic scenes.

    python benchmarks/choose.py --output benchmarks/choose.json

Every candidate segments the same held-out scenes once, with the shipped tiny CLIP. Its mIoU is that against the drawn
truth; its reward is computed by the parts that the command uses, once with the classes that are really in each scene
and once with those that the same CLIP finds. Printed are rank correlations over all candidates, and over groups.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau, spearmanr

from ovss_ray.choose.assessing import Assessment, SampledImage, Verdict
from ovss_ray.choose.candidates import Candidate, parse_candidates
from ovss_ray.choose.judge import Judge
from ovss_ray.choose.ranking import rank
from ovss_ray.demo.scenes import CLASSES, Scene, draw_scene
from ovss_ray.demo.scoring import TEST_SEEDS
from ovss_ray.evaluation.confusion import ConfusionMatrix
from ovss_ray.run.manifest import ManifestRow
from ovss_ray.segmenters import load_segmenter
from ovss_ray.vocabulary import load_vocabulary

METHODS = "clipbase,maskclip,maskclip:variant=reduced,sclip,naclip,clearclip,gem,clip_surgery,sc_clip,resclip"
SETTINGS = (
    "clipbase:crop=0,maskclip:crop=0,sclip:crop=0,naclip:sigma=1,naclip:arch=vanilla,naclip:attention=nonly,"
    "maskclip:short_side=64,maskclip:pd_thresh=0.3"
)
THRESHOLDS = "maskclip:prob_thd=0.2,maskclip:prob_thd=0.4,maskclip:prob_thd=0.6,maskclip:prob_thd=0.8"
CLASS_THRESHOLDS = (0.3, 0.1, 0.05, 0.02)
JUDGED = ("given", "clip_0.05")
BATCH = 20


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--scenes", type=int, default=len(TEST_SEEDS))
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    scenes = [draw_scene(seed) for seed in TEST_SEEDS[: arguments.scenes]]
    judge = Judge.load("demo", load_vocabulary(list(CLASSES)), device="cpu", dtype="float32")
    samples = image_classes(judge, scenes)
    rows = []
    for group, text in (("methods", METHODS), ("settings", SETTINGS), ("thresholds", THRESHOLDS)):
        for candidate in parse_candidates([text]):
            judged = {name: samples[name] for name in JUDGED}
            rows.append({"candidate": candidate.name, "group": group, **score(candidate, judge, scenes, judged)})
            print(json.dumps(rows[-1]), flush=True)
    record = {
        "scenes": len(scenes),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}, torch {torch.__version__}",
        "image_classes": {name: agreement(sample, scenes) for name, sample in samples.items()},
        "correlation": {name: correlations(rows, name) for name in JUDGED},
        "candidates": rows,
    }
    print(json.dumps({name: record[name] for name in ("image_classes", "correlation")}, indent=1))
    if arguments.output:
        arguments.output.write_text(json.dumps(record, indent=1) + "\n")


def image_classes(judge: Judge, scenes: list[Scene]) -> dict[str, list[SampledImage]]:
    """The classes of every scene: those that cover any of it, and what CLIP finds with several thresholds."""
    truth = [tuple(int(k) for k in np.unique(scene.labels)) for scene in scenes]
    squares = [judge.square(scene.image) for scene in scenes]
    named = {"given": truth}
    named |= {f"clip_{threshold:g}": judge.present(squares, threshold) for threshold in CLASS_THRESHOLDS}
    return {
        name: [SampledImage(ManifestRow(number, str(number)), ids) for number, ids in enumerate(found)]
        for name, found in named.items()
    }


def score(
    candidate: Candidate, judge: Judge, scenes: list[Scene], samples: dict[str, list[SampledImage]]
) -> dict[str, Any]:
    """mIoU of a candidate, and the share of classes that is accepted, by kind of image-level classes."""
    segmenter = load_segmenter(candidate.method, clip="demo", device="cpu", dtype="float32", **candidate.settings)
    text = segmenter.encode_vocabulary(load_vocabulary(list(CLASSES)))
    matrix, seconds, labels = ConfusionMatrix(len(CLASSES)), 0.0, []
    for start in range(0, len(scenes), BATCH):
        batch = scenes[start : start + BATCH]
        started = time.perf_counter()
        found = segmenter.segment([scene.image for scene in batch], text)
        seconds += time.perf_counter() - started
        for scene, segmentation in zip(batch, found, strict=True):
            matrix.update(segmentation.labels, scene.labels)
            labels.append(segmentation.labels)
    squares = [judge.square(scene.image) for scene in scenes]
    result: dict[str, Any] = {"miou": round(matrix.miou, 4)}
    for name, sample in samples.items():
        accepted = judge.accepted(squares, labels, [image.classes for image in sample])
        verdicts = tuple(Verdict(number, "ok", None, found) for number, found in enumerate(accepted))
        standing = rank(sample, {"it": Assessment(verdicts, seconds, "cpu")}).standings[0]
        result[name] = round(standing.accepted_share, 4)
    return result


def agreement(sample: list[SampledImage], scenes: list[Scene]) -> dict[str, Any]:
    """How good image-level classes are: precision and recall against the truth; and how many images speak."""
    pairs = {(image.row.image_id, k) for image in sample for k in image.classes}
    truth = {(number, int(k)) for number, scene in enumerate(scenes) for k in np.unique(scene.labels)}
    return {
        "precision": round(len(pairs & truth) / len(pairs), 4),
        "recall": round(len(pairs & truth) / len(truth), 4),
        "images_with_two_classes": sum(len(image.classes) >= 2 for image in sample),
    }


def correlations(rows: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """Rank correlations of reward and mIoU: of methods, with their settings too, and of all candidates."""
    groups = {"methods": {"methods"}, "methods_and_settings": {"methods", "settings"}, "thresholds": {"thresholds"}}
    groups["all"] = {str(row["group"]) for row in rows}
    found = {}
    for group, members in groups.items():
        chosen = [row for row in rows if row["group"] in members]
        reward, miou = ([row[key] for row in chosen] for key in (name, "miou"))
        best, picked = max(chosen, key=lambda row: row["miou"]), max(chosen, key=lambda row: row[name])
        found[group] = {
            "candidates": len(chosen),
            "spearman": round(float(spearmanr(reward, miou).statistic), 3),
            "kendall": round(float(kendalltau(reward, miou).statistic), 3),
            "picked": picked["candidate"],
            "picked_miou": picked["miou"],
            "best": best["candidate"],
            "best_miou": best["miou"],
        }
    return found


if __name__ == "__main__":
    main()
