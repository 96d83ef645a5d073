"""The encoded vocabulary of a run, kept as `text.parquet` so that it is encoded once, whatever dies or joins later."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ovss_ray.errors import RunFailedError
from ovss_ray.labels.layout import TEXT_FILE
from ovss_ray.run.directory import RunDirectory
from ovss_ray.segmenters import TextEmbeddings
from ovss_ray.vocabulary import Vocabulary


def load_text(directory: RunDirectory, vocabulary: Vocabulary) -> TextEmbeddings | None:
    """The encoded vocabulary, or None if it has not been encoded yet.

    Raises:
        RunFailedError: it is of other classes: of two drivers in a store that ignores conditional writes.
    """
    data = directory.read(TEXT_FILE)
    if data is None:
        return None
    table = pq.read_table(io.BytesIO(data))
    embeddings = np.stack(table["embedding"].to_numpy()).astype(np.float32)
    of_query = table["class_id"].is_valid().to_numpy()
    if tuple(table["query"].filter(of_query).to_pylist()) != tuple(vocabulary.queries):
        raise RunFailedError(
            f"{directory.uri}/{TEXT_FILE} was encoded for other classes than those of run.json; remove it and continue"
        )
    class_ids = table["class_id"].drop_null().to_numpy().astype(np.int64)
    extra = {}
    if "extra" in table.column_names:  # not in runs of older versions
        names = np.array(table["extra"].to_pylist())
        extra = {name: embeddings[names == name] for name in dict.fromkeys(names[~of_query].tolist())}
    return TextEmbeddings(embeddings[of_query], class_ids, vocabulary, extra)


def save_text(directory: RunDirectory, text: TextEmbeddings) -> TextEmbeddings:
    """Create `text.parquet`; if another driver was first, its file holds, and is returned.

    A row is a query of the vocabulary, with its class, or one of the method's extra embeddings, with their name.
    """
    extra = [name for name, rows in text.extra.items() for _ in rows]
    queries = text.vocabulary.queries
    rows = np.concatenate([text.embeddings, *text.extra.values()])
    flat = pa.array(rows.ravel(), pa.float32())
    table = pa.table(
        {
            "class_id": pa.array([*text.query_class.tolist(), *(None for _ in extra)], pa.int32()),
            "query": pa.array([*queries, *(None for _ in extra)], pa.string()),
            "extra": pa.array([*(None for _ in queries), *extra], pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(flat, rows.shape[1]),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    directory.create(TEXT_FILE, sink.getvalue())
    stored = load_text(directory, text.vocabulary)
    assert stored is not None
    return stored
