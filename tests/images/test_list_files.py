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

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovss_ray.errors import InputError
from ovss_ray.images import ImageRef, list_images, open_store

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
