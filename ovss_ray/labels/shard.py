"""One shard as Parquet bytes: a row per image with its label map and statistics, provenance in the footer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import IOBase
from operator import attrgetter
from os import PathLike
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ovss_ray.errors import DamagedRunError, ImageError
from ovss_ray.labels.codecs import LabelMap, encode_confidence_map, encode_label_map
from ovss_ray.labels.regions import FloatArray
from ovss_ray.labels.schema import METADATA_PREFIX, check_schema, load_schema
from ovss_ray.labels.statistics import ComponentStatistics, SegmentStatistics, describe

# A single look-up reads one row group's label maps: 2 MiB take an object store about as long as the request itself.
# Measured on 1024 maps of 8 KB: groups of 256 cost 1 % of the file's size, and queries over the statistics take 1.3
# times as long as with one group; groups of 64 cost 4 % and take three times as long.
_GROUP_LABEL_BYTES = 2 << 20
_GROUP_ROWS_MIN = 64
MAPS = ("label_map", "confidence_map")
"""Columns that hold most of the bytes."""


@dataclass(frozen=True)
class ImageRow:
    """One row of a shard; the fields are the columns of `schemas/shard.yaml`."""

    image_id: int
    uri: str
    status: str
    error: str | None = None
    extra: str | None = None
    height: int | None = None
    width: int | None = None
    label_map: bytes | None = None
    labelled_fraction: float | None = None
    confidence_mean: float | None = None
    margin_mean: float | None = None
    segments: tuple[SegmentStatistics, ...] | None = None
    confidence_map: bytes | None = None
    components: tuple[ComponentStatistics, ...] | None = None


def summarise(
    image_id: int,
    uri: str,
    labels: LabelMap,
    confidence: FloatArray,
    margin: FloatArray,
    *,
    ignore_index: int,
    codec: str = "png",
    keep_confidence: bool = False,
    smallest_component: int | None = None,
    extra: str | None = None,
) -> ImageRow:
    """The row of an image that was labelled.

    Args:
        labels: [H, W] uint8 or uint16, class ids; `ignore_index` where a pixel has no class.
        confidence: [H, W] floating point in 0..1, probability of the winning class.
        margin: [H, W] floating point in 0..1, probability of the winning class minus that of the second.
        codec: how the label map and the confidence map are stored, "png" or "zstd".
        keep_confidence: whether the row gets a confidence map.
        smallest_component: pixels of the smallest connected component that the row describes; None for none.
        extra: what the list of images says about it, as a JSON object.

    Raises:
        ValueError: if the arrays differ in shape or `labels` is not a label map.
        SettingError: for an unknown codec.
    """
    found = describe(labels, confidence, margin, ignore_index, smallest_component=smallest_component)
    height, width = labels.shape
    return ImageRow(
        image_id=image_id,
        uri=uri,
        status="ok",
        extra=extra,
        height=height,
        width=width,
        label_map=encode_label_map(labels, codec),
        labelled_fraction=sum(segment.pixels for segment in found.segments) / labels.size,
        confidence_mean=float(confidence.mean(dtype=np.float64)),
        margin_mean=float(margin.mean(dtype=np.float64)),
        segments=found.segments,
        confidence_map=encode_confidence_map(confidence, codec) if keep_confidence else None,
        components=found.components,
    )


def failed_row(image_id: int, uri: str, error: ImageError, extra: str | None = None) -> ImageRow:
    """The row of an image that could not be labelled."""
    return ImageRow(image_id=image_id, uri=uri, status=error.status, error=error.reason, extra=extra)


def encode_shard(rows: Iterable[ImageRow], metadata: Mapping[str, str]) -> bytes:
    """The Parquet file of one shard, its rows sorted by image_id; equal input gives equal bytes.

    Label and confidence maps are stored as they are (they are compressed already), without dictionary or statistics;
    all other columns are compressed with zstd. Hugging Face `datasets` shows the PNGs after
    `cast_column("label_map", Image())`; it takes no hint from the footer for a binary column.

    Args:
        metadata: what the footer says about the shard ("fingerprint", "shard_id", ...); the keys get the prefix
            "ovss_ray:". The name and version of the schema are added.

    Raises:
        ValueError: if two rows have the same image_id.
    """
    ordered = sorted(rows, key=attrgetter("image_id"))
    image_ids = [row.image_id for row in ordered]
    if len(set(image_ids)) != len(image_ids):
        raise ValueError("two rows of a shard have the same image_id")
    schema = _schema_with(metadata)
    sink = pa.BufferOutputStream()
    step = _rows_per_group(ordered)
    with pq.ParquetWriter(sink, schema, **_parquet_options(schema)) as writer:
        for start in range(0, max(len(ordered), 1), step):  # one group at a time: a column of text ends at 2 GB
            group = ordered[start : start + step]
            columns = [_column(field, [getattr(row, field.name) for row in group]) for field in schema]
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=max(len(group), 1))
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def read_shard_metadata(file: str | PathLike[str] | BinaryIO) -> dict[str, str]:
    """What the footer of a shard file says about it, keys without prefix; reads nothing but the footer.

    Args:
        file: path of a local file, or an open binary file.

    Raises:
        OvssError: if the file is damaged, not a shard, or one of a newer major version.
    """
    where = str(getattr(file, "name", "the file")) if isinstance(file, IOBase) else str(file)
    try:
        schema = pq.read_schema(file)
    except pa.ArrowInvalid as error:
        raise DamagedRunError(
            f"{where} is not a whole Parquet file ({error}); ovss-ray verify names what to remove"
        ) from error
    check_schema(schema, "shard", where)
    prefix = METADATA_PREFIX.encode()
    return {
        key.removeprefix(prefix).decode(): value.decode()
        for key, value in schema.metadata.items()
        if key.startswith(prefix)
    }


def _schema_with(metadata: Mapping[str, str]) -> pa.Schema:
    schema = load_schema("shard")
    footer = {METADATA_PREFIX + key: value for key, value in sorted(metadata.items())}
    return schema.with_metadata({**footer, **schema.metadata})


def _column(field: pa.Field, values: Sequence[Any]) -> pa.Array:
    if not pa.types.is_list(field.type):
        return pa.array(values, field.type)
    # Column by column: several times faster than a dictionary per segment.
    flat = [item for items in values for item in items or ()]
    struct = field.type.value_type
    children = [pa.array(list(map(attrgetter(child.name), flat)), child.type) for child in struct]
    offsets = np.cumsum([0, *(len(items or ()) for items in values)], dtype=np.int32)
    is_null = pa.array([items is None for items in values], pa.bool_())
    return pa.ListArray.from_arrays(
        pa.array(offsets), pa.StructArray.from_arrays(children, fields=list(struct)), field.type, mask=is_null
    )


def _parquet_options(schema: pa.Schema) -> dict[str, Any]:
    leaves = [path for field in schema for path in _leaf_paths(field.name, field.type)]
    return {
        "compression": {path: "none" if path in MAPS else "zstd" for path in leaves},
        # `verify` finds a flipped bit anywhere by them; a zstd label map has no checksum of its own.
        "write_page_checksum": True,
        "use_dictionary": ["status", "error", "segments.list.element.class_id", "components.list.element.class_id"],
        # Engines do not prune by the statistics of list items; those of maps would copy whole maps.
        "write_statistics": [
            field.name for field in schema if field.name not in MAPS and not pa.types.is_list(field.type)
        ],
    }


def _leaf_paths(path: str, kind: pa.DataType) -> list[str]:
    """The names that Parquet gives to the columns that hold a field's values."""
    if pa.types.is_list(kind):
        return _leaf_paths(f"{path}.list.{kind.value_field.name}", kind.value_type)
    if pa.types.is_struct(kind):
        return [leaf for child in kind for leaf in _leaf_paths(f"{path}.{child.name}", child.type)]
    return [path]


def _rows_per_group(rows: Sequence[ImageRow]) -> int:
    label_bytes = sum(len(row.label_map or b"") for row in rows)
    return max(_GROUP_ROWS_MIN, len(rows) * _GROUP_LABEL_BYTES // max(label_bytes, 1))


def list_shards(fs: Any, folder: str) -> list[int]:
    """Numbers of the shards whose file is in a folder, ascending; one listing, and none if there is no folder."""
    fs.invalidate_cache(folder)
    try:
        paths = fs.ls(folder, detail=False)
    except FileNotFoundError:
        return []
    stems = (path.rsplit("/", 1)[-1].removesuffix(".parquet") for path in paths if path.endswith(".parquet"))
    return sorted(int(stem) for stem in stems if stem.isdigit())
