"""The ground truth of the benchmarks of the field, as a user has it on disk or in a bucket."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from ovss_ray.errors import SettingError, nearest
from ovss_ray.evaluation.ground_truth.ade20k import SHORT_SIDE, open_ade20k, open_ade847
from ovss_ray.evaluation.ground_truth.cityscapes import open_cityscapes
from ovss_ray.evaluation.ground_truth.coco import open_coco
from ovss_ray.evaluation.ground_truth.ids import IdTable
from ovss_ray.evaluation.ground_truth.pascal import open_context, open_context459, open_voc
from ovss_ray.evaluation.ground_truth.place import DataRoot
from ovss_ray.evaluation.ground_truth.truth import Annotations, GroundTruth, MappedTruth
from ovss_ray.images.stores import StorageOptions
from ovss_ray.vocabulary import load_vocabulary


@dataclass(frozen=True)
class _Benchmark:
    open: Callable[[DataRoot, str, str], Annotations]
    images: dict[str, int | None]
    image_suffix: str = ""
    short_side: int | None = None


_VOC = _Benchmark(open_voc, {"val": 1449, "train": 1464, "trainval": 2913})
_CONTEXT = _Benchmark(open_context, {"val": 5104, "train": None})
_COCO = _Benchmark(open_coco, {"val": 5000, "train": 118287})
_BENCHMARKS = {
    "voc21": _VOC,
    "voc20": _VOC,
    "context60": _CONTEXT,
    "context59": _CONTEXT,
    "context459": _Benchmark(open_context459, {"val": 5104, "train": None}),
    "coco_object": _COCO,
    "coco_stuff": _COCO,
    "cityscapes": _Benchmark(open_cityscapes, {"val": 500, "train": 2975}, image_suffix="_leftImg8bit"),
    "ade20k": _Benchmark(open_ade20k, {"val": 2000, "train": 20210}),
    "ade847": _Benchmark(open_ade847, {"val": 2000, "train": 25574}, short_side=SHORT_SIDE),
}

BENCHMARKS = tuple(_BENCHMARKS)
"""The names that `open_ground_truth` knows; each is a shipped vocabulary too."""


def published_images(benchmark: str, split: str) -> int | None:
    """How many images a split was published with; None where that is not known.

    Raises:
        SettingError: there is no such benchmark or split.
    """
    known = _BENCHMARKS.get(benchmark)
    if known is None:
        raise SettingError(
            f"there is no benchmark '{benchmark}', only {', '.join(BENCHMARKS)}{nearest(benchmark, BENCHMARKS)}"
        )
    if split not in known.images:
        raise SettingError(f"{benchmark} has no split '{split}', only {', '.join(known.images)}")
    return known.images[split]


def open_ground_truth(
    benchmark: str,
    root: str | os.PathLike[str],
    *,
    split: str = "val",
    storage_options: StorageOptions | None = None,
) -> GroundTruth:
    """Find the ground truth of a benchmark.

    Args:
        benchmark: one of `BENCHMARKS`.
        root: the folder of the data set, local or of an object store: the one that an archive makes, one above it, or
            one inside it; docs/evaluation.md shows the layouts.
        split: "val", or "train"; of VOC also "trainval".
        storage_options: see `open_store`.

    Raises:
        SettingError: there is no such benchmark or split.
        InputError: the store cannot be read, or the files are not there; says what was looked for and what is there.
    """
    expected = published_images(benchmark, split)
    known = _BENCHMARKS[benchmark]
    place = DataRoot.of(os.fspath(root), storage_options)
    vocabulary = load_vocabulary(benchmark)
    annotations = known.open(place, benchmark, split)
    return MappedTruth(
        name=benchmark,
        vocabulary=vocabulary,
        root=place.uri,
        expected_images=expected,
        source=annotations.source,
        table=IdTable(annotations.ids, vocabulary.label_dtype, annotations.otherwise),
        split=split,
        listed=annotations.listed,
        image_suffix=known.image_suffix,
        short_side=known.short_side,
    )
