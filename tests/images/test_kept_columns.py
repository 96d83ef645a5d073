"""What lists say about images beside their place: columns that are kept, sizes, ETags, buckets and keys."""

from __future__ import annotations

import datetime
import decimal
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovss_ray.errors import InputError
from ovss_ray.images import ImageRef, list_images

ROWS = [
    {"caption": 'a "cat", ä\n', "id": 1, "score": 0.5, "safe": True, "url": "https://host/0.jpg"},
    {"caption": None, "id": 2**53 + 1, "score": None, "safe": False, "url": "https://host/1.jpg"},
]


def kept(refs: Any) -> list[Any]:
    return [json.loads(ref.extra) for ref in refs]


def pick(rows: list[dict[str, Any]], *names: str) -> list[dict[str, Any]]:
    return [{name: row[name] for name in names} for row in rows]


@pytest.mark.parametrize("name", ["l.jsonl", "l.parquet"])
def test_typed_lists_keep_their_types(name: str, tmp_path: Path) -> None:
    if name == "l.jsonl":
        (tmp_path / name).write_text("\n".join(map(json.dumps, ROWS)))
    else:
        pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / name)
    names = ["caption", "id", "score", "safe"]
    refs = list(list_images(tmp_path / name, keep_columns=names))
    assert [ref.uri for ref in refs] == [row["url"] for row in ROWS]
    assert kept(refs) == pick(ROWS, *names)
    assert [type(value) for value in kept(refs)[0].values()] == [str, int, float, bool]
    assert kept(list_images(tmp_path / name, keep_columns=["url"])) == pick(ROWS, "url")
    assert next(list_images(tmp_path / name)).extra is None


@pytest.mark.parametrize(("name", "mark"), [("l.csv", ","), ("l.tsv", "\t")])
def test_text_lists_keep_text(name: str, mark: str, tmp_path: Path) -> None:
    lines = [("id", "caption", "url"), ("007", '"a, ""b"""', "/a.jpg"), ("", "x y", "/b.jpg"), ("3",)]
    (tmp_path / name).write_text("\n".join(mark.join(line) for line in lines))
    refs = list(list_images(tmp_path / name, keep_columns=["caption", "id"]))
    assert [ref.uri for ref in refs] == ["/a.jpg", "/b.jpg", ""]
    assert kept(refs) == [
        {"caption": 'a, "b"', "id": "007"},
        {"caption": "x y", "id": ""},
        {"caption": None, "id": "3"},
    ]


def test_every_type_of_parquet_becomes_json(tmp_path: Path) -> None:
    moment = datetime.datetime(2024, 2, 29, 12, 30, 1, 500_000, tzinfo=datetime.timezone.utc)
    columns: dict[str, tuple[Any, Any]] = {
        "date": (datetime.date(2024, 2, 29), "2024-02-29"),
        "moment": (moment, "2024-02-29T12:30:01.500000+00:00"),
        "clock": (datetime.time(1, 2, 3), "01:02:03"),
        "wait": (datetime.timedelta(seconds=90), 90.0),
        "price": (decimal.Decimal("1.25"), 1.25),
        "count": (decimal.Decimal("3.00"), 3),
        "nothing": (math.nan, None),
        "tags": (["a", "b"], ["a", "b"]),
        "exif": ({"f": 2.8, "iso": math.inf}, {"f": 2.8, "iso": None}),
    }
    table = pa.table({"url": ["/a.jpg"], **{name: [value] for name, (value, _) in columns.items()}})
    pq.write_table(table, tmp_path / "l.parquet")
    (ref,) = list_images(tmp_path / "l.parquet", keep_columns=columns)
    assert json.loads(ref.extra or "") == {name: expected for name, (_, expected) in columns.items()}


def test_bytes_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"url": ["/a.jpg"], "thumb": [b"\xff"]}), tmp_path / "l.parquet")
    with pytest.raises(InputError, match=r"column 'thumb' of .*l\.parquet cannot be kept: JSON holds no bytes"):
        list_images(tmp_path / "l.parquet", keep_columns=["thumb"])


