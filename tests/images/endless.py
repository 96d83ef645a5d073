"""A server of images that have no end, or that a few bytes unpack to, as the web and three clouds give them."""

from __future__ import annotations

import itertools
import re
import threading
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOTAL = 3 << 30
_MIB = bytes(1 << 20)


def packed(byte: bytes = b"\0") -> Iterator[bytes]:
    """3 GiB of one byte, gzipped: a piece that stands for itself, again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    yield packer.compress(byte * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    piece = packer.compress(byte * (1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    yield from itertools.repeat(piece, TOTAL >> 20)


class Endless(BaseHTTPRequestHandler):
    """Answers by the path: chunked, until-closed, gzip, declared; S3 and Google by the same names."""

    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(TOTAL))
        self.end_headers()

    def do_GET(self) -> None:
        kind = next(name for name in ("until-closed", "chunked", "gzip", "declared") if name in self.path)
        self.server.requests[kind] += 1  # type: ignore[attr-defined]
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("x-ms-range", ""))
        self.send_response(206 if asked else 200)
        self.send_header("ETag", '"endless"')
        pieces: Iterator[bytes] = itertools.repeat(_MIB, TOTAL >> 20)
        if asked:  # Azure
            first, last = int(asked[1]), min(int(asked[2]), TOTAL - 1)
            pieces = itertools.repeat(_MIB, (last + 1 - first) >> 20)
            self.send_header("Content-Range", f"bytes {first}-{last}/{TOTAL}")
            self.send_header("Content-Length", str(last + 1 - first))
            self.send_header("Last-Modified", "Tue, 14 Nov 2023 22:13:20 GMT")
            self.send_header("x-ms-blob-type", "BlockBlob")
        elif kind == "declared":
            self.send_header("Content-Length", str(TOTAL))
        elif kind == "until-closed":
            self.send_header("Connection", "close")
        else:
            self.send_header("Transfer-Encoding", "chunked")
        if kind == "gzip" and not asked:
            self.send_header("Content-Encoding", "gzip")
            pieces = packed()
        self.end_headers()
        chunked = kind in ("chunked", "gzip") and not asked
        for piece in pieces:
            self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if chunked else piece)
        self.close_connection = True

    def log_message(self, *_: object) -> None: ...


class EndlessServer(ThreadingHTTPServer):
    """Counts the requests by their kind."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Endless)
        self.requests: Counter[str] = Counter()

    def handle_error(self, *_: object) -> None: ...  # clients that have enough

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def endless_server() -> Iterator[EndlessServer]:
    """Run the server."""
    server = EndlessServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
