"""Stores other than S3: Google Cloud Storage through gcsfs, against a small server that speaks its JSON interface."""

from __future__ import annotations

import io
import json
import re
import tarfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qsl, unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovss_ray.errors import ImageError, InputError
from ovss_ray.images import Fetcher, ImageRef, StorageOptions, list_images
from ovss_ray.images.stores import open_store
from tests.images.conftest import fetch


def _tar() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        for name, content in (("1.jpg", b"one"), ("1.txt", b"t"), ("2.jpg", b"two")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def _parquet() -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.table({"image": [b"three", b"four"]}), data)
    return data.getvalue()


OBJECTS = {
    "photos/": b"",
    "photos/a.jpg": b"aaa",
    "photos/b/c.png": b"c",
    "photos/b/notes.md": b"n",
    "photos/.trash/x.jpg": b"x",
    "photosx/y.jpg": b"yy",
    "packed/a.tar": _tar(),
    "packed/b.parquet": _parquet(),
}


class Storage(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        address = urlsplit(self.path)
        query = dict(parse_qsl(address.query))
        if address.path.endswith("/b/bucket/o"):
            self._answer(200, json.dumps(self._listing(query.get("prefix", ""))).encode())
            return
        key = unquote(address.path.partition("/b/bucket/o/")[2])
        if key not in OBJECTS:
            self._answer(404, b"{}")
        elif query.get("alt") == "media":
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            data = OBJECTS[key][int(asked[1]) : int(asked[2]) + 1] if asked else OBJECTS[key]
            self._answer(206 if asked else 200, data)
        else:
            self._answer(200, json.dumps(self._describe(key)).encode())

    @staticmethod
    def _describe(key: str) -> dict[str, str]:
        return {"name": key, "bucket": "bucket", "size": str(len(OBJECTS[key])), "etag": f"etag of {key}"}

    def _listing(self, prefix: str) -> dict[str, object]:
        below = [key for key in OBJECTS if key.startswith(prefix)]
        folders = {prefix + key[len(prefix) :].split("/")[0] + "/" for key in below if "/" in key[len(prefix) :]}
        files = [self._describe(key) for key in below if "/" not in key[len(prefix) :]]
        return {"items": files, "prefixes": sorted(folders)}

    def _answer(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


class Server(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None: ...  # gcsfs drops requests that it needs no more


@pytest.fixture
def options() -> Iterator[StorageOptions]:
    pytest.importorskip("gcsfs")
    server = Server(("127.0.0.1", 0), Storage)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield {"gs": {"endpoint_url": f"http://127.0.0.1:{server.server_port}", "token": "anon"}}
    server.shutdown()
    server.server_close()


def test_a_bucket_is_walked_folder_by_folder(options: StorageOptions) -> None:
    a = ImageRef("gs://bucket/photos/a.jpg", 3, "etag of photos/a.jpg")
    c = ImageRef("gs://bucket/photos/b/c.png", 1, "etag of photos/b/c.png")
    y = ImageRef("gs://bucket/photosx/y.jpg", 2, "etag of photosx/y.jpg")
    assert list(list_images("gs://bucket/photos", storage_options=options)) == [a, c]
    assert list(list_images("gs://bucket/*/**.{jpg,png}", storage_options=options)) == [a, c, y]
    assert list(list_images("gs://bucket/photos*/*.jpg", storage_options=options)) == [a, y]
    assert list(list_images("gs://bucket/photos/a.jpg", storage_options=options)) == [a]
    with pytest.raises(InputError, match="gs://bucket/nothing does not exist"):
        list_images("gs://bucket/nothing", storage_options=options)


def test_objects_are_fetched(options: StorageOptions) -> None:
    fetcher = Fetcher(options)
    assert fetcher.fetch("gs://bucket/photos/a.jpg", size_bytes=3) == b"aaa"
    with pytest.raises(ImageError) as caught:
        fetcher.fetch("gs://bucket/photos/missing.jpg")
    assert caught.value.status == "not_found"


def test_images_inside_files_are_listed_and_fetched(options: StorageOptions) -> None:
    refs = list(list_images("gs://bucket/packed", storage_options=options))
    assert [ref.uri for ref in refs] == [
        *(f"tar://{name}.jpg::gs://bucket/packed/a.tar" for name in (1, 2)),
        *(f"parquet://image/{row}::gs://bucket/packed/b.parquet" for row in (0, 1)),
    ]
    assert {ref.etag for ref in refs} == {"etag of packed/a.tar", "etag of packed/b.parquet"}
    fetcher = Fetcher(options)
    found = [fetch(fetcher, ref) for ref in refs]
    assert found == [b"one", b"two", b"three", b"four"]


def test_an_endpoint_of_ones_own_is_asked_in_json_only(monkeypatch: pytest.MonkeyPatch) -> None:
    import gcsfs  # type: ignore[import-untyped]

    named, _ = open_store("gs://bucket/a", {"gs": {"endpoint_url": "http://127.0.0.1:9", "token": "anon"}})
    assert type(named) is gcsfs.core.GCSFileSystem
    of_google, _ = open_store("gs://bucket/a", {"gs": {"token": "anon"}})
    assert isinstance(of_google, gcsfs.GCSFileSystem)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "127.0.0.1:9")
    emulated, _ = open_store("gcs://bucket/b", {"gcs": {"token": "anon", "skip_instance_cache": True}})
    assert type(emulated) is gcsfs.core.GCSFileSystem
