"""Fetching images: from disk, from a real S3 server, and from a web server that misbehaves in every known way."""

from __future__ import annotations

import errno
import os
import pickle
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ovss_ray.errors import ImageError, SettingError
from ovss_ray.images import Fetcher, open_store
from tests.faults import (
    HANGS,
    LOST_REPLY,
    RESET,
    STALL,
    TRUNCATED,
    FaultyEndpoint,
    FileFault,
    HttpFault,
    fails,
    faulty_file_system,
    slow,
    status,
    together,
)

BODY = bytes(range(256)) * 40


class Misbehaving(BaseHTTPRequestHandler):
    """Answers by the path: /404, /twice-500 (fails two times, then works), /cut, /reset, /slow ..."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        name = self.path.strip("/").split("/")[0]
        count = self.server.requests[self.path] = self.server.requests[self.path] + 1  # type: ignore[attr-defined]
        self.server.agents.add(self.headers["User-Agent"])  # type: ignore[attr-defined]
        if name.startswith("twice-") and count > 2:
            name = "good"
        name = name.removeprefix("twice-")
        if name.isdigit():
            self._answer(int(name), b"sorry")
        elif name == "busy":
            self._answer(429, b"slow down", {"Retry-After": "7"})
        elif name == "later":
            self._answer(503, b"slow down", {"Retry-After": formatdate(time.time() + 30, usegmt=True)})
        elif name == "cut":
            self._answer(200, BODY[:100], length=len(BODY))
        elif name == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            self.connection.close()
        elif name == "slow":
            self.server.patience.wait(20)  # type: ignore[attr-defined]
            self._answer(200, BODY)
        else:
            self._answer(200, BODY)

    def _answer(
        self, status: int, body: bytes, headers: dict[str, str] | None = None, length: int | None = None
    ) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = length is not None

    def log_message(self, *_: object) -> None: ...


class WebServer(ThreadingHTTPServer):
    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Misbehaving)
        self.requests: Counter[str] = Counter()
        self.agents: set[str] = set()
        self.patience = threading.Event()

    def handle_error(self, *_: object) -> None: ...

    def uri(self, path: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{path}"


@pytest.fixture
def web() -> Iterator[WebServer]:
    server = WebServer()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.patience.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def fetcher(waits: list[float]) -> Fetcher:
    return Fetcher(attempts=4, timeout_s=5, sleep=waits.append)


@pytest.mark.parametrize(
    ("path", "status"), [("404", "not_found"), ("410", "not_found"), ("403", "forbidden"), ("401", "forbidden")]
)
def test_missing_and_forbidden_images_are_asked_for_once(
    path: str, status: str, web: WebServer, fetcher: Fetcher, waits: list[float]
) -> None:
    with pytest.raises(ImageError) as caught:
        fetcher.fetch(web.uri(path))
    assert (caught.value.status, web.requests[f"/{path}"], waits) == (status, 1, [])


@pytest.mark.parametrize("path", ["twice-500", "twice-503", "twice-502", "twice-429", "twice-cut", "twice-reset"])
def test_passing_trouble_is_overcome(path: str, web: WebServer, fetcher: Fetcher) -> None:
    assert fetcher.fetch(web.uri(path)) == BODY
    assert web.requests[f"/{path}"] == 3


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("500", "500"),
        ("503", "503"),
        ("cut", "not enough data|incomplete|ContentLength"),
        ("reset", "reset|disconnected"),
    ],
)
def test_lasting_trouble_is_given_up_with_its_reason(path: str, reason: str, web: WebServer, fetcher: Fetcher) -> None:
    with pytest.raises(ImageError, match=rf"(?i)({reason}).*attempt 4 of 4") as caught:
        fetcher.fetch(web.uri(path))
    assert caught.value.status == "fetch_failed"
    assert web.requests[f"/{path}"] in (4, 8)  # aiohttp itself asks once more when a connection is reset


def test_a_server_that_never_finishes_is_given_up(web: WebServer) -> None:
    with pytest.raises(ImageError, match=r"no complete answer within 0\.2 s") as caught:
        Fetcher(attempts=2, timeout_s=0.2, sleep=lambda _: None).fetch(web.uri("slow"))
    assert (caught.value.status, web.requests["/slow"]) == ("fetch_failed", 2)


def test_nobody_listening_is_a_failed_fetch(fetcher: Fetcher, waits: list[float]) -> None:
    with pytest.raises(ImageError) as caught:
        fetcher.fetch("http://127.0.0.1:9/a.jpg")
    assert (caught.value.status, len(waits)) == ("fetch_failed", 3)


def test_waits_grow_and_are_capped(web: WebServer) -> None:
    random.seed(0)
    runs = []
    for _ in range(25):
        waits: list[float] = []
        with pytest.raises(ImageError):
            Fetcher(attempts=9, sleep=waits.append).fetch(web.uri("500"))
        runs.append(waits)
    longest = [max(column) for column in zip(*runs, strict=True)]
    shortest = [min(column) for column in zip(*runs, strict=True)]
    windows = [0.5, 1, 2, 4, 8, 16, 20, 20]
    assert all(0.7 * window < top <= window for top, window in zip(longest, windows, strict=True))
    assert all(bottom < 0.3 * window for bottom, window in zip(shortest, windows, strict=True))


def test_a_busy_server_is_left_alone_as_long_as_it_asks(web: WebServer, fetcher: Fetcher, waits: list[float]) -> None:
    for path, asked_for in (("busy", 7), ("later", 28)):
        waits.clear()
        with pytest.raises(ImageError, match="429|503"):
            fetcher.fetch(web.uri(path))
        assert len(waits) == 3
        assert all(asked_for <= wait <= asked_for + 2 + 8 for wait in waits)


def test_the_server_learns_who_asks(web: WebServer, fetcher: Fetcher) -> None:
    fetcher.fetch(web.uri("good"))
    assert {agent.split("/")[0] for agent in web.agents} == {"ovss-ray"}


def test_many_threads_share_one_fetcher(web: WebServer, s3: str, tmp_path: Path) -> None:
    fs, root = open_store(s3)
    uris, expected = [], []
    for number in range(60):
        body = bytes([number]) * (number + 1)
        (tmp_path / f"{number}.jpg").write_bytes(body)
        fs.pipe_file(f"{root}/{number}.jpg", body)
        uris += [f"{tmp_path}/{number}.jpg", f"{s3}/{number}.jpg", web.uri(f"twice-500/{number}")]
        expected += [body, body, BODY]
    fetcher = Fetcher(sleep=lambda _: None)
    with ThreadPoolExecutor(32) as pool:
        assert list(pool.map(fetcher.fetch, uris)) == expected


def test_a_fetcher_travels_to_another_process(s3: str) -> None:
    fs, root = open_store(s3)
    fs.pipe_file(f"{root}/a.jpg", BODY)
    fetcher = Fetcher({"s3": {"anon": False}}, 3, timeout_s=7, connections=5, max_bytes=20_000)
    fetcher.fetch(f"{s3}/a.jpg")
    copy = pickle.loads(pickle.dumps(fetcher))
    assert copy.fetch(f"{s3}/a.jpg") == BODY
    assert (copy.attempts, copy.timeout_s, copy.connections, copy.max_bytes) == (3, 7, 5, 20_000)


def test_keys_that_are_missing_in_a_bucket(s3: str, fetcher: Fetcher, waits: list[float]) -> None:
    for uri in (f"{s3}/missing.jpg", "s3://no-such-bucket-here/a.jpg"):
        with pytest.raises(ImageError) as caught:
            fetcher.fetch(uri)
        assert caught.value.status == "not_found"
    assert waits == []


@pytest.mark.usefixtures("s3")
def test_an_image_in_a_bucket_costs_one_request(web: WebServer) -> None:
    fetcher = Fetcher({"s3": {"endpoint_url": web.uri("good")}})
    assert fetcher.fetch("s3://bucket/a.jpg") == BODY
    assert web.requests == {"/good/bucket/a.jpg": 1}


@pytest.mark.usefixtures("s3")
def test_a_bucket_that_forbids(web: WebServer, waits: list[float]) -> None:
    fetcher = Fetcher({"s3": {"endpoint_url": web.uri("403")}}, sleep=waits.append)
    with pytest.raises(ImageError) as caught:
        fetcher.fetch("s3://bucket/a.jpg")
    assert (caught.value.status, sum(web.requests.values()), waits) == ("forbidden", 1, [])


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("path", ["503", "500", "cut"])
def test_a_bucket_in_trouble_is_asked_as_often_as_was_said(path: str, web: WebServer, waits: list[float]) -> None:
    fetcher = Fetcher({"s3": {"endpoint_url": web.uri(path)}}, attempts=3, sleep=waits.append)
    with pytest.raises(ImageError, match="attempt 3 of 3") as caught:
        fetcher.fetch("s3://bucket/a.jpg")
    assert (caught.value.status, sum(web.requests.values()), len(waits)) == ("fetch_failed", 3, 2)


def test_local_files(tmp_path: Path, fetcher: Fetcher, waits: list[float]) -> None:
    (tmp_path / "a b.jpg").write_bytes(BODY)
    (tmp_path / "empty.jpg").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.jpg")
    assert fetcher.fetch(str(tmp_path / "a b.jpg")) == BODY
    assert fetcher.fetch((tmp_path / "a b.jpg").as_uri()) == BODY
    assert fetcher.fetch(str(tmp_path / "empty.jpg")) == b""
    for name in ("missing.jpg", "empty.jpg/below.jpg", ".", "pipe.jpg"):
        with pytest.raises(ImageError) as caught:
            fetcher.fetch(str(tmp_path / name))
        assert caught.value.status == "not_found"
    assert waits == []


def test_a_local_file_without_permission(tmp_path: Path, fetcher: Fetcher) -> None:
    (tmp_path / "a.jpg").write_bytes(BODY)
    (tmp_path / "a.jpg").chmod(0)
    if os.access(tmp_path / "a.jpg", os.R_OK):
        pytest.skip("this user reads everything")
    with pytest.raises(ImageError, match="Permission denied") as caught:
        fetcher.fetch(str(tmp_path / "a.jpg"))
    assert caught.value.status == "forbidden"


@pytest.mark.parametrize("uri", ["ftp://host/a.jpg", "http://[broken/a.jpg", "/tmp/\0.jpg"])
def test_addresses_that_cannot_work_are_not_tried_again(uri: str, fetcher: Fetcher, waits: list[float]) -> None:
    with pytest.raises(ImageError, match="not a usable address") as caught:
        fetcher.fetch(uri)
    assert (caught.value.status, waits) == ("fetch_failed", [])


def test_a_row_of_a_list_that_names_nothing(fetcher: Fetcher) -> None:
    with pytest.raises(ImageError, match="names no image") as caught:
        fetcher.fetch("")
    assert caught.value.status == "not_found"


def test_files_over_the_byte_limit_are_not_read(tmp_path: Path, web: WebServer) -> None:
    (tmp_path / "a.jpg").write_bytes(BODY)
    fetcher = Fetcher(max_bytes=100)
    for uri, size_bytes in ((str(tmp_path / "a.jpg"), None), (web.uri("good"), len(BODY))):
        with pytest.raises(ImageError, match="over the limit of 100") as caught:
            fetcher.fetch(uri, size_bytes)
        assert caught.value.status == "too_large"
    assert not web.requests


def test_settings_that_make_no_sense_are_refused() -> None:
    with pytest.raises(SettingError, match="1 or more"):
        Fetcher(attempts=0)


# -- a real bucket behind a proxy that spoils requests -----------------------------------------------------------------


@pytest.fixture
def bucket(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultyEndpoint]:
    """The proxy before the bucket `s3`, which holds 0.jpg to 99.jpg."""
    fs, root = open_store(s3)
    fs.pipe({f"{root}/{number}.jpg": BODY for number in range(100)})
    with FaultyEndpoint(s3_endpoint) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url)
        yield endpoint


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (status(429), "throttled"),
        (status(503), "throttled"),
        (status(400, "Throttling"), "throttled"),
        (status(500), "server_error"),
        (status(400, "RequestTimeout"), "timeout"),
        (TRUNCATED, "truncated"),
        (STALL, "timeout"),
    ],
)
def test_passing_trouble_of_a_bucket_is_overcome_and_counted_by_kind(
    fault: HttpFault, kind: str, bucket: FaultyEndpoint, s3: str, waits: list[float]
) -> None:
    bucket.plan.add(fault, method="GET", path="*/7.jpg", first=2)
    retries: list[str] = []
    fetcher = Fetcher(attempts=3, timeout_s=3 if fault is STALL else 20, sleep=waits.append, on_retry=retries.append)
    assert fetcher.fetch(f"{s3}/7.jpg", size_bytes=len(BODY)) == BODY
    assert retries == [kind, kind]
    assert len(waits) == 2
    assert len(bucket.asked(path="*/7.jpg")) == 3


def test_a_busy_bucket_is_left_alone_as_long_as_it_asks(bucket: FaultyEndpoint, s3: str, waits: list[float]) -> None:
    bucket.plan.add(status(503, retry_after="7"), first=2)
    assert Fetcher(sleep=waits.append).fetch(f"{s3}/7.jpg") == BODY
    assert all(7 <= wait <= 7 + 4 for wait in waits)
    assert len(waits) == 2


@pytest.mark.parametrize("fault", [RESET, LOST_REPLY])
def test_lost_connections_are_overcome(fault: HttpFault, bucket: FaultyEndpoint, s3: str, waits: list[float]) -> None:
    bucket.plan.add(fault, method="GET", path="*/7.jpg", first=4)
    retries: list[str] = []
    assert Fetcher(sleep=waits.append, on_retry=retries.append).fetch(f"{s3}/7.jpg") == BODY
    assert set(retries) <= {"unreachable", "disconnected"}
    assert len(retries) in (2, 3, 4)  # aiohttp itself asks once more when a connection is reset


@pytest.mark.parametrize(("fault", "said"), [(status(403), "forbidden"), (status(404), "not_found")])
def test_a_bucket_is_asked_once_for_what_it_refuses(
    fault: HttpFault, said: str, bucket: FaultyEndpoint, s3: str, waits: list[float]
) -> None:
    bucket.plan.add(fault, path="*/7.jpg")
    with pytest.raises(ImageError) as caught:
        Fetcher(sleep=waits.append).fetch(f"{s3}/7.jpg")
    assert (caught.value.status, len(bucket.asked(path="*/7.jpg")), waits) == (said, 1, [])


def test_a_slow_bucket_is_no_reason_to_ask_again(bucket: FaultyEndpoint, s3: str) -> None:
    bucket.plan.add(slow(0.2))
    assert Fetcher().fetch(f"{s3}/7.jpg") == BODY
    assert len(bucket.asked()) == 1


def test_a_busy_bucket_gets_fewer_requests_at_a_time_and_later_more_again(
    bucket: FaultyEndpoint, s3: str, waits: list[float]
) -> None:
    fetcher = Fetcher(connections=8, sleep=waits.append)
    uris = [f"{s3}/{number}.jpg" for number in range(100)]
    with ThreadPoolExecutor(16) as pool:
        bucket.plan.add(together(8), path="*/[0-9].jpg")
        assert set(pool.map(fetcher.fetch, uris[:8])) == {BODY}
        assert (bucket.most_at_once, waits) == (8, [])

        bucket.plan.add(status(503), path="*/10.jpg", first=2)  # halves the window twice
        assert fetcher.fetch(uris[10]) == BODY
        bucket.most_at_once = 0
        bucket.plan.add(slow(0.02))
        assert set(pool.map(fetcher.fetch, uris[12:14])) == {BODY}
        assert set(pool.map(fetcher.fetch, uris[14:18])) == {BODY}
        assert bucket.most_at_once in (2, 3, 4)

        assert set(pool.map(fetcher.fetch, uris[20:60])) == {BODY}  # 2 + 3 + 4 + 5 + 6 + 7 good replies
        bucket.plan.clear()
        bucket.plan.add(together(8))
        bucket.most_at_once = 0
        waits.clear()
        assert set(pool.map(fetcher.fetch, uris[60:68])) == {BODY}
        assert (bucket.most_at_once, waits) == (8, [])


def test_a_busy_bucket_holds_up_no_other(bucket: FaultyEndpoint, s3: str, waits: list[float]) -> None:
    other = f"{s3}-other"
    fs, root = open_store(other)
    fs.mkdir(root)
    fs.pipe({f"{root}/{number}.jpg": BODY for number in range(8)})
    fetcher = Fetcher(connections=8, sleep=waits.append)
    bucket.plan.add(status(503), path="*/0.jpg", first=3)
    assert fetcher.fetch(f"{s3}/0.jpg") == BODY
    bucket.plan.clear()
    bucket.plan.add(together(8))
    waits.clear()
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(fetcher.fetch, [f"{other}/{number}.jpg" for number in range(8)])) == {BODY}
    assert waits == []


def test_what_is_told_about_retries_stays_behind_when_a_fetcher_travels(bucket: FaultyEndpoint, s3: str) -> None:
    told: list[str] = []
    copy = pickle.loads(pickle.dumps(Fetcher(sleep=_no_wait, on_retry=lambda kind: told.append(kind))))
    bucket.plan.add(status(503), first=1)
    assert copy.fetch(f"{s3}/7.jpg") == BODY
    assert told == []


def _no_wait(_: float) -> None: ...


@pytest.mark.parametrize(
    ("fault", "said", "asked"),
    [
        (fails(PermissionError, "no"), "forbidden", 1),
        (fails(FileNotFoundError, "gone"), "not_found", 1),
        (fails(OSError, "Forbidden: https://storage/a.jpg"), "forbidden", 1),  # as gcsfs says it
        (fails(OSError, errno.EIO, "Input/output error"), "fetch_failed", 3),
        (fails(TimeoutError, "slow"), "fetch_failed", 3),
        (fails(ConnectionResetError, "reset"), "fetch_failed", 3),
        (HANGS, "fetch_failed", 3),
    ],
)
def test_other_stores_that_fail(fault: FileFault, said: str, asked: int, tmp_path: Path) -> None:
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a.jpg").write_bytes(BODY)
    retries: list[str] = []
    fetcher = Fetcher(attempts=3, timeout_s=1 if fault is HANGS else 20, sleep=_no_wait, on_retry=retries.append)
    with faulty_file_system(tmp_path) as plan:
        plan.add(fault, method="cat_file")
        with pytest.raises(ImageError) as caught:
            fetcher.fetch("gs://bucket/a.jpg")
        assert (caught.value.status, len(retries)) == (said, asked - 1)
        plan.clear()
        assert fetcher.fetch("gs://bucket/a.jpg") == BODY


def test_what_google_forbids_is_asked_for_once(waits: list[float]) -> None:
    pytest.importorskip("gcsfs")
    with FaultyEndpoint() as endpoint:
        endpoint.plan.add(status(403))
        fetcher = Fetcher({"gs": {"endpoint_url": endpoint.url, "token": "anon"}}, sleep=waits.append)
        with pytest.raises(ImageError) as caught:
            fetcher.fetch("gs://bucket/a.jpg")
        assert (caught.value.status, len(endpoint.requests), waits) == ("forbidden", 1, [])
