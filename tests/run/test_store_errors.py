"""Whatever goes wrong with any store is one line that says what to do, wherever a store is touched."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from ovss_ray import open_run
from ovss_ray.errors import InputError, OvssError, SettingError
from ovss_ray.images import Fetcher, list_images
from ovss_ray.images.stores import open_store
from ovss_ray.labels.additions import Addition, read_additions
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.driver import run_job
from ovss_ray.run.verify import verify_run
from ovss_ray.spec import JobSpec
from tests.faults import fails, faulty_file_system

Options = dict[str, dict[str, Any]]


def _no_wait(_: float) -> None: ...


def _directory(uri: str, options: Options) -> RunDirectory:
    return RunDirectory(f"{uri}/run", options, sleep=_no_wait)


PLACES: dict[str, Callable[[str, Options], object]] = {
    "folder": lambda uri, options: list(list_images(f"{uri}/photos", storage_options=options)),
    "pattern": lambda uri, options: list(list_images(f"{uri}/**/*.jpg", storage_options=options)),
    "list": lambda uri, options: list(list_images(f"{uri}/l.csv", storage_options=options)),
    "read": lambda uri, options: _directory(uri, options).read_json("run.json"),
    "shards": lambda uri, options: _directory(uri, options).done_shards(),
    "files": lambda uri, options: _directory(uri, options).files_in("manifest"),
    "prepare": lambda uri, options: _directory(uri, options).prepare(),
    "write": lambda uri, options: _directory(uri, options).create("run.json", b"{}"),
    "additions": lambda uri, options: read_additions(*open_store(f"{uri}/run", options), f"{uri}/run"),
    "open": lambda uri, options: open_run(f"{uri}/run", options),
    "verify": lambda uri, options: verify_run(f"{uri}/run", storage_options=options),
}

AZURE_KEY = "AAAA"


def azure(port: int, key: str = AZURE_KEY) -> Options:
    place = f"BlobEndpoint=http://127.0.0.1:{port}/account;"
    return {"az": {"connection_string": f"DefaultEndpointsProtocol=http;AccountName=account;AccountKey={key};{place}"}}


def said(place: str, uri: str, options: Options) -> str:
    """The line that an attempt ends with."""
    with pytest.raises(OvssError) as caught:
        PLACES[place](uri, options)
    text = str(caught.value)
    assert "\n" not in text
    assert "<" not in text  # no XML, no objects
    assert AZURE_KEY not in text
    return text


# -- options that a driver cannot use --------------------------------------------------------------------------------

S3 = {"endpoint_url": "http://127.0.0.1:9", "key": "a", "secret": "b"}
WRONG_OPTIONS = {
    "azure: malformed": (
        "az://c",
        {"az": {"connection_string": "nonsense"}},
        "blank or malformed; check storage_options",
    ),
    "azure: no account": ("az://c", {}, "Must provide either a connection_string or account_name.*; check storage_opt"),
    "azure: key": ("az://c", azure(9, key="x"), "credentials"),
    "google: token file": (
        "gs://b",
        {"gs": {"token": "/no/such.json"}},
        "the file .* does not exist; check the path",
    ),
    "google: token": (
        "gs://b",
        {"gs": {"token": {"a": 1}}},
        "cannot be opened: .*refresh_token.*check storage",
    ),
    "s3: endpoint": ("s3://b", {"s3": {**S3, "endpoint_url": "nonsense"}}, "Invalid endpoint"),
    "s3: profile": ("s3://b", {"s3": {"profile": "no-such-profile"}}, "credentials"),
    "s3: bucket": ("s3://B b!", {"s3": S3}, "rejects the request.*Invalid bucket name"),
    "s3: option": ("s3://b", {"s3": {**S3, "endpoint": "x"}}, "unexpected keyword argument 'endpoint'"),
    "s3: client option": ("s3://b", {"s3": {**S3, "client_kwargs": {"no": 1}}}, "unexpected keyword argument 'no'"),
    "s3: config option": ("s3://b", {"s3": {**S3, "config_kwargs": {"no": 1}}}, "unexpected keyword argument 'no'"),
    "web: option": ("http://127.0.0.1:9", {"http": {"client_kwargs": {"no": 1}}}, "keyword argument 'no'|web server"),
    "protocol": ("ftp://host", {}, "unknown protocol ftp://"),
}


@pytest.fixture(autouse=True)
def _no_other_credentials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/nonexistent")
    for name in ("AZURE_STORAGE_CONNECTION_STRING", "AZURE_STORAGE_ACCOUNT_NAME", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("case", WRONG_OPTIONS)
@pytest.mark.parametrize("place", ["folder", "read", "prepare", "additions", "open"])
def test_options_that_cannot_be_used_are_one_line(place: str, case: str) -> None:
    uri, options, message = WRONG_OPTIONS[case]
    assert re.search(message, said(place, uri, options))


# -- stores that answer with errors ----------------------------------------------------------------------------------


class Store(ThreadingHTTPServer):
    """Answers every request alike, in the words of a store."""

    def __init__(self, status: int, code: str, words: str) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.status = status
        self.code = code
        self.words = words

    def handle_error(self, *_: object) -> None: ...


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        server = self.server
        assert isinstance(server, Store)
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        body = (
            f'<?xml version="1.0"?><Error><Code>{server.code}</Code><Message>{server.words}\nRequestId:1-2\n'
            "Time:2026-01-01</Message></Error>"
        ).encode()
        self.send_response(server.status)
        self.send_header("x-ms-error-code", server.code)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def answering() -> Iterator[Callable[[int, str, str], int]]:
    """Starts a store; returns its port."""
    started: list[Store] = []

    def start(status: int, code: str, words: str) -> int:
        started.append(Store(status, code, words))
        threading.Thread(target=started[-1].serve_forever, args=(0.01,), daemon=True).start()
        return started[-1].server_port

    yield start
    for store in started:
        store.shutdown()
        store.server_close()


ANSWERS = {
    "key": (403, "AuthenticationFailed", "Server failed to authenticate the request.", "permission|access is denied"),
    "container": (
        404,
        "ContainerNotFound",
        "The specified container does not exist.",
        "does not exist|there is no ",
    ),
    "name": (
        400,
        "InvalidResourceName",
        "The name contains invalid characters.",
        "rejects the request|check the address",
    ),
    "busy": (429, "ServerBusy", "Too many requests.", "too busy|Too many requests"),
}


@pytest.mark.parametrize(
    ("store", "place", "answer"),
    [
        *(("az", place, answer) for place in PLACES for answer in ANSWERS),
        # What is busy, the driver of Google itself tries again, for half a minute.
        *(
            ("gs", place, answer)
            for place in ("folder", "read", "prepare", "open")
            for answer in ("key", "container", "name")
        ),
    ],
)
def test_what_a_store_answers_is_one_line(
    store: str, place: str, answer: str, answering: Callable[[int, str, str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", _no_wait)
    status, code, words, message = ANSWERS[answer]
    port = answering(status, code, words)
    options = azure(port) if store == "az" else {"gs": {"token": "anon", "endpoint_url": f"http://127.0.0.1:{port}"}}
    if status == 404 and place in ("read", "shards", "files", "additions"):
        assert not PLACES[place](f"{store}://container", options)  # as for a run that is not there yet
        return
    assert re.search(message, said(place, f"{store}://container", options))


@pytest.mark.parametrize("store", ["az", "gs"])
def test_images_that_such_stores_refuse_are_rows(store: str, answering: Callable[[int, str, str], int]) -> None:
    from ovss_ray.errors import ImageError

    for status, expected in ((403, "forbidden"), (404, "not_found"), (400, "fetch_failed")):
        port = answering(status, "Code", "swordfish")
        options = (
            azure(port) if store == "az" else {"gs": {"token": "anon", "endpoint_url": f"http://127.0.0.1:{port}"}}
        )
        waits: list[float] = []
        with pytest.raises(ImageError) as caught:
            Fetcher(options, sleep=waits.append).fetch(f"{store}://container/a.jpg")
        assert (caught.value.status, waits) == (expected, [])
        assert "swordfish" not in caught.value.reason


# -- additions -------------------------------------------------------------------------------------------------------


class TooManyRequests(Exception):  # noqa: N818
    """As gcsfs and Azure raise it."""

    code = 429


@pytest.fixture
def grown(tmp_path: Path) -> Path:
    record = Addition(
        kind="retry", created_at="now", package_version="0", settings={}, images=0, digest="", parts=()
    ).model_dump_json()
    folder = tmp_path / "bucket" / "run" / "additions"
    folder.mkdir(parents=True)
    for number in (1, 2):
        (folder / f"{number:05d}.json").write_text(record)
    return tmp_path


@pytest.mark.parametrize("method", ["ls", "cat_file"])
def test_one_busy_answer_while_additions_are_read_is_tried_again(method: str, grown: Path) -> None:
    with faulty_file_system(grown) as plan:
        plan.add(fails(TooManyRequests, "slow down"), method=method, first=1)
        fs, root = open_store("gs://bucket/run")
        assert len(read_additions(fs, root, "gs://bucket/run", sleep=_no_wait)) == 2


def test_a_store_that_stays_busy_is_one_line(grown: Path) -> None:
    with faulty_file_system(grown) as plan:
        plan.add(fails(TooManyRequests, "slow down"), method="ls")
        fs, root = open_store("gs://bucket/run")
        with pytest.raises(InputError, match="gs://bucket/run/additions cannot be read: the store is too busy"):
            read_additions(fs, root, "gs://bucket/run", sleep=_no_wait)


# -- a whole job -----------------------------------------------------------------------------------------------------


def test_a_run_on_a_web_server_is_refused(make_spec: Callable[..., JobSpec]) -> None:
    with pytest.raises(OvssError, match="nothing can be written to a web server|cannot be reached"):
        run_job(make_spec(run="http://127.0.0.1:9/run"))


def test_a_job_with_a_malformed_connection_string_is_one_line(make_spec: Callable[..., JobSpec]) -> None:
    options = {"az": {"connection_string": "nonsense"}}
    with pytest.raises(SettingError, match="blank or malformed; check storage_options"):
        run_job(make_spec(input="az://c/photos", storage_options=options))
    with pytest.raises(SettingError, match="blank or malformed; check storage_options"):
        run_job(make_spec(run="az://c/run", storage_options=options))
