"""The encoded vocabulary of a run, kept as `text.parquet` so that it is encoded once, whatever dies or joins later."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ovss_ray.labels.layout import TEXT_FILE
from ovss_ray.run.directory import RunDirectory
from ovss_ray.segmenters import TextEmbeddings
from ovss_ray.vocabulary import Vocabulary


def load_text(directory: RunDirectory, vocabulary: Vocabulary) -> TextEmbeddings | None:
    """The encoded vocabulary, or None if it has not been encoded yet."""
    data = directory.read(TEXT_FILE)
    if data is None:
        return None
    table = pq.read_table(io.BytesIO(data))
    embeddings = np.stack(table["embedding"].to_numpy()).astype(np.float32)
    return TextEmbeddings(embeddings, table["class_id"].to_numpy().astype(np.int64), vocabulary)


def save_text(directory: RunDirectory, text: TextEmbeddings) -> TextEmbeddings:
    """Create `text.parquet`; if another driver was first, its file holds, and is returned."""
    width = text.embeddings.shape[1]
    flat = pa.array(text.embeddings.ravel(), pa.float32())
    table = pa.table(
        {
            "class_id": pa.array(text.query_class, pa.int32()),
            "query": pa.array(text.vocabulary.queries, pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, width),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    directory.create(TEXT_FILE, sink.getvalue())
    stored = load_text(directory, text.vocabulary)
    assert stored is not None
    return stored
