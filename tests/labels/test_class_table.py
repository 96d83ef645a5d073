"""The table of classes: what is in it, and what is found wrong with it."""

from __future__ import annotations

from io import BytesIO

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovss_ray.labels import load_schema
from ovss_ray.labels.classes import check_classes, encode_classes
from ovss_ray.vocabulary import Vocabulary, load_vocabulary


@pytest.fixture
def vocabulary() -> Vocabulary:
    return load_vocabulary({"sky": [], "žluťoučký kůň": ["horse", "mare"]}, background="sky")


def test_each_class_is_a_row_of_the_schema(vocabulary: Vocabulary) -> None:
    table = pq.read_table(BytesIO(encode_classes(vocabulary)))
    assert table.schema.equals(load_schema("classes"), check_metadata=True)
    sky, horse = vocabulary.classes
    assert table.to_pylist() == [
        {"id": 0, "name": "sky", "queries": list(sky.queries), "color": "#000000", "is_background": True},
        {"id": 1, "name": "žluťoučký kůň", "queries": list(horse.queries), "color": "#800000", "is_background": False},
    ]


def test_sixty_five_thousand_classes_are_written(vocabulary: Vocabulary) -> None:
    many = load_vocabulary([f"class {number}" for number in range(65_535)])
    data = encode_classes(many)
    assert check_classes(data, many) is None
    assert pq.read_table(BytesIO(data), columns=["id"])["id"].to_pylist() == list(range(65_535))


def test_a_sound_file_is_found_sound_and_others_are_not(vocabulary: Vocabulary) -> None:
    data = encode_classes(vocabulary)
    assert data == encode_classes(vocabulary)
    assert check_classes(data, vocabulary) is None
    other = encode_classes(load_vocabulary({"sky": [], "žluťoučký kůň": ["horse"]}, background="sky"))
    assert check_classes(other, vocabulary) == "its classes are not those of run.json"
    assert "cannot be read" in (check_classes(data[:-3], vocabulary) or "")
    flipped = bytearray(data)
    flipped[data.index(b"\xc5\xbelu") if b"\xc5\xbelu" in data else 40] ^= 1
    assert "cannot be read" in (check_classes(bytes(flipped), vocabulary) or "")
    sink = BytesIO()
    pq.write_table(pa.table({"id": [1]}), sink)
    assert "not written by ovss-ray" in (check_classes(sink.getvalue(), vocabulary) or "")


def test_columns_of_later_versions_do_no_harm(vocabulary: Vocabulary) -> None:
    table = pq.read_table(BytesIO(encode_classes(vocabulary))).append_column("parent", pa.array([None, 0]))
    sink = BytesIO()
    pq.write_table(table, sink)
    assert check_classes(sink.getvalue(), vocabulary) is None
