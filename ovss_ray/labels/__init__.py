"""What comes out of a run: label-map codecs, class statistics and shard files.

Reading a run back is in `ovss_ray.labels.reading`, which is not imported here: those who write need no DuckDB.
"""

from ovss_ray.labels.codecs import (
    CODECS,
    decode_confidence_map,
    decode_label_map,
    encode_confidence_map,
    encode_label_map,
)
from ovss_ray.labels.schema import check_schema, load_contract, load_schema
from ovss_ray.labels.shard import ImageRow, encode_shard, failed_row, read_shard_metadata, summarise
from ovss_ray.labels.statistics import ComponentStatistics, SegmentStatistics, describe, segment_statistics

__all__ = [
    "CODECS",
    "ComponentStatistics",
    "ImageRow",
    "SegmentStatistics",
    "check_schema",
    "decode_confidence_map",
    "decode_label_map",
    "describe",
    "encode_confidence_map",
    "encode_label_map",
    "encode_shard",
    "failed_row",
    "load_contract",
    "load_schema",
    "read_shard_metadata",
    "segment_statistics",
    "summarise",
]
