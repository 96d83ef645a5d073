"""Lists of images, on disks, in buckets and on the web; what else the web can hold."""

from __future__ import annotations

import gzip
import json
import threading
import tracemalloc
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovss_ray.errors import ImageError, InputError
from ovss_ray.images import Fetcher, ImageRef, list_images, open_store

NAMES = ["a.jpg", "sub/b.png", "a.jpg", "s3://bucket/c.jpg", "https://host/d.jpg?size=2", "/abs/e.jpg", "../f.jpg"]


def write_list(path: Path, column: str, names: list[str]) -> Path:
    rows = [{"id": number, column: name} for number, name in enumerate(names)]
    kind = path.name.split(".", 1)[1]
    if kind == "txt":
        path.write_text("# my images\n\n" + "\n".join(names))
    elif kind in ("csv", "csv.gz", "tsv"):
        mark = "\t" if kind == "tsv" else ","
        text = f"\ufeffid{mark}{column}\r\n" + "".join(f'{row["id"]}{mark}"{row[column]}"\r\n' for row in rows)
        path.write_bytes(gzip.compress(text.encode()) if kind == "csv.gz" else text.encode())
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    else:
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    return path


LISTS = ["l.txt", "l.csv", "l.csv.gz", "l.tsv", "l.jsonl", "l.parquet"]


@pytest.mark.parametrize("name", LISTS)
def test_lists_keep_order_and_duplicates_and_resolve_relative_names(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    folder.mkdir()
    expected = [f"{folder}/a.jpg", f"{folder}/sub/b.png", f"{folder}/a.jpg", *NAMES[3:6], f"{tmp_path}/f.jpg"]
    source = write_list(folder / name, "Path", NAMES)
    assert [ref.uri for ref in list_images(source)] == expected


def test_lists_in_a_bucket_name_their_neighbours(s3: str, tmp_path: Path) -> None:
    fs, root = open_store(s3)
    expected = [f"{s3}/lists/a.jpg", f"{s3}/lists/sub/b.png", f"{s3}/lists/a.jpg", *NAMES[3:6], f"{s3}/f.jpg"]
    for name in LISTS:
        fs.put_file(str(write_list(tmp_path / name, "uri", NAMES)), f"{root}/lists/{name}")
        assert [ref.uri for ref in list_images(f"{s3}/lists/{name}")] == expected


@pytest.mark.parametrize("name", LISTS[1:])
def test_the_column_can_be_named_and_a_wrong_one_is_explained(name: str, tmp_path: Path) -> None:
    source = write_list(tmp_path / name, "photo_location", ["/a.jpg"])
    assert [ref.uri for ref in list_images(source, uri_column="photo_location")] == ["/a.jpg"]
    with pytest.raises(InputError, match=r"no column uri or url.*columns are: id, photo_location"):
        list_images(source)
    with pytest.raises(InputError, match=r"no column 'foto'.*columns are: id, photo_location"):
        list_images(source, uri_column="foto")


def test_rows_without_a_name_keep_their_position(tmp_path: Path) -> None:
    source = tmp_path / "l.csv"
    source.write_text("id,url\n0,/a.jpg\n1,\n2\n3,/b.jpg\n")
    assert [ref.uri for ref in list_images(source)] == ["/a.jpg", "", "", "/b.jpg"]
    table = tmp_path / "l.parquet"
    pq.write_table(pa.table({"url": ["/a.jpg", None, "/b.jpg"]}), table)
    assert [ref.uri for ref in list_images(table)] == ["/a.jpg", "", "/b.jpg"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("l.txt", b"\xff\xfe\x00bad", "not UTF-8"),
        ("l.txt", b"# nothing\n", "names no image"),
        ("l.csv", b"", r"no column.*columns are: none"),
        ("l.csv.gz", b"not gzip", "cannot be"),
        ("l.jsonl", b'{"uri": "a.jpg"\n', r"line 1.*not JSON"),
        ("l.jsonl", b'["a.jpg"]\n', r"line 1.*not a JSON object"),
        ("l.parquet", b"PAR1 but damaged", "cannot be read as Parquet"),
    ],
)
def test_unreadable_lists_are_explained(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        list_images(tmp_path / name)


def test_a_parquet_column_that_is_not_text_is_refused(tmp_path: Path) -> None:
    pq.write_table(pa.table({"path": [1, 2]}), tmp_path / "l.parquet")
    with pytest.raises(InputError, match=r"'path'.*int64, not text"):
        list_images(tmp_path / "l.parquet")


def test_a_long_list_is_not_held_in_memory(tmp_path: Path) -> None:
    source = tmp_path / "l.txt"
    with source.open("w") as file:
        file.writelines(f"https://example.org/photos/{number:09}.jpg\n" for number in range(100_000))
    tracemalloc.start()
    count = sum(1 for _ in list_images(source))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 100_000
    assert peak < 4 << 20  # the list itself is 4.2 MB, as objects above 15 MB


@pytest.mark.parametrize("kept", ["", "word", "words"])
@pytest.mark.parametrize(("encoding", "rows"), [("dictionary", 16384), ("prefixes", 4096)])
def test_a_small_parquet_list_that_unpacks_to_a_large_one(kept: str, encoding: str, rows: int, tmp_path: Path) -> None:
    word = "x" * (32 << 10)
    long: pa.Array = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([word]))
    if encoding == "prefixes":
        long = long.dictionary_decode()
    columns = {"": {"url": long}, "word": {"url": ["a.jpg"] * rows, "word": long}}.get(kept)
    if columns is None:
        columns = {
            "url": ["a.jpg"] * rows,
            "words": pa.ListArray.from_arrays(pa.array(range(rows + 1), pa.int32()), long),
        }
    leaf = {"": "url", "word": "word", "words": "words.list.element"}[kept]
    options: Any = {"use_dictionary": False, "column_encoding": {leaf: "DELTA_BYTE_ARRAY"}}
    pq.write_table(
        pa.table(columns),
        tmp_path / "l.parquet",
        compression="zstd",
        store_schema=False,
        **(options if encoding == "prefixes" else {}),
    )
    del long, columns
    assert (tmp_path / "l.parquet").stat().st_size < 1 << 20
    usual = pa.default_memory_pool()
    counted = pa.proxy_memory_pool(usual)
    pa.set_memory_pool(counted)
    try:
        refs = list(list_images(tmp_path / "l.parquet", keep_columns=[kept] if kept else [], limit=500))
    finally:
        pa.set_memory_pool(usual)
    assert len(refs) == 500
    assert all(word in (ref.extra or "") for ref in refs) == bool(kept)
    assert 0 < counted.max_memory() < rows * len(word) / 2