def test_parquet_images_keep_their_neighbours(tmp_path: Path) -> None:
    table = pa.table({"image": [b"1", b"2"], "caption": ["one", None], "size": [1, 2]})
    pq.write_table(table, tmp_path / "a.parquet")
    refs = list(list_images(tmp_path / "a.parquet", keep_columns=["caption", "size"]))
    assert kept(refs) == [{"caption": "one", "size": 1}, {"caption": None, "size": 2}]
    with pytest.raises(InputError, match=r"no column 'image' to keep"):
        list_images(tmp_path / "a.parquet", keep_columns=["image"])


@pytest.mark.parametrize("name", ["l.csv", "l.jsonl", "l.parquet", "l.txt"])
def test_a_column_that_is_not_there_is_named_with_its_nearest(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    if name == "l.parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), file)
    elif name == "l.txt":
        file.write_text("/a.jpg\n")
    else:
        file.write_text("url,caption\n/a.jpg,x\n" if name == "l.csv" else json.dumps(ROWS[0]))
    hint = "its columns are: uri" if name == "l.txt" else "did you mean 'caption'"
    with pytest.raises(InputError, match=rf"{file} has no column 'captoin' to keep; {hint}"):
        list_images(file, keep_columns=["captoin"])


def test_fields_that_come_later_in_json_lines_are_known(tmp_path: Path) -> None:
    rows = [{"url": "/a.jpg"}, {"caption": "b", "url": "/b.jpg"}]
    (tmp_path / "l.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert kept(list_images(tmp_path / "l.jsonl", keep_columns=["caption"])) == [{"caption": None}, {"caption": "b"}]


def test_images_of_their_own_have_no_columns(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"a")
    for source in (tmp_path, tmp_path / "a.jpg"):
        with pytest.raises(InputError, match=r"a\.jpg is an image of its own and has no columns to keep"):
            list_images(source, keep_columns=["caption"])


# Sizes, ETags, buckets and keys.


def test_sizes_and_etags_of_lists_are_used(tmp_path: Path) -> None:
    (tmp_path / "l.csv").write_text('url,Size,ETag\n/a.jpg,12,"""abc"""\n/b.jpg,,\n/c.jpg,640x480,x\n')
    assert list(list_images(tmp_path / "l.csv")) == [
        ImageRef("/a.jpg", 12, "abc"),
        ImageRef("/b.jpg", None, None),
        ImageRef("/c.jpg", None, "x"),
    ]
    pq.write_table(pa.table({"url": ["/a.jpg", "/b.jpg"], "size_bytes": [12, None]}), tmp_path / "l.parquet")
    assert list(list_images(tmp_path / "l.parquet")) == [ImageRef("/a.jpg", 12), ImageRef("/b.jpg")]


def test_a_list_of_buckets_and_keys_is_a_listing_of_which_images_count(tmp_path: Path) -> None:
    rows = [
        {"bucket": "b", "key": "a b/1.jpg", "size": 5, "etag": "x", "tier": "cold"},
        {"bucket": "b", "key": "a/notes.md", "size": 1, "etag": "y", "tier": "cold"},
        {"bucket": "c", "key": "2.PNG", "size": 6, "etag": None, "tier": None},
        {"bucket": "c", "key": ".trash/3.png", "size": 6, "etag": None, "tier": None},
    ]
    expected = [ImageRef("s3://b/a b/1.jpg", 5, "x"), ImageRef("s3://c/2.PNG", 6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "l.parquet")
    (tmp_path / "l.csv").write_text(
        "Bucket,Key,Size,ETag\n" + "".join(f"{r['bucket']},{r['key']},{r['size']},{r['etag'] or ''}\n" for r in rows)
    )
    for name in ("l.parquet", "l.csv"):
        assert list(list_images(tmp_path / name)) == expected
    assert kept(list_images(tmp_path / "l.parquet", keep_columns=["tier"])) == [{"tier": "cold"}, {"tier": None}]
