"""ADE20K: the 150 classes of SceneParse, and the 847 classes of the full release."""

from __future__ import annotations

from ovss_ray.evaluation.ground_truth.ids import Values
from ovss_ray.evaluation.ground_truth.pixels import read_colours, read_indices
from ovss_ray.evaluation.ground_truth.place import AnnotationFiles, DataRoot, Layout
from ovss_ray.evaluation.ground_truth.shrinking import nearest, shrunk_size
from ovss_ray.evaluation.ground_truth.truth import Annotations
from ovss_ray.vocabularies.source_ids import load_source_ids

SHORT_SIDE = 512
"""The full release is evaluated with short sides of at most so many pixels."""

_FOLDERS = {"val": "validation", "train": "training"}


def open_ade20k(root: DataRoot, benchmark: str, split: str) -> Annotations:
    """SceneParse150: 0 is "other" and ignored."""
    folder = f"ade/ADEChallengeData2016/annotations/{_FOLDERS[split]}"
    pattern = rf"(?P<name>ADE_{split}_\d+)\.png"
    found = root.find(
        [Layout(folder, pattern, f"ADE_{split}_<8 digits>.png", bare=True)], f"ground truth of {benchmark}"
    )
    return Annotations(AnnotationFiles(root, found.files, read_indices), {0: 255} | load_source_ids(benchmark))


def open_ade847(root: DataRoot, benchmark: str, split: str) -> Annotations:
    """The full release of 2021, or 16-bit TIFFs made of it that are shrunk and mapped already.

    The split of an image is in its name, so the pickled index of the release is not needed and never opened.
    """
    full = Layout(
        f"ADE20K_2021_17_01/images/ADE/{_FOLDERS[split]}",
        rf"(?:.*/)?(?P<name>ADE_{split}_[^/]+)_seg\.png",
        f"<scene>/ADE_{split}_<8 digits>_seg.png",
        deep=True,
    )
    tiffs = Layout(
        f"ADE20K_2021_17_01/annotations_detectron2/{_FOLDERS[split]}",
        rf"(?P<name>ADE_{split}_[^/]+)\.tiff?",
        f"ADE_{split}_<8 digits>.tif",
        bare=True,
    )
    found = root.find([full, tiffs], f"ground truth of {benchmark}")
    if found.layout is full:
        source = AnnotationFiles(root, found.files, read_object_classes)
        return Annotations(source, load_source_ids(benchmark), otherwise=65535)
    ids = {class_id: class_id for class_id in range(847)} | {65535: 65535}
    return Annotations(AnnotationFiles(root, found.files, read_indices), ids)


def read_object_classes(data: bytes, where: str) -> Values:
    """The object class of each pixel of a `_seg.png`, shrunk to `SHORT_SIDE`; see `read_colours` for the errors.

    Source: the code that comes with ADE20K: class = red // 10 * 256 + green; blue tells instances apart.
    """
    colours = read_colours(data, where)
    height, width = colours.shape
    shrunk = nearest(colours, *shrunk_size(height, width, SHORT_SIDE))
    return (shrunk >> 16) // 10 * 256 + (shrunk >> 8 & 255)
