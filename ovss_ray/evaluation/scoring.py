"""One shard against the ground truth: what a task does, wherever it runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ovss_ray.evaluation.boundary import boundary_counts
from ovss_ray.evaluation.classes import ClassMatch
from ovss_ray.evaluation.confusion import Counts, confusion_counts
from ovss_ray.evaluation.ground_truth.errors import AnnotationError, MissingAnnotationError, UnknownIdsError
from ovss_ray.evaluation.ground_truth.truth import GroundTruth, MappedTruth
from ovss_ray.evaluation.table import ScoredImage, encode_table
from ovss_ray.images.parallel import flat_map_ordered
from ovss_ray.images.stores import StorageOptions
from ovss_ray.labels.reading import Run, StoredImage, open_run
from ovss_ray.run.directory import RunDirectory

_IMAGES_AT_ONCE = 4  # while one is counted on the task's core, the annotations of others arrive


@dataclass(frozen=True, eq=False)
class ShardScorer:
    """Counts the pixels of the shards of a run by true and predicted class. Can be pickled: what it opens stays behind.

    Attributes:
        run: the run directory.
        storage_options: fsspec options by protocol, of the run.
        truth: the ground truth.
        match: classes of the run -> classes of the ground truth.
        folder: of the run directory, where the tables go.
        with_boundary: count outlines too.
        conditional_put: as in `RunDirectory`.
        footer: what each table says about itself.
    """

    run: str
    storage_options: StorageOptions
    truth: GroundTruth
    match: ClassMatch
    folder: str
    with_boundary: bool
    conditional_put: bool
    footer: Mapping[str, str]

    def score(self, shard: int) -> None:
        """Score one shard that is written, and keep the table; a table that is there already stays.

        Raises:
            OvssError: the run, the ground truth or the table's place cannot be read or written.
        """
        rows = list(flat_map_ordered(lambda image: [self.score_image(image)], self._run.rows_of(shard),
                                     threads=_IMAGES_AT_ONCE))  # fmt: skip
        table = encode_table(rows, {**self.footer, "shard_id": str(shard)})
        self._directory.create(f"{self.folder}/{shard:08d}.parquet", table)

    def score_image(self, image: StoredImage) -> ScoredImage:
        """One image; whatever is wrong with it or its annotation is said in the row."""
        name = self.truth.name_of(image.uri)

        def failed(status: str, detail: str) -> ScoredImage:
            return ScoredImage(image.image_id, image.uri, name, status, " ".join(detail.split()))

        if name not in self._split:
            return failed("not_in_split", f"{self.truth.name} has no annotation called {name}")
        if image.labels is None:
            return failed("no_labels", f"the run has no label map: {image.status}, {image.error}")
        try:
            truth = self.truth.read(name)
        except AnnotationError as error:
            return failed(_status_of(error), str(error))
        labels = self.truth.aligned(image.labels, truth)
        if labels.shape != truth.shape:
            (height, width), (true_height, true_width) = labels.shape, truth.shape
            return failed("size_mismatch", f"the labels are {width} x {height} pixels, the annotation {true_width} x "
                                           f"{true_height}")  # fmt: skip
        predicted = self.match.apply(labels)
        classes, ignored = self.truth.vocabulary.num_classes, self.truth.ignore_index
        cells = _not_zero(confusion_counts(predicted, truth, classes, ignored))
        boundary = None
        if self.with_boundary:
            boundary = _rows_not_zero(boundary_counts(predicted, truth, classes, ignored))
        return ScoredImage(image.image_id, image.uri, name, cells=cells, boundary=boundary)

    @cached_property
    def _run(self) -> Run:
        return open_run(self.run, self.storage_options)

    @cached_property
    def _directory(self) -> RunDirectory:
        return RunDirectory(self.run, self.storage_options, conditional_put=self.conditional_put)

    @cached_property
    def _split(self) -> frozenset[str]:
        return split_names(self.truth)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def split_names(truth: GroundTruth) -> frozenset[str]:
    """The images of the split: those with an annotation, and those that its list has besides."""
    listed = truth.listed if isinstance(truth, MappedTruth) else frozenset()
    return listed.union(truth.names())


def _status_of(error: AnnotationError) -> str:
    if isinstance(error, MissingAnnotationError):
        return "no_annotation"
    return "unknown_ids" if isinstance(error, UnknownIdsError) else "damaged_annotation"


def _not_zero(counts: Counts) -> Counts:
    """[n, 3] the cells of a confusion matrix that are not zero: row, column, value."""
    true, predicted = np.nonzero(counts)
    return np.stack([true, predicted, counts[true, predicted]], axis=1)


def _rows_not_zero(counts: Counts) -> Counts:
    """[n, 4] the rows that are not all zero: row number, values."""
    rows = np.flatnonzero(counts.any(axis=1))
    return np.column_stack([rows, counts[rows]])
