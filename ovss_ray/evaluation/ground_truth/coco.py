"""COCO-Stuff and COCO-Object, both from the pixel maps of COCO-Stuff 164k."""

from __future__ import annotations

from ovss_ray.evaluation.ground_truth.pixels import read_indices
from ovss_ray.evaluation.ground_truth.place import AnnotationFiles, DataRoot, Layout
from ovss_ray.evaluation.ground_truth.truth import Annotations
from ovss_ray.vocabularies.source_ids import load_source_ids

_FOLDERS = ("stuffthingmaps_trainval2017", "stuffthingmaps", "coco_stuff164k/annotations")


def open_coco(root: DataRoot, benchmark: str, split: str) -> Annotations:
    """`coco_stuff` or `coco_object`, from the maps as published or, if only those are there, from converted ones."""
    converted = "_labelTrainIds" if benchmark == "coco_stuff" else "_instanceTrainIds"
    layouts = [
        Layout(f"{folder}/{split}2017", rf"(?P<name>\d{{12}}){suffix}\.png", f"<12 digits>{suffix}.png", bare=True)
        for suffix in ("", converted)
        for folder in _FOLDERS
    ]
    found = root.find(layouts, f"ground truth of {benchmark}")
    source = AnnotationFiles(root, found.files, read_indices)
    ids = load_source_ids(benchmark)
    if found.layout.shown.endswith(f"{converted}.png"):
        ids = {class_id: class_id for class_id in range(171 if benchmark == "coco_stuff" else 81)}
    elif benchmark == "coco_object":
        return Annotations(source, ids, otherwise=0)  # whatever is no thing is background
    return Annotations(source, ids | {255: 255} if benchmark == "coco_stuff" else ids)