def test_a_row_of_a_parquet_list_that_takes_too_much(tmp_path: Path) -> None:
    for name, words in (("many", ["x"] * (5 << 20)), ("long", ["x" * (17 << 20)])):
        table = pa.table({"url": ["a.jpg", "b.jpg"], "words": [["x"], words]})
        pq.write_table(table, tmp_path / f"{name}.parquet", compression="zstd")
        with pytest.raises(InputError, match=f"a row of .*{name}.parquet takes more than 16777216 bytes"):
            list(list_images(tmp_path / f"{name}.parquet", keep_columns=["words"]))
    pq.write_table(pa.table({"url": ["a.jpg"], "word": ["x" * (2 << 20)]}), tmp_path / "l.parquet")
    with pytest.raises(InputError, match="has an image with 2097163 characters to keep, over the limit of 1048576"):
        list_images(tmp_path / "l.parquet", keep_columns=["word"])


@pytest.mark.parametrize("name", LISTS)
def test_an_address_that_is_too_long_is_a_row_that_cannot_be_read(name: str, tmp_path: Path) -> None:
    source = write_list(tmp_path / name, "uri", ["a.jpg", "data:image/jpeg;base64," + "x" * 100_000, "b.jpg"])
    first, long, last = (ref.uri for ref in list_images(source))
    assert (first, last) == (f"{tmp_path}/a.jpg", f"{tmp_path}/b.jpg")
    assert len(long) == 16385
    with pytest.raises(ImageError, match=r"^not a usable address: more than 16384 characters$") as caught:
        Fetcher().fetch(long)
    assert caught.value.status == "fetch_failed"


# The web: lists and single images.


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["l.txt", "l.csv", "l.jsonl"])
def test_a_list_on_the_web_names_its_neighbours(name: str, web: str, tmp_path: Path) -> None:
    write_list(tmp_path / name, "url", ["a.jpg", "/img/b.jpg", "s3://bucket/c.jpg", "https://host/d.jpg"])
    expected = [f"{web}/a.jpg", f"{web}/img/b.jpg", "s3://bucket/c.jpg", "https://host/d.jpg"]
    assert [ref.uri for ref in list_images(f"{web}/{name}?token=1")] == expected


def test_a_parquet_list_is_read_from_a_server_that_knows_no_byte_ranges(web: str, tmp_path: Path) -> None:
    names = [f"https://host/{number}.jpg" for number in range(100)]
    write_list(tmp_path / "l.parquet", "url", names)
    assert [ref.uri for ref in list_images(f"{web}/l.parquet")] == names


def test_a_single_image_on_the_web(web: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"12345")
    modified = int((tmp_path / "a.jpg").stat().st_mtime)
    assert list(list_images(f"{web}/a.jpg")) == [ImageRef(f"{web}/a.jpg", 5, f"size=5;modified={modified}")]
    with pytest.raises(InputError, match=r"b\.jpg does not exist"):
        list_images(f"{web}/b.jpg")


def test_a_folder_on_the_web_is_refused(web: str, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for folder in (f"{web}/photos/", f"{web}/photos"):
        with pytest.raises(InputError, match=r"folders cannot be listed over HTTP.*\.txt"):
            list_images(folder)
