"""A proxy before an S3 server that spoils requests."""

from __future__ import annotations

import contextlib
import fnmatch
import http.client
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import unquote, urlsplit
from xml.sax.saxutils import escape

from tests.faults.plan import Plan

Kind = Literal["status", "slow", "together", "truncated", "reset", "lost_reply", "stall", "unconditional"]

_CODES = {
    400: "InvalidArgument",
    403: "AccessDenied",
    404: "NoSuchKey",
    409: "ConditionalRequestConflict",
    412: "PreconditionFailed",
    429: "TooManyRequests",
    500: "InternalError",
    501: "NotImplemented",
    503: "SlowDown",
    507: "InsufficientStorage",
}


@dataclass(frozen=True)
class HttpFault:
    """What goes wrong with a request over HTTP; made by the functions and constants below."""

    kind: Kind
    status: int = 0
    code: str = ""
    retry_after: str | None = None
    seconds: float = 0.0
    requests: int = 0


def status(number: int, code: str | None = None, *, retry_after: str | None = None) -> HttpFault:
    """Answer with an error of S3, without passing the request on."""
    return HttpFault("status", number, code or _CODES[number], retry_after)


def slow(seconds: float) -> HttpFault:
    """Wait before the request is passed on."""
    return HttpFault("slow", seconds=seconds)


def together(requests: int, seconds: float = 5.0) -> HttpFault:
    """Hold requests back until so many are here at once; answer 500 if they have not come after so many seconds."""
    return HttpFault("together", 500, _CODES[500], seconds=seconds, requests=requests)


TRUNCATED = HttpFault("truncated")  # half of the body that was announced, then the end of the connection
RESET = HttpFault("reset")  # the connection is reset before the request is passed on
LOST_REPLY = HttpFault("lost_reply")  # the connection is reset after the request took place
STALL = HttpFault("stall")  # no answer at all
UNCONDITIONAL = HttpFault("unconditional")  # If-None-Match is ignored


@dataclass(frozen=True)
class Request:
    """A request that arrived: its path with the query, unquoted; its headers in lower case; what went wrong."""

    method: str
    path: str
    headers: dict[str, str]
    fault: HttpFault | None


class FaultyEndpoint(ThreadingHTTPServer):
    """A reverse proxy that spoils requests by a plan, and records all of them; a context manager.

    Args:
        upstream: address of the real server; without one, requests that are not spoilt get an empty answer.
    """

    daemon_threads = True
    request_queue_size = 256

    def __init__(self, upstream: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = None if upstream is None else urlsplit(upstream).netloc
        self.plan: Plan[HttpFault] = Plan()
        self.requests: list[Request] = []
        self.most_at_once = 0
        self.closing = threading.Event()
        # The server behind checks the condition first and then stores; S3 does both in one step.
        self.conditional_put = threading.Lock()
        self._at_once = 0
        self._lock = threading.Condition()

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server_port}"

    def asked(self, method: str = "*", path: str = "*") -> list[Request]:
        """The requests that match two patterns, in the order of their arrival."""
        with self._lock:
            found = list(self.requests)
        return [
            request
            for request in found
            if fnmatch.fnmatchcase(request.method, method) and fnmatch.fnmatchcase(request.path, path)
        ]

    @contextlib.contextmanager
    def recorded(self, request: Request) -> Iterator[None]:
        """Record a request while it is under way."""
        with self._lock:
            self.requests.append(request)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            self._lock.notify_all()
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def wait_for(self, requests: int, seconds: float) -> bool:
        """Wait until the most requests that were here at once are so many; whether they came in time."""
        with self._lock:
            return self._lock.wait_for(lambda: self.most_at_once >= requests, seconds)

    def __enter__(self) -> FaultyEndpoint:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, *_: object) -> None: ...  # clients that break off are what this is for


class _Handler(BaseHTTPRequestHandler):
    server: FaultyEndpoint
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        body = self._body()
        path = unquote(self.path)
        fault = self.server.plan.pick(self.command, path)
        headers = {name.lower(): value for name, value in self.headers.items()}
        with self.server.recorded(Request(self.command, path, headers, fault)):
            self._answer(fault or HttpFault("slow"), headers, body)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle  # noqa: N815

    def _answer(self, fault: HttpFault, headers: dict[str, str], body: bytes) -> None:
        too_few = fault.kind == "together" and not self.server.wait_for(fault.requests, fault.seconds)
        if fault.kind == "status" or too_few:
            self._refuse(fault)
            return
        if fault.kind == "stall":
            self.server.closing.wait(300)
        if fault.kind in ("reset", "stall"):
            self._reset()
            return
        if fault.kind == "slow":
            self.server.closing.wait(fault.seconds)
        if fault.kind == "unconditional":
            headers = {name: value for name, value in headers.items() if name != "if-none-match"}
        reply, content = self._forward(headers, body)
        if fault.kind == "lost_reply":
            self._reset()
            return
        self._send(reply, content, cut=fault.kind == "truncated")

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            body = b""
            while size := int(self.rfile.readline().split(b";")[0], 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _forward(self, headers: dict[str, str], body: bytes) -> tuple[http.client.HTTPResponse | None, bytes]:
        if self.server.upstream is None:
            return None, b""
        hop_by_hop = ("connection", "keep-alive", "transfer-encoding", "expect", "content-length")
        passed_on = {name: value for name, value in headers.items() if name not in hop_by_hop}
        connection = http.client.HTTPConnection(self.server.upstream, timeout=60)
        with self.server.conditional_put if "if-none-match" in headers else contextlib.nullcontext():
            connection.request(self.command, self.path, body or None, {**passed_on, "content-length": str(len(body))})
            reply = connection.getresponse()
            content = reply.read()
        connection.close()
        return reply, content

    def _send(self, reply: http.client.HTTPResponse | None, content: bytes, *, cut: bool) -> None:
        self.send_response(200 if reply is None else reply.status)
        length = str(len(content))
        for name, value in () if reply is None else reply.getheaders():
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in ("connection", "transfer-encoding", "content-length", "date", "server"):
                self.send_header(name, value)
        self.send_header("Content-Length", length)
        self.end_headers()
        self.wfile.write(content[: len(content) // 2] if cut else content)
        self.close_connection = cut

    def _refuse(self, fault: HttpFault) -> None:
        message = f"{fault.code}, as the plan of the test has it"
        content = f"<?xml version='1.0'?><Error><Code>{fault.code}</Code><Message>{escape(message)}</Message></Error>"
        self.send_response(fault.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        if fault.retry_after is not None:
            self.send_header("Retry-After", fault.retry_after)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content.encode())

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def log_message(self, *_: object) -> None: ...
