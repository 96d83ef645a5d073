"""Cityscapes, the fine annotations."""

from __future__ import annotations

from ovss_ray.evaluation.ground_truth.pixels import read_indices
from ovss_ray.evaluation.ground_truth.place import AnnotationFiles, DataRoot, Layout
from ovss_ray.evaluation.ground_truth.truth import Annotations
from ovss_ray.vocabularies.source_ids import load_source_ids


def open_cityscapes(root: DataRoot, benchmark: str, split: str) -> Annotations:
    """From the label ids of the archive or, if only those are there, from train ids that toolkits draw."""
    label_ids, train_ids = (
        Layout(
            f"cityscapes/gtFine/{split}",
            rf"[^/]+/(?P<name>[^/.][^/]*)_gtFine_{kind}\.png",
            f"<city>/<name>_gtFine_{kind}.png",
            deep=True,
        )
        for kind in ("labelIds", "labelTrainIds")
    )
    found = root.find([label_ids, train_ids], f"ground truth of {benchmark}")
    source = AnnotationFiles(root, found.files, read_indices)
    if found.layout is train_ids:
        return Annotations(source, {class_id: class_id for class_id in range(19)} | {255: 255})
    return Annotations(source, load_source_ids(benchmark), otherwise=255)
