"""What the addresses in a list may lead to: other stores, files of the worker, hosts that are not public."""

from __future__ import annotations

import io
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ovss_ray.errors import ImageError, InputError, SettingError
from ovss_ray.images import Fetcher, ImageRef, list_images, open_store
from ovss_ray.images.decoding import decode_image
from ovss_ray.images.reach import Reach
from ovss_ray.spec import JobSpec

SECRET = b"root:x:0:0:the password is swordfish"


class Site(ThreadingHTTPServer):
    """Serves `pages` by path: bytes, a status (also with bytes), or a place to be redirected to."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        super().__init__((host, 0), _Handler)
        self.pages: dict[str, Any] = {"/a.jpg": SECRET}
        self.requests: Counter[str] = Counter()

    def uri(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.server_port}{path}"

    def handle_error(self, *_: object) -> None: ...


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.server.requests[self.path] += 1  # type: ignore[attr-defined]
        page = self.server.pages.get(self.path, 404)  # type: ignore[attr-defined]
        if isinstance(page, str):
            self.send_response(302)
            self.send_header("Location", page)
            page = b""
        elif isinstance(page, tuple):
            self.send_response(page[0])
            page = page[1]
        else:
            self.send_response(page if isinstance(page, int) else 200, SECRET.decode())
            page = SECRET if isinstance(page, int) else page
        self.send_header("Content-Length", str(len(page)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(page)

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def sites() -> Iterator[Any]:
    """Starts web servers."""
    started: list[Site] = []

    def start(host: str = "127.0.0.1") -> Site:
        started.append(Site(host))
        threading.Thread(target=started[-1].serve_forever, args=(0.01,), daemon=True).start()
        return started[-1]

    yield start
    for site in started:
        site.shutdown()
        site.server_close()


@pytest.fixture
def web(sites: Any) -> Site:
    """Where a list lies."""
    return sites()


@pytest.fixture
def inner(sites: Any) -> Site:
    """Another server on a host that is not public."""
    return sites()


def refused(uri: str, reach: Reach) -> str:
    with pytest.raises(ImageError) as caught:
        Fetcher(attempts=3, sleep=lambda _: None).fetch(uri, reach=reach)
    assert caught.value.status == "forbidden"
    return caught.value.reason


# -- protocols -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_a_remote_list_reaches_no_local_file(
    scheme: str, web: Site, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    local = tmp_path / "a.jpg"
    local.write_bytes(SECRET)
    rows = ["good.jpg", local.as_uri(), f"FILE://localhost{local}", f"local://{local}"]
    rows += [str(local)] if scheme == "s3" else []  # on a web server, that is a path on it
    web.pages |= {"/list.txt": "\n".join(rows).encode(), "/good.jpg": b"good"}
    source = web.uri("/list.txt")
    if scheme == "s3":
        source = f"{request.getfixturevalue('s3')}/list.txt"
        fs, path = open_store(source)
        fs.pipe({path: web.pages["/list.txt"], path.replace("list.txt", "good.jpg"): b"good"})
    good, *others = [ref.uri for ref in list_images(source)]
    assert len(others) == len(rows) - 1
    assert Fetcher().fetch(good, reach=Reach(source)) == b"good"
    for uri in others:
        assert "may not name local files; --allow-schemes" in refused(uri, Reach(source))
        assert Fetcher().fetch(uri, reach=Reach(source, schemes=(scheme, "file"))) == SECRET


def test_paths_in_the_cells_of_a_remote_parquet_file_reach_no_local_file(s3: str, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(SECRET)
    cells = [{"bytes": None, "path": str(tmp_path / "a.jpg")}, {"bytes": None, "path": "b.jpg"}]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array(cells, kind)}), sink)
    fs, root = open_store(s3)
    fs.pipe({f"{root}/p.parquet": sink.getvalue(), f"{root}/b.jpg": b"good"})
    local, beside = list_images(f"{s3}/p.parquet")
    reach = Reach(f"{s3}/p.parquet")
    with pytest.raises(ImageError, match="may not name local files") as caught:
        Fetcher().fetch(local.uri, offset=local.offset, reach=reach)
    assert caught.value.status == "forbidden"
    assert Fetcher().fetch(beside.uri, offset=beside.offset, reach=reach) == b"good"


def test_what_a_remote_parquet_file_names_is_judged_by_its_own_place_too(
    s3: str, web: Site, inner: Site, tmp_path: Path
) -> None:
    """However trusted the list is that names the Parquet file."""
    (tmp_path / "a.jpg").write_bytes(SECRET)
    paths = [str(tmp_path / "a.jpg"), inner.uri("/a.jpg"), "good.jpg", f"{s3}/good.jpg", web.uri("/good.jpg")]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": pa.array([{"bytes": None, "path": path} for path in paths], kind)}), sink)
    fs, root = open_store(s3)
    fs.pipe({f"{root}/remote.parquet": sink.getvalue(), f"{root}/good.jpg": b"good"})
    web.pages["/good.jpg"] = b"good"
    bucket, _, folder = root.partition("/")
    key = f"{folder}/remote.parquet".lstrip("/")
    (tmp_path / "list.csv").write_text(f"bucket,key\n{bucket},{key}\n")
    refs = list(list_images(tmp_path / "list.csv"))

    def outcomes(reach: Reach, refs: list[ImageRef]) -> list[str]:
        found = []
        for ref in refs:
            try:
                found.append(Fetcher(attempts=1).fetch(ref.uri, offset=ref.offset, reach=reach).decode())
            except ImageError as error:
                found.append(error.status)
        return found

    local = Reach(str(tmp_path / "list.csv"))
    assert outcomes(local, refs) == ["forbidden", "forbidden", "good", "good", "forbidden"]
    assert outcomes(Reach(str(tmp_path / "list.csv"), hosts=("*",)), refs) == [
        "forbidden", SECRET.decode(), "good", "good", "good",
    ]  # fmt: skip
    assert outcomes(Reach(str(tmp_path / "list.csv"), schemes=("file", "s3")), refs)[0] == SECRET.decode()
    (tmp_path / "local.parquet").write_bytes(sink.getvalue())  # which is as good as the list
    here = list(list_images(tmp_path / "local.parquet"))
    assert outcomes(local, here)[:2] == [SECRET.decode()] * 2
    both = Reach("s3://bucket/list.txt").inside(web.uri("/remote.parquet"))
    assert "may not name s3:// addresses" in (both.refusal(f"{s3}/good.jpg") or "")
    assert "not public" in (both.refusal(web.uri("/good.jpg")) or "")  # the list might not name its server either
    assert both.refusal("https://example.org/a.jpg") is None


def test_the_files_of_an_inventory_name_objects_of_buckets_alone(s3: str, tmp_path: Path) -> None:
    bucket, _, folder = s3.removeprefix("s3://").partition("/")
    prefix = f"{folder}/" if folder else ""
    (tmp_path / "manifest.json").write_text(
        f'{{"fileFormat": "Parquet", "fileSchema": "", "destinationBucket": "arn:aws:s3:::{bucket}",'
        f' "files": [{{"key": "{prefix}data.parquet"}}]}}'
    )
    sink = io.BytesIO()
    pq.write_table(pa.table({"path": ["/etc/passwd"], "bucket": [bucket], "key": ["a.jpg"]}), sink)
    fs, root = open_store(s3)
    fs.pipe_file(f"{root}/data.parquet", sink.getvalue())
    with pytest.raises(InputError, match=r"data\.parquet is no file of an S3 Inventory"):
        list(list_images(tmp_path / "manifest.json"))


def test_a_list_on_the_web_reaches_no_bucket_with_our_credentials(web: Site, s3: str) -> None:
    fs, root = open_store(s3)
    fs.pipe_file(f"{root}/a.jpg", b"good")
    assert "may not name s3:// addresses" in refused(f"{s3}/a.jpg", Reach(web.uri("/list.txt")))
    for reach in (Reach(f"{s3}/list.txt"), Reach(web.uri("/list.txt"), schemes=("http", "s3")), Reach("/data/l.txt")):
        assert Fetcher().fetch(f"{s3}/a.jpg", reach=reach) == b"good"


def test_a_list_whose_addresses_are_all_refused_is_one_error(web: Site, tmp_path: Path) -> None:
    rows = [f"file://{tmp_path}/{number}.jpg" for number in range(2000)]
    web.pages["/list.txt"] = "\n".join(rows).encode()
    with pytest.raises(InputError, match=r"no image that http://.*/list.txt names may be read .*--allow-schemes"):
        list_images(web.uri("/list.txt"))
    web.pages["/list.txt"] = "\n".join([*rows[:10], "good.jpg"]).encode()
    assert len(list(list_images(web.uri("/list.txt")))) == 11
    web.pages["/list.txt"] = "\n".join(rows).encode()
    reach = Reach(web.uri("/list.txt"), schemes=("http", "file"))
    assert len(list(list_images(web.uri("/list.txt"), reach=reach))) == 2000


def test_what_is_allowed_for_a_local_list_can_be_narrowed(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(b"good")
    source = str(tmp_path / "list.txt")
    assert Fetcher().fetch(f"{tmp_path}/a.jpg", reach=Reach(source)) == b"good"
    assert "this list may not name local files" in refused(f"{tmp_path}/a.jpg", Reach(source, schemes=("https",)))


def test_an_inventory_on_the_web_opens_no_bucket(web: Site, s3: str) -> None:
    bucket = s3.removeprefix("s3://").partition("/")[0]
    web.pages["/manifest.json"] = (
        f'{{"fileFormat": "CSV", "fileSchema": "Bucket, Key", "destinationBucket": "arn:aws:s3:::{bucket}",'
        ' "files": [{"key": "list.csv"}]}'
    ).encode()
    with pytest.raises(InputError, match=r"list\.csv is not opened: .* may not name s3:// addresses"):
        list_images(web.uri("/manifest.json"))


# -- hosts -----------------------------------------------------------------------------------------------------------

SPELLINGS = [
    "127.0.0.1",
    "localhost",
    "LOCALHOST.",
    "2130706433",
    "0x7f000001",
    "0x7f.1",
    "127.1",
    "0177.0.0.1",
    "0.0.0.0",
    "[::ffff:127.0.0.1]",
    "[::ffff:7f00:1]",
    "images.example",  # which the name server says is 127.0.0.1
    "user:word@127.0.0.1",
]


@pytest.fixture
def name_server(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Names of our own and what they resolve to, for this process."""
    names = {"images.example": "127.0.0.1"}
    ask = socket.getaddrinfo

    def answer(host: Any, *arguments: Any, **options: Any) -> Any:
        return ask(names.get(host, host), *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", answer)
    return names


@pytest.mark.usefixtures("name_server")
@pytest.mark.parametrize("host", SPELLINGS)
def test_a_remote_list_reaches_no_internal_host_however_it_is_spelled(host: str, web: Site, inner: Site) -> None:
    uri = inner.uri("/a.jpg", host)
    assert "a host that is not public; --allow-hosts" in refused(uri, Reach(web.uri("/list.txt")))
    assert "a host that is not public; --allow-hosts" in refused(uri, Reach("s3://bucket/list.txt"))
    assert not inner.requests


def test_nor_by_ipv6(sites: Any, web: Site) -> None:
    try:
        inner = sites("::1")
    except OSError:
        pytest.skip("this machine has no IPv6")
    assert "a host that is not public" in refused(inner.uri("/a.jpg", "[::1]"), Reach(web.uri("/list.txt")))
    assert not inner.requests
    assert Fetcher().fetch(inner.uri("/a.jpg", "[::1]"), reach=Reach("/data/list.txt")) == SECRET


@pytest.mark.parametrize(
    "host",
    ["169.254.169.254", "10.1.2.3", "192.168.0.1", "172.16.0.9", "100.64.0.1", "[fe80::1%25eth0]", "[fd00:ec2::254]",
     "[64:ff9b:1::7f00:1]", "[::ffff:0:127.0.0.1]", "[fec0::1]", "[5f00::1]",
     "[64:ff9b::a9fe:a9fe]", "[2002:a9fe:a9fe::1]", "224.0.0.1", "[ff02::1]", "[::7f00:1]"],
)  # fmt: skip
def test_metadata_services_and_private_networks_are_not_even_asked(host: str) -> None:
    assert "a host that is not public" in refused(f"http://{host}:9/a.jpg", Reach("s3://bucket/list.txt"))


def test_a_name_is_looked_at_anew_at_each_connection(name_server: dict[str, str], web: Site, inner: Site) -> None:
    """A name server may give a public address to whoever checks, and another to whoever connects."""
    answers = iter(["192.0.2.1", "127.0.0.1"])  # of a name that is checked before it is used, the second counts
    name_server["images.example"] = next(answers)
    reach = Reach(web.uri("/list.txt"))
    assert reach.refusal(inner.uri("/a.jpg", "images.example")) is None
    name_server["images.example"] = next(answers)
    assert "a host that is not public" in refused(inner.uri("/a.jpg", "images.example"), reach)
    assert not inner.requests


@pytest.mark.usefixtures("name_server")
def test_internal_hosts_are_reached_where_that_is_allowed(web: Site, inner: Site, tmp_path: Path) -> None:
    uri, named = inner.uri("/a.jpg"), inner.uri("/a.jpg", "images.example")
    port = inner.server_port
    remote = web.uri("/list.txt")
    for given in ("127.0.0.1", "127.0.0.0/8", "*", f"127.0.0.1:{port}"):
        assert Fetcher().fetch(uri, reach=Reach(remote, hosts=(given,))) == SECRET
    for given in ("images.example", "127.0.0.1", f"images.example:{port}"):
        assert Fetcher().fetch(named, reach=Reach(remote, hosts=(given,))) == SECRET
    for given in ("10.0.0.0/8", "example", "127.0.0.1:1"):
        refused(uri, Reach(remote, hosts=(given,)))
    # What the user names, and what a list on the local disk does.
    assert Fetcher().fetch(uri) == SECRET
    assert Fetcher().fetch(named, reach=Reach(str(tmp_path / "list.txt"))) == SECRET
    refused(named, Reach(str(tmp_path / "list.txt"), hosts=()))
    # The server that the list itself is on.
    assert Fetcher().fetch(web.uri("/a.jpg"), reach=Reach(remote)) == SECRET


# -- redirects -------------------------------------------------------------------------------------------------------


def test_redirects_lead_to_no_other_internal_host(web: Site, inner: Site) -> None:
    web.pages |= {"/moved.jpg": inner.uri("/a.jpg"), "/here.jpg": "/a.jpg"}
    assert Fetcher().fetch(web.uri("/here.jpg"), reach=Reach(web.uri("/list.txt"))) == SECRET
    assert "a host that is not public" in refused(web.uri("/moved.jpg"), Reach(web.uri("/list.txt")))
    assert not inner.requests
    allowed = Reach(web.uri("/list.txt"), hosts=(f"127.0.0.1:{inner.server_port}",))
    assert Fetcher().fetch(web.uri("/moved.jpg"), reach=allowed) == SECRET


def test_redirects_from_a_public_host_lead_to_no_internal_one_whoever_named_it(
    web: Site, inner: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loopback stands for the public internet here, which no test may use: only 127.0.0.2 counts as internal."""
    monkeypatch.setattr("ovss_ray.images.guard.is_internal", lambda address: str(address) == "127.0.0.2")
    monkeypatch.setattr("ovss_ray.images.reach.is_internal", lambda address: str(address) == "127.0.0.2")
    web.pages["/moved.jpg"] = "http://127.0.0.2:9/a.jpg"
    for reach in (Reach(), Reach("/data/list.txt"), Reach("s3://bucket/list.txt")):
        assert "a host that is not public" in refused(web.uri("/moved.jpg"), reach)
    web.pages["/on.jpg"] = inner.uri("/a.jpg")
    assert Fetcher().fetch(web.uri("/on.jpg"), reach=Reach("s3://bucket/list.txt")) == SECRET


@pytest.fixture
def second_internal(sites: Any, monkeypatch: pytest.MonkeyPatch) -> Site:
    """A server on 127.0.0.2, which alone counts as internal: the rest of the loopback stands for the internet."""
    for place in ("guard", "reach"):
        monkeypatch.setattr(f"ovss_ray.images.{place}.is_internal", lambda address: str(address) == "127.0.0.2")
    try:
        site: Site = sites("127.0.0.2")
    except OSError:
        pytest.skip("this machine has one loopback address")
    return site


@pytest.mark.parametrize("port", ["+{}", "0_{}", " {}", "fullwidth"])
def test_redirects_are_read_as_the_client_reads_them(port: str, web: Site, second_internal: Site) -> None:
    number = str(second_internal.server_port)
    wide = "".join(chr(0xFF10 + int(digit)) for digit in number)
    spelled = wide if port == "fullwidth" else port.format(number)
    web.pages["/moved.jpg"] = f"http://127.0.0.2:{spelled}/a.jpg".encode().decode("latin-1")  # as headers are sent
    assert "a host that is not public" in refused(web.uri("/moved.jpg"), Reach("/data/list.txt"))
    assert not second_internal.requests


def test_redirects_use_no_connection_that_the_list_itself_has_opened(web: Site, second_internal: Site) -> None:
    wide = "１２７.0.0.2".encode().decode("latin-1")
    web.pages["/moved.jpg"] = second_internal.uri("/a.jpg", wide)
    fetcher = Fetcher(attempts=1)
    reach = Reach("/data/list.txt")
    assert fetcher.fetch(second_internal.uri("/a.jpg", "127.0.0.2"), reach=reach) == SECRET
    with pytest.raises(ImageError, match="a host that is not public"):
        fetcher.fetch(web.uri("/moved.jpg"), reach=reach)
    assert second_internal.requests == {"/a.jpg": 1}


def test_names_that_are_not_ascii_are_compared_as_name_servers_are_asked(
    web: Site, inner: Site, name_server: dict[str, str]
) -> None:
    name_server["xn--bcher-kva.example"] = "127.0.0.1"
    spec = JobSpec.build({**JOB, "allow_hosts": f"Bücher.example:{inner.server_port}"}, source="job")
    reach = Reach(web.uri("/list.txt"), hosts=spec.allow_hosts)
    assert Fetcher().fetch(inner.uri("/a.jpg", "bücher.example"), reach=reach) == SECRET
    assert "not public" in refused(inner.uri("/a.jpg", "bücher.example"), Reach(web.uri("/list.txt")))


# -- proxies ---------------------------------------------------------------------------------------------------------

PROXIED = {"http": {"client_kwargs": {"trust_env": True}}}


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment without proxies."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.usefixtures("name_server", "no_proxy")
@pytest.mark.parametrize("spared", [False, True])
def test_connections_that_go_past_the_proxy_are_checked(
    spared: bool, web: Site, inner: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    if spared:
        monkeypatch.setenv("http_proxy", web.uri(""))
        monkeypatch.setenv("no_proxy", "images.example")
    with pytest.raises(ImageError, match="a host that is not public"):
        Fetcher(PROXIED, attempts=1).fetch(inner.uri("/a.jpg", "images.example"), reach=Reach("s3://bucket/list.txt"))
    assert not inner.requests
    assert not web.requests


@pytest.mark.usefixtures("name_server", "no_proxy")
@pytest.mark.parametrize("named", ["by the environment", "by the options"])
def test_a_proxy_may_be_internal_and_what_is_asked_of_it_may_not(
    named: str, web: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PROXIED if named == "by the environment" else {"http": {"client_kwargs": {"proxy": web.uri("")}}}
    if named == "by the environment":
        monkeypatch.setenv("http_proxy", web.uri(""))
    web.pages["http://public.example/a.jpg"] = b"good"
    web.pages["http://public.example/moved.jpg"] = "http://10.0.0.1/b.jpg"
    web.pages["http://public.example/wide.jpg"] = "http://１０.0.0.1:+80/b.jpg".encode().decode("latin-1")
    fetcher, reach = Fetcher(options, attempts=1), Reach("s3://bucket/list.txt")
    assert fetcher.fetch("http://public.example/a.jpg", reach=reach) == b"good"
    for uri in ("http://public.example/moved.jpg", "http://public.example/wide.jpg", "http://10.0.0.1/b.jpg"):
        with pytest.raises(ImageError, match="a host that is not public"):
            fetcher.fetch(uri, reach=reach)
    assert not [path for path in web.requests if "10.0.0.1" in path]
    with pytest.raises(ImageError, match="a host that is not public"):  # the proxy is no host of the list
        Fetcher(attempts=1).fetch(web.uri("/a.jpg"), reach=reach)


def test_a_connector_that_would_not_be_checked_is_refused(web: Site) -> None:
    options = {"http": {"client_kwargs": {"connector": object()}}}
    with pytest.raises(ImageError, match="cannot hold a connector"):
        Fetcher(options, attempts=1).fetch(web.uri("/a.jpg"))


@pytest.mark.parametrize("place", ["file:///etc/passwd", "s3://bucket/a.jpg", "ftp://127.0.0.1/a.jpg", "data:,x"])
def test_redirects_lead_to_no_other_protocol(place: str, web: Site) -> None:
    web.pages["/moved.jpg"] = place
    with pytest.raises(ImageError) as caught:
        Fetcher(sleep=lambda _: None).fetch(web.uri("/moved.jpg"))
    assert caught.value.status == "fetch_failed"
    assert caught.value.reason == "it is redirected without end, or to what is no web address"
    assert web.requests == {"/moved.jpg": 1}


def test_redirects_end(web: Site) -> None:
    web.pages["/round.jpg"] = "/round.jpg"
    with pytest.raises(ImageError, match="redirected without end"):
        Fetcher(sleep=lambda _: None).fetch(web.uri("/round.jpg"))
    assert web.requests["/round.jpg"] <= 10


def test_a_list_that_is_redirected_to_an_internal_host_is_not_read(
    web: Site, inner: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ovss_ray.images.guard.is_internal", lambda address: str(address) == "127.0.0.2")
    web.pages["/list.txt"] = "http://127.0.0.2:9/list.txt"
    with pytest.raises(InputError, match="a host that is not public"):
        list_images(web.uri("/list.txt"))


# -- nothing that was fetched is written down -------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 418, 500, 503, 599])
def test_what_a_server_says_is_not_quoted(status: int, web: Site) -> None:
    web.pages["/a.jpg"] = status
    with pytest.raises(ImageError, match=f"{status}|no such file") as caught:
        Fetcher(attempts=1).fetch(web.uri("/a.jpg"))
    assert not _quotes(caught.value.reason)


def test_what_is_no_web_server_is_not_quoted() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(1000)
                connection.sendall(SECRET + b"\r\n" + SECRET + b"\r\n\r\n")

        threading.Thread(target=answer, daemon=True).start()
        with pytest.raises(ImageError) as caught:
            Fetcher(attempts=1).fetch(f"http://127.0.0.1:{server.getsockname()[1]}/a.jpg")
    assert caught.value.status == "fetch_failed"
    assert not _quotes(caught.value.reason)


@pytest.mark.usefixtures("s3")
def test_what_a_bucket_says_is_not_quoted(web: Site) -> None:
    web.pages |= {"/bucket/a.jpg": 400, "/bucket/b.jpg": 500}
    fetcher = Fetcher({"s3": {"endpoint_url": web.uri("")}}, attempts=1)
    for uri in ("s3://bucket/a.jpg", "s3://bucket/b.jpg"):
        with pytest.raises(ImageError) as caught:
            fetcher.fetch(uri)
        assert not _quotes(caught.value.reason)


@pytest.mark.usefixtures("s3")
@pytest.mark.parametrize("code", ["PreconditionFailed", "AccessDenied", "NoSuchKey", "InvalidRequest", "Unheard"])
def test_what_a_bucket_explains_is_not_quoted(code: str, web: Site) -> None:
    """The driver makes errors of the system of some codes, with the server's words for theirs."""
    web.pages["/bucket/a.jpg"] = (
        412,
        f"<Error><Code>{code}</Code><Message>{SECRET.decode()}</Message></Error>".encode(),
    )
    with pytest.raises(ImageError) as caught:
        Fetcher({"s3": {"endpoint_url": web.uri("")}}, attempts=1).fetch("s3://bucket/a.jpg")
    assert not _quotes(caught.value.reason)
    assert f"the server answers 412 (Precondition Failed, {code})" in caught.value.reason


@pytest.mark.parametrize("data", [SECRET, b"\x93" + SECRET, b"{" + SECRET, bytes(range(128, 255)) + SECRET, b"GIF9"])
def test_what_is_no_image_is_not_quoted(data: bytes) -> None:
    with pytest.raises(ImageError) as caught:
        decode_image(data)
    assert not _quotes(caught.value.reason)
    assert data[:8].hex(" ") not in caught.value.reason


def _quotes(reason: str) -> bool:
    return any(part in reason for part in ("root", "password", "swordfish", SECRET[:8].hex(" ")))


# -- as settings -----------------------------------------------------------------------------------------------------

JOB = {"input": "photos", "run": "run", "classes": "cat,dog"}


def test_the_settings_take_lists_and_texts() -> None:
    given = {"allow_schemes": "S3, https://", "allow_hosts": ["Images.Corp.", "10.1.0.0/16"]}
    spec = JobSpec.build({**JOB, **given}, source="job")
    assert (spec.allow_schemes, spec.allow_hosts) == (("s3", "https"), ("images.corp", "10.1.0.0/16"))
    assert JobSpec.build({**JOB, "allow_hosts": ""}, source="job").allow_hosts == ()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"allow_schemes": "htps"}, "'htps' is no protocol.*did you mean 'https'"),
        ({"allow_hosts": "http://nas"}, "'http://nas' is no host; write names"),
        ({"allow_hosts": "10.0.0.0/99"}, "is no host"),
    ],
)
def test_wrong_settings_are_explained(values: dict[str, str], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        JobSpec.build({**JOB, **values}, source="job")


def test_a_picture_is_still_a_picture(web: Site) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (3, 2), "red").save(buffer, "PNG")
    web.pages["/p.png"] = buffer.getvalue()
    pixels = decode_image(Fetcher().fetch(web.uri("/p.png"), reach=Reach(web.uri("/list.txt"))))
    assert pixels.shape == (2, 3, 3)
