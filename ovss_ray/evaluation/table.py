"""What is kept of an evaluation: per image the counts that all scores are made of, as a table and added up."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import sparse

from ovss_ray.errors import DamagedRunError
from ovss_ray.evaluation.confusion import ConfusionMatrix, Counts, FloatVector
from ovss_ray.evaluation.interval import ImageCounts
from ovss_ray.labels.schema import METADATA_PREFIX, check_schema, load_contract, load_schema

SCORED = "ok"
REPEATED = "repeated_name"
"""Status of an image whose name another image of the run has, which is scored; found when tables are put together."""

EXAMPLES = 3


def statuses() -> tuple[str, ...]:
    """What can be told of an image, in the order of reports."""
    known: list[str] = next(c for c in load_contract("evaluation")["columns"] if c["name"] == "status")["values"]
    return (*known, REPEATED)


@dataclass(frozen=True, eq=False)
class ScoredImage:
    """One row of the table `schemas/evaluation.yaml`.

    Attributes:
        image_id, uri: as in the run.
        name: what the ground truth calls it.
        status: "ok", or why it is not scored.
        detail: the reason in a sentence.
        cells: [n, 3] int64: true class, predicted class, pixels; None unless it is scored.
        boundary: [n, 4] int64: class, outline pixels in both, predicted, true; None if not counted.
    """

    image_id: int
    uri: str
    name: str
    status: str = SCORED
    detail: str | None = None
    cells: Counts | None = None
    boundary: Counts | None = None


def encode_table(rows: Sequence[ScoredImage], metadata: Mapping[str, str]) -> bytes:
    """The Parquet file of one shard.

    Args:
        rows: its images.
        metadata: what the footer says; the keys get the prefix "ovss_ray:".
    """
    schema = load_schema("evaluation")
    footer = {METADATA_PREFIX + key: value for key, value in sorted(metadata.items())}
    schema = schema.with_metadata({**footer, **schema.metadata})
    columns = [_column(field, [getattr(row, field.name) for row in rows]) for field in schema]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays(columns, schema=schema), sink, compression="zstd", write_page_checksum=True)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def decode_table(data: bytes, where: str) -> pa.Table:
    """Read a file back.

    Raises:
        DamagedRunError: it is cut off or damaged; the message names it by `where`.
        OvssError: it is another table, or one of a newer version.
    """
    try:
        table = pq.read_table(pa.BufferReader(data), page_checksum_verification=True)
    except (pa.ArrowException, OSError) as error:
        raise DamagedRunError(f"{where} is damaged ({error}); remove it and evaluate again") from error
    check_schema(table.schema, "evaluation", where)
    return table


def _column(field: pa.Field, values: Sequence[Any]) -> pa.Array:
    if not pa.types.is_list(field.type):
        return pa.array(values, field.type)
    struct = field.type.value_type
    width = struct.num_fields
    parts = [value for value in values if value is not None]
    flat = np.concatenate(parts) if parts else np.zeros((0, width), np.int64)
    children = [pa.array(flat[:, index], child.type) for index, child in enumerate(struct)]
    lengths = [0 if value is None else len(value) for value in values]
    offsets = pa.array(np.cumsum([0, *lengths]), pa.int32())
    is_null = pa.array([value is None for value in values], pa.bool_())
    items = pa.StructArray.from_arrays(children, fields=list(struct))
    return pa.ListArray.from_arrays(offsets, items, field.type, mask=is_null)


@dataclass(frozen=True)
class ProblemImage:
    """An image that is not scored."""

    image_id: int
    uri: str
    name: str
    status: str
    detail: str | None


@dataclass(frozen=True)
class Problem:
    """Images that are not scored for one kind of reason: their number, and the first of them."""

    status: str
    images: int
    examples: tuple[ProblemImage, ...]


@dataclass(frozen=True, eq=False)
class ImageScores:
    """The images of an evaluation, one row each: those that count of images that were labelled again.

    About a kilobyte for an image of twenty classes, its names included.

    Attributes:
        num_classes: C of the ground truth.
        image_ids: [N] int64, of the scored images.
        names: [N] what the ground truth calls them.
        uris: [N] where they were read from.
        pixels: [C, C + 1] their confusion matrices added up.
        outlines: [C, 3] their `boundary_counts` added up; None if they were not counted.
        by_image: their pixels by class.
        unscored: the images that are not scored, as a table of the fields of `ProblemImage`.
    """

    num_classes: int
    image_ids: npt.NDArray[np.int64]
    names: tuple[str, ...]
    uris: tuple[str, ...]
    pixels: Counts
    outlines: Counts | None
    by_image: ImageCounts
    unscored: pa.Table

    def confusion(self) -> ConfusionMatrix:
        """Over all scored images."""
        return ConfusionMatrix(self.num_classes, counts=self.pixels)

    def counts(self) -> ImageCounts:
        """By scored image and class, sparse [N, C]: for the bootstrap."""
        return self.by_image

    def boundary(self) -> Counts | None:
        """[C, 3] outline pixels in both, predicted, true; None if they were not counted."""
        return self.outlines

    def problems(self) -> tuple[Problem, ...]:
        """The images that are not scored by kind of reason, with the first of each."""
        column = self.unscored["status"].to_numpy(zero_copy_only=False) if len(self.unscored) else np.array([])
        found = []
        for status in statuses():
            rows = np.flatnonzero(column == status)
            if rows.size:
                examples = self.unscored.take(pa.array(rows[:EXAMPLES])).to_pylist()
                found.append(Problem(status, int(rows.size), tuple(ProblemImage(**row) for row in examples)))
        return tuple(found)

    def image_iou(self, class_id: int) -> FloatVector:
        """[N] the IoU of a class in each scored image; NaN where it is neither true nor predicted."""
        hits, union = self._overlap(class_id)
        with np.errstate(invalid="ignore"):
            return np.true_divide(hits, union)

    def worst(self, class_id: int, k: int) -> tuple[int, ...]:
        """Ids of the k images with the lowest IoU of a class, of those where it is true or predicted.

        Of equal ones (many have 0) those where the class covers more come first, as they do in `best`.
        """
        return self._ranked(class_id, k, 1)

    def best(self, class_id: int, k: int) -> tuple[int, ...]:
        """Ids of the k images with the highest IoU of a class."""
        return self._ranked(class_id, k, -1)

    def _ranked(self, class_id: int, k: int, sign: int) -> tuple[int, ...]:
        iou = self.image_iou(class_id)
        present = np.flatnonzero(~np.isnan(iou))
        _, union = self._overlap(class_id)
        order = np.lexsort((self.image_ids[present], -union[present], sign * iou[present]))
        return tuple(self.image_ids[present[order[:k]]].tolist())

    def _overlap(self, class_id: int) -> tuple[Counts, Counts]:
        """[N] pixels that are labelled right as the class, and those that are true or labelled as it."""
        hits, predicted, true = (part[:, [class_id]].toarray().ravel() for part in self._by_class)
        return hits, predicted + true - hits

    @cached_property
    def _by_class(self) -> tuple[Any, Any, Any]:
        return tuple(part.tocsc() for part in (self.by_image.hits, self.by_image.predicted, self.by_image.true))


def gather(
    tables: Iterable[tuple[int, pa.Table]], num_classes: int, superseded: Mapping[int, Set[int]] | None = None
) -> ImageScores:
    """Put tables together, one after the other.

    Of several images with one name the first counts; the others are not scored (`REPEATED`).

    Args:
        tables: with the number of their shard, in ascending order.
        num_classes: C of the ground truth.
        superseded: by shard, the images whose row there does not count.
    """
    gathering = _Gathering(num_classes)
    for shard, table in tables:
        gathering.add(table, (superseded or {}).get(shard, frozenset()))
    return gathering.result()


class _Gathering:
    def __init__(self, num_classes: int) -> None:
        self._classes = num_classes
        self._pixels = np.zeros((num_classes, num_classes + 1), np.int64)
        self._outlines = np.zeros((num_classes, 3), np.int64)
        self._has_outlines = True
        self._seen: set[str] = set()
        self._ids: list[npt.NDArray[np.int64]] = [np.zeros(0, np.int64)]
        self._names: list[str] = []
        self._uris: list[str] = []
        empty = sparse.csr_array((0, num_classes), dtype=np.int64)
        self._blocks: list[tuple[Any, Any, Any]] = [(empty, empty, empty)]
        self._unscored: list[pa.Table] = []

    def add(self, table: pa.Table, superseded: Set[int]) -> None:
        if superseded:
            counts = [image_id not in superseded for image_id in table["image_id"].to_pylist()]
            table = table.filter(pa.array(counts, pa.bool_()))
        status = self._mark_repeated(table)
        table = table.set_column(table.column_names.index("status"), "status", pa.array(status, pa.string()))
        scored = pa.array([value == SCORED for value in status], pa.bool_())
        failed = table.filter(pa.array([value != SCORED for value in status], pa.bool_()))
        self._unscored.append(failed.select(["image_id", "uri", "name", "status", "detail"]))
        self._add_scored(table.filter(scored).combine_chunks())

    def _mark_repeated(self, table: pa.Table) -> list[str]:
        marked = []
        for name, status in zip(table["name"].to_pylist(), table["status"].to_pylist(), strict=True):
            repeated = status == SCORED and name in self._seen
            marked.append(REPEATED if repeated else status)
            if status == SCORED:
                self._seen.add(name)
        return marked

    def _add_scored(self, table: pa.Table) -> None:
        if not len(table):
            return
        self._ids.append(table["image_id"].to_numpy())
        self._names += table["name"].to_pylist()
        self._uris += table["uri"].to_pylist()
        image, (true, predicted, pixels) = _flat(table["cells"])
        np.add.at(self._pixels, (true, predicted), pixels)
        right, has_class = true == predicted, predicted < self._classes
        shape = (len(table), self._classes)
        self._blocks.append(
            (
                _by_image(image[right], true[right], pixels[right], shape),
                _by_image(image[has_class], predicted[has_class], pixels[has_class], shape),
                _by_image(image, true, pixels, shape),
            )
        )
        if table["boundary"].null_count:
            self._has_outlines = False
        else:
            _, (class_id, *outlines) = _flat(table["boundary"])
            np.add.at(self._outlines, class_id, np.stack(outlines, axis=1))

    def result(self) -> ImageScores:
        by_image = (sparse.vstack(blocks, format="csr") for blocks in zip(*self._blocks, strict=True))
        schema = pa.schema([load_schema("evaluation").field(name) for name in ProblemImage.__dataclass_fields__])
        return ImageScores(
            num_classes=self._classes,
            image_ids=np.concatenate(self._ids),
            names=tuple(self._names),
            uris=tuple(self._uris),
            pixels=self._pixels,
            outlines=self._outlines if self._has_outlines else None,
            by_image=ImageCounts(*by_image),
            unscored=pa.concat_tables([table.cast(schema) for table in self._unscored])
            if self._unscored
            else schema.empty_table(),
        )


def _flat(column: pa.ChunkedArray) -> tuple[npt.NDArray[np.int64], list[Counts]]:
    """The image (row) of each item of a column of lists, and the fields of the items."""
    lists = column.combine_chunks()
    lengths = np.diff(lists.offsets.to_numpy())
    image = np.repeat(np.arange(len(lists)), lengths)
    return image, [part.to_numpy().astype(np.int64, copy=False) for part in lists.flatten().flatten()]


def _by_image(image: npt.NDArray[np.int64], class_id: Counts, pixels: Counts, shape: tuple[int, int]) -> Any:
    return sparse.coo_array((pixels, (image, class_id)), shape=shape).tocsr()  # adds up what has one place
