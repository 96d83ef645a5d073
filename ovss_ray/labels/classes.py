"""The classes of a run as a table, `RUN/classes.parquet`: what plain SQL needs to know their names."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq

from ovss_ray.errors import OvssError
from ovss_ray.labels.schema import check_schema, load_schema
from ovss_ray.vocabulary import Vocabulary


def classes_table(vocabulary: Vocabulary) -> pa.Table:
    """One row per class, by ascending id; the columns are those of `schemas/classes.yaml`."""
    classes = vocabulary.classes
    columns = {
        "id": [item.id for item in classes],
        "name": [item.name for item in classes],
        "queries": [list(item.queries) for item in classes],
        "color": ["#" + bytes(item.color).hex() for item in classes],
        "is_background": [item.id == vocabulary.background for item in classes],
    }
    schema = load_schema("classes")
    return pa.table([pa.array(columns[field.name], field.type) for field in schema], schema=schema)


def encode_classes(vocabulary: Vocabulary) -> bytes:
    """The table as a Parquet file; equal vocabularies give equal bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(classes_table(vocabulary), sink, compression="zstd", write_page_checksum=True)
    encoded: bytes = sink.getvalue().to_pybytes()
    return encoded


def check_classes(data: bytes, vocabulary: Vocabulary) -> str | None:
    """What is wrong with the file of a run that has these classes, in a few words; None if nothing is."""
    try:
        found = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True).read()
        check_schema(found.schema, "classes", "the file")
    except (OvssError, pa.ArrowException, OSError, ValueError) as error:
        return f"it cannot be read: {' '.join(str(error).split())[:200]}"
    expected = classes_table(vocabulary)
    if not set(expected.column_names) <= set(found.column_names):
        return "columns are missing"
    same = found.select(expected.column_names).cast(expected.schema).equals(expected)
    return None if same else "its classes are not those of run.json"
