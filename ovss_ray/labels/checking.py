"""One shard file against what it should be: the checks behind `ovss-ray verify`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ovss_ray.errors import OvssError
from ovss_ray.labels.codecs import LabelMap, decode_confidence_map, decode_label_map
from ovss_ray.labels.schema import METADATA_PREFIX, check_schema, load_contract, load_schema
from ovss_ray.labels.statistics import describe
from ovss_ray.vocabulary import Vocabulary

FLOAT32_ERROR = 1e-6
_QUANTISATION = 0.5 / 255 + 1e-5

_LABEL_COLUMNS = [
    field.name for field in load_schema("shard") if field.name not in ("image_id", "uri", "status", "error", "extra")
]


@dataclass(frozen=True)
class ExpectedShard:
    """What a shard file should hold.

    Attributes:
        number: of the shard.
        fingerprint: of the run.
        num_images: number of its rows.
        images: id and URI of each row, in order; None if the manifest cannot be read.
        vocabulary: the classes of the run.
        confidence: whether its rows have confidence maps.
        smallest_component: pixels of the smallest component that its rows describe; None if they describe none.
    """

    number: int
    fingerprint: str
    num_images: int
    images: Sequence[tuple[int, str]] | None
    vocabulary: Vocabulary
    confidence: bool = False
    smallest_component: int | None = None


def check_footer(file: Any, expected: ExpectedShard) -> list[str]:
    """What is wrong with the footer of a shard, each in a few words; reads nothing else.

    Args:
        file: an open binary file.
    """
    try:
        return list(_footer_problems(pq.read_metadata(file), expected))
    except (OvssError, pa.ArrowException, OSError, ValueError) as error:
        return [_unreadable(error)]


def check_shard(data: bytes, expected: ExpectedShard) -> list[str]:
    """What is wrong with a shard, each in a few words; an empty list if nothing is.

    Looks at the footer, at the checksum of every page, at ids, URIs and statuses, and decodes every label map: its
    size, its classes, and the pixels of each class against the statistics; confidence maps against the means, and
    components against the label map, their masks included. Stops at what cannot be read. What it does not see does no
    harm: bits in page headers that no reader uses, and remarks in the footer such as the host.

    Args:
        data: the file.
        expected: what it should be.
    """
    problems: list[str] = []
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        problems += _footer_problems(file.metadata, expected)
        seen: list[tuple[int, str]] = []
        statuses: Counter[str] = Counter()
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            problems += _range_problems(table)
            problems += _index_problems(table, file.metadata.row_group(group))
            for row in table.to_pylist():
                seen.append((row["image_id"], row["uri"]))
                statuses[row["status"]] += 1
                problems += [f"image {row['image_id']}: {what}" for what in _row_problems(row, expected)]
        problems += _image_problems(seen, expected)
        stored = json.loads(_footer(file.metadata).get("statuses", "null"))
        if stored is not None and stored != statuses:
            problems.append(f"its footer counts {stored}, its rows {dict(statuses)}")
    except (OvssError, pa.ArrowException, OSError, ValueError, KeyError) as error:
        problems.append(_unreadable(error))
    return problems


def _unreadable(error: Exception) -> str:
    return f"it cannot be read: {' '.join(str(error).split())[:200]}"


def _footer(metadata: pq.FileMetaData) -> dict[str, str]:
    prefix = METADATA_PREFIX.encode()
    pairs = (metadata.metadata or {}).items()
    return {key.removeprefix(prefix).decode(): value.decode() for key, value in pairs if key.startswith(prefix)}


def _footer_problems(metadata: pq.FileMetaData, expected: ExpectedShard) -> Iterator[str]:
    check_schema(metadata.schema.to_arrow_schema(), "shard", "the file")
    footer = _footer(metadata)
    if footer.get("fingerprint") != expected.fingerprint:
        yield f"it belongs to another run (fingerprint {footer.get('fingerprint', 'missing')[:12]}...)"
    if footer.get("shard_id") != str(expected.number):
        yield f"it is shard {footer.get('shard_id', 'without number')}"
    if metadata.num_rows != expected.num_images:
        yield f"it has {metadata.num_rows} rows for {expected.num_images} images"


def _image_problems(seen: Sequence[tuple[int, str]], expected: ExpectedShard) -> Iterator[str]:
    if expected.images is None or len(seen) != len(expected.images):
        return  # the count was reported already
    for found, wanted in zip(seen, expected.images, strict=True):
        if found != wanted:
            yield f"it has image {found[0]} ({found[1]}) where the manifest has {wanted[0]} ({wanted[1]})"
            return


def _range_problems(table: pa.Table) -> Iterator[str]:
    """Values outside the limits that the contract gives to a column."""
    for column in load_contract("shard")["columns"]:
        if "minimum" in column:
            found = pc.min_max(table[column["name"]]).as_py()
            top = column.get("maximum", np.inf)
            if found["min"] is not None and not column["minimum"] <= found["min"] <= found["max"] <= top:
                yield f"{column['name']} is {found['min']} to {found['max']}, outside its contract"


def _index_problems(table: pa.Table, group: pq.RowGroupMetaData) -> Iterator[str]:
    """Smallest and largest values in the footer that are not those of the column: readers would skip its rows."""
    for index in range(group.num_columns):
        column = group.column(index)
        is_flat = column.path_in_schema in table.column_names
        if is_flat and column.is_stats_set and column.statistics.has_min_max:
            actual = pc.min_max(table[column.path_in_schema]).as_py()
            stated = {"min": column.statistics.min, "max": column.statistics.max}
            if stated != actual:
                yield f"its footer has {column.path_in_schema} from {stated['min']} to {stated['max']}, its rows not"


def _row_problems(row: Mapping[str, Any], expected: ExpectedShard) -> Iterator[str]:
    vocabulary = expected.vocabulary
    known = next(column["values"] for column in load_contract("shard")["columns"] if column["name"] == "status")
    if row["status"] not in known:
        yield f"unknown status {row['status']!r}"
        return
    missing = [name for name in _LABEL_COLUMNS if row.get(name) is None]
    if row["status"] != "ok":
        if row["error"] is None or missing != _LABEL_COLUMNS:
            yield f"{row['status']}, with labels or without a reason"
        return
    wanted = {"confidence_map": expected.confidence, "components": expected.smallest_component is not None}
    unasked = [name for name, asked in wanted.items() if not asked and name not in missing]
    if unasked:
        yield f"ok, but it has {', '.join(unasked)}, which the run has not"
        return
    missing = [name for name in missing if wanted.get(name, True)]
    if row["error"] is not None or missing:
        yield f"ok, but {', '.join(missing) or 'error'} {'is null' if missing else 'is set'}"
        return
    try:
        labels = decode_label_map(row["label_map"], row["height"], row["width"], vocabulary.label_dtype)
    except OvssError as error:
        yield str(error)
        return
    counts = np.bincount(labels.ravel(), minlength=vocabulary.ignore_index + 1)[: vocabulary.ignore_index]
    problems = list(_statistics_problems(row, counts, labels.size, vocabulary.num_classes))
    yield from problems
    if expected.confidence:
        yield from _confidence_problems(row, labels)
    if expected.smallest_component is not None and not problems:
        yield from _component_problems(row, labels, vocabulary.ignore_index, expected.smallest_component)


def _statistics_problems(
    row: Mapping[str, Any], counts: np.ndarray[Any, np.dtype[np.intp]], size: int, num_classes: int
) -> Iterator[str]:
    present = np.flatnonzero(counts)
    if len(present) and present[-1] >= num_classes:
        yield f"its label map has class {present[-1]} of {num_classes}"
    stated = [(segment["class_id"], segment["pixels"]) for segment in row["segments"]]
    if stated != [(int(class_id), int(counts[class_id])) for class_id in present]:
        yield "its segments do not count the pixels of its label map"
        return
    fractions = [(segment["area_fraction"], segment["pixels"]) for segment in row["segments"]]
    fractions.append((row["labelled_fraction"], int(counts.sum())))
    if any(not abs(fraction - pixels / size) <= FLOAT32_ERROR for fraction, pixels in fractions):
        yield "its fractions do not fit its pixels"


def _confidence_problems(row: Mapping[str, Any], labels: LabelMap) -> Iterator[str]:
    try:
        stored = decode_confidence_map(row["confidence_map"], row["height"], row["width"])
    except OvssError as error:
        yield str(error)
        return
    means = {segment["class_id"]: segment["confidence_mean"] for segment in row["segments"]}
    sums = np.bincount(labels.ravel(), stored.ravel())
    found = {segment["class_id"]: sums[segment["class_id"]] / segment["pixels"] for segment in row["segments"]}
    off = [class_id for class_id, mean in means.items() if not abs(found[class_id] / 255 - mean) <= _QUANTISATION]
    if off or not abs(stored.mean() / 255 - row["confidence_mean"]) <= _QUANTISATION:
        yield "its confidence map does not fit its mean confidences"


def _component_problems(row: Mapping[str, Any], labels: LabelMap, ignore_index: int, smallest: int) -> Iterator[str]:
    anything = np.broadcast_to(np.float32(0), labels.shape)
    found = describe(labels, anything, anything, ignore_index, smallest_component=smallest).components or ()
    exact = ("class_id", "pixels", "bbox_x", "bbox_y", "bbox_w", "bbox_h", "rle")
    stated = [tuple(component[name] for name in exact) for component in row["components"]]
    if stated != [tuple(getattr(component, name) for name in exact) for component in found]:
        yield "its components are not those of its label map"
