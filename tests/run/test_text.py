"""The encoded vocabulary of a run: what is stored comes back, from older runs too."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.text import load_text, save_text
from ovss_ray.segmenters import TextEmbeddings
from ovss_ray.vocabulary import Vocabulary, load_vocabulary


@pytest.fixture
def directory(tmp_path: Path) -> RunDirectory:
    made = RunDirectory(str(tmp_path / "run"))
    made.prepare()
    return made


@pytest.fixture
def vocabulary() -> Vocabulary:
    return load_vocabulary({"cat": ["kitten"], "dog": []})


def embedded(vocabulary: Vocabulary, rng: np.random.Generator, **extra: int) -> TextEmbeddings:
    def rows(count: int) -> np.ndarray:
        return rng.normal(size=(count, 6)).astype(np.float32)

    classes = np.array(vocabulary.query_class, dtype=np.int64)
    return TextEmbeddings(rows(len(classes)), classes, vocabulary, {name: rows(n) for name, n in extra.items()})


@pytest.mark.parametrize("extra", [{}, {"background": 1}, {"zebra": 3, "apple": 2}])
def test_what_is_stored_comes_back(directory: RunDirectory, vocabulary: Vocabulary, rng, extra) -> None:
    text = embedded(vocabulary, rng, **extra)
    assert load_text(directory, vocabulary) is None
    for got in (save_text(directory, text), load_text(directory, vocabulary)):
        assert got is not None
        assert (got.embeddings.dtype, got.query_class.dtype) == (np.float32, np.int64)
        assert np.array_equal(got.embeddings, text.embeddings)
        assert got.query_class.tolist() == [0, 0, 1]
        assert got.vocabulary == vocabulary
        assert list(got.extra) == list(extra)
        assert all(np.array_equal(got.extra[name], text.extra[name]) for name in extra)


def test_the_first_writer_is_right(directory: RunDirectory, vocabulary: Vocabulary, rng) -> None:
    first, second = embedded(vocabulary, rng, background=2), embedded(vocabulary, rng, background=2)
    save_text(directory, first)
    got = save_text(directory, second)
    assert np.array_equal(got.embeddings, first.embeddings)
    assert np.array_equal(got.extra["background"], first.extra["background"])


def test_files_of_older_versions_stay_readable(directory: RunDirectory, vocabulary: Vocabulary, rng) -> None:
    text = embedded(vocabulary, rng)
    table = pa.table(
        {
            "class_id": pa.array(text.query_class, pa.int32()),
            "query": pa.array(vocabulary.queries, pa.string()),
            "embedding": pa.FixedSizeListArray.from_arrays(pa.array(text.embeddings.ravel(), pa.float32()), 6),
        }
    )
    sink = io.BytesIO()
    pq.write_table(table, sink)
    directory.create("text.parquet", sink.getvalue())
    got = load_text(directory, vocabulary)
    assert got is not None
    assert np.array_equal(got.embeddings, text.embeddings)
    assert got.query_class.tolist() == [0, 0, 1]
    assert not got.extra
