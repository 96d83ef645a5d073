"""A web server that knows byte ranges and counts what it sends, places to put files, and a fetch as it was planned."""

from __future__ import annotations

import hashlib
import io
import os
import re
import tarfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from ovss_ray.images import Fetcher, ImageRef, list_images, open_store

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


def fetch(fetcher: Fetcher, ref: ImageRef) -> bytes:
    """What a worker reads of an image that was planned."""
    return fetcher.fetch(ref.uri, ref.size_bytes, ref.offset, etag=ref.etag, header_bytes=ref.header_bytes)


@dataclass
class RangeServer:
    """Serves a folder; `ranges` off makes it answer every request with the whole file, as simple servers do.

    `etags` are of the content: "strong", "weak" or "none"; `dated` is whether it sends Last-Modified.
    """

    uri: str
    folder: Path
    ranges: bool = True
    etags: str = "strong"
    dated: bool = True
    requests: int = 0
    sent_bytes: int = 0


@pytest.fixture
def range_server(tmp_path: Path) -> Iterator[RangeServer]:
    folder = tmp_path / "served"
    folder.mkdir()
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def _answer(self, with_body: bool) -> None:
            file = folder / self.path.lstrip("/").partition("?")[0]
            if not file.is_file():
                self.send_error(404)
                return
            data = file.read_bytes()
            asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            part = data
            if asked and state.ranges:
                first, last = int(asked[1]), int(asked[2] or len(data) - 1)
                part = data[first : last + 1]
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {first}-{first + len(part) - 1}/{len(data)}")
            else:
                self.send_response(200)
            self.send_header("Content-Length", str(len(part)))
            if state.etags != "none":
                tag = f'"{hashlib.md5(data).hexdigest()}"'
                self.send_header("ETag", tag if state.etags == "strong" else f"W/{tag}")
            if state.dated:
                self.send_header("Last-Modified", formatdate(file.stat().st_mtime, usegmt=True))
            self.end_headers()
            with lock:
                state.requests += 1
                state.sent_bytes += len(part) if with_body else 0
            if with_body:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None: ...

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_: object) -> None: ...  # clients drop what they need no more

    server = Server(("127.0.0.1", 0), Handler)
    state = RangeServer(f"http://127.0.0.1:{server.server_port}", folder)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield state
    server.shutdown()
    server.server_close()


def content(number: int, size: int = 2000) -> bytes:
    return np.random.default_rng(number).bytes(size)


def tar_of(members: list[tuple[str, bytes]], format: str = "pax") -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=FORMATS[format]) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return sink.getvalue()


class Place:
    """Where a file is put, and read from."""

    def __init__(self, uri: str, put: Callable[[str, bytes], object]) -> None:
        self.uri = uri
        self.put = put

    def planned(self, name: str, data: bytes) -> list[ImageRef]:
        self.put(name, data)
        return list(list_images(f"{self.uri}/{name}"))


@pytest.fixture(params=["disk", "s3", "web", "web with weak tags", "web without tags"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    if request.param == "s3":
        uri = str(request.getfixturevalue("s3"))
        fs, root = open_store(uri)
        return Place(uri, lambda name, data: fs.pipe_file(f"{root}/{name}", data))
    if request.param == "disk":
        return Place(str(tmp_path), lambda name, data: (tmp_path / name).write_bytes(data))
    server: RangeServer = request.getfixturevalue("range_server")
    server.etags = {"web": "strong", "web with weak tags": "weak"}.get(request.param, "none")
    moment = [1_700_000_000]

    def put(name: str, data: bytes) -> None:
        (server.folder / name).write_bytes(data)
        moment[0] += 1  # Last-Modified knows whole seconds
        os.utime(server.folder / name, (moment[0], moment[0]))

    return Place(server.uri, put)
