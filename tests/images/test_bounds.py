"""Images without end, and small files that unpack to large ones: `too_large`, within a bound of memory."""

from __future__ import annotations

import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import textwrap
import threading
import time
import tracemalloc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from image_files import tiled_tiff

from ovss_ray.errors import ImageError, InputError
from ovss_ray.images import Fetcher, list_images, open_store
from ovss_ray.images.decoding import decode_image, read_header
from ovss_ray.images.row_groups import RowGroups
from tests.images.conftest import RangeServer, fetch, tar_of
from tests.images.endless import TOTAL, EndlessServer, endless_server, packed

MIB = 1 << 20
LIMIT = 32 * MIB

FETCH = """
    import json, resource, sys
    from ovss_ray.errors import ImageError
    from ovss_ray.images import Fetcher, list_images

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    asked = json.load(sys.stdin)
    fetcher = Fetcher(asked["options"], attempts=3, timeout_s=60, max_bytes=asked["limit"], sleep=lambda _: None)
    try:
        fetcher.fetch(asked["warm_up"])  # what the driver itself takes does not count
    except ImageError:
        pass
    before, found = peak(), []
    for uri, offset in asked["uris"]:
        try:
            fetcher.fetch(uri, None, offset)
        except ImageError as error:
            found.append([error.status, error.reason])
        else:
            found.append(["ok", ""])
    json.dump({"found": found, "grown": peak() - before}, sys.stdout)
"""


def fetched_apart(
    uris: list[tuple[str, int | None]], warm_up: str, options: dict[str, Any] | None = None
) -> tuple[list[list[str]], int]:
    """Status and reason of each image, and by how many bytes the peak of a process that fetches them grew."""
    asked = {"uris": uris, "warm_up": warm_up, "options": options or {}, "limit": LIMIT}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FETCH)], input=json.dumps(asked), capture_output=True, text=True,
        timeout=120, check=True,
    )  # fmt: skip
    reply = json.loads(done.stdout)
    return reply["found"], reply["grown"]


@pytest.fixture
def endless() -> Iterator[EndlessServer]:
    with endless_server() as server:
        yield server


def test_streams_without_end_from_the_web(endless: EndlessServer) -> None:
    kinds = ("chunked", "until-closed", "gzip", "declared")
    found, grown = fetched_apart([(f"{endless.url}/{kind}", None) for kind in kinds], f"{endless.url}/warm/declared")
    assert [status for status, _ in found] == ["too_large"] * 4
    assert [reason for _, reason in found[:3]] == [f"more bytes than the limit of {LIMIT} bytes"] * 3
    assert found[3][1] == f"{TOTAL} bytes, over the limit of {LIMIT} bytes"
    assert endless.requests == {"chunked": 1, "until-closed": 1, "gzip": 1, "declared": 2}
    assert grown < 3 * LIMIT


@pytest.mark.usefixtures("s3")
def test_streams_without_end_from_s3(endless: EndlessServer) -> None:
    options = {"s3": {"endpoint_url": endless.url}}
    kinds = ("chunked", "gzip", "declared")
    uris = [(f"s3://bucket/{kind}.jpg", None) for kind in kinds]
    found, grown = fetched_apart(uris, "s3://bucket/warm/declared.jpg", options)
    assert [status for status, _ in found] == ["too_large"] * 3
    assert endless.requests == {"chunked": 1, "gzip": 1, "declared": 2}
    assert grown < 3 * LIMIT


def test_streams_without_end_from_google(endless: EndlessServer) -> None:
    pytest.importorskip("gcsfs")
    options = {"gs": {"endpoint_url": endless.url, "token": "anon"}}
    uris = [(f"gs://bucket/{kind}.jpg", None) for kind in ("chunked", "gzip", "declared")]
    found, grown = fetched_apart(uris, "gs://bucket/warm/declared.jpg", options)
    assert [status for status, _ in found] == ["too_large"] * 3
    assert grown < 3 * LIMIT


def test_blobs_of_azure_that_are_too_large(endless: EndlessServer) -> None:
    pytest.importorskip("adlfs")
    key = (
        "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="  # of every emulator
    )
    connection = (
        "DefaultEndpointsProtocol=http;AccountName=devstoreaccount1;"
        f"AccountKey={key};BlobEndpoint={endless.url}/devstoreaccount1;"
    )
    options = {"az": {"connection_string": connection, "account_name": "devstoreaccount1"}}
    found, grown = fetched_apart([("az://box/declared.jpg", None)], "az://box/warm/declared.jpg", options)
    assert found == [["too_large", f"{TOTAL} bytes, over the limit of {LIMIT} bytes"]]
    assert grown < 4 * LIMIT  # the driver reads 32 MiB before it tells anything


def test_an_object_that_is_stored_packed_counts_unpacked(s3: str, tmp_path: Path) -> None:
    fs, root = open_store(s3)
    (tmp_path / "bomb").write_bytes(b"".join(packed()))
    assert (tmp_path / "bomb").stat().st_size < LIMIT
    fs.put_file(str(tmp_path / "bomb"), f"{root}/bomb.jpg", ContentEncoding="gzip")
    fs.pipe_file(f"{root}/sound.jpg", gzip.compress(b"an image"), ContentEncoding="gzip")
    found, grown = fetched_apart([(f"{s3}/bomb.jpg", None), (f"{s3}/sound.jpg", None)], f"{s3}/none.jpg")
    assert found == [["too_large", f"more bytes than the limit of {LIMIT} bytes"], ["ok", ""]]
    assert grown < 3 * LIMIT
    (sound,) = (ref for ref in list_images(s3) if "sound" in ref.uri)
    assert fetch(Fetcher(), sound) == b"an image"


def test_files_without_end_on_a_disk(tmp_path: Path) -> None:
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(TOTAL)
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "zero.jpg").symlink_to("/dev/zero")
    found, grown = fetched_apart(
        [(str(tmp_path / name), None) for name in ("sparse.jpg", "pipe.jpg", "zero.jpg")], str(tmp_path / "none.jpg")
    )
    assert [status for status, _ in found] == ["too_large", "not_found", "not_found"]
    assert grown < LIMIT


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    """Files of the kernel say that they have no bytes."""
    status = Path("/proc/self/status")
    assert b"Name:" in Fetcher().fetch(str(status))
    with pytest.raises(ImageError, match="more bytes than the limit of 20 bytes"):
        Fetcher(max_bytes=20).fetch(str(status))


def test_cells_of_parquet_files(tmp_path: Path) -> None:
    """Twenty rows that share one value of 40 MiB: a file of a few kilobytes, 800 MiB when it is unpacked at once."""
    large = pa.DictionaryArray.from_arrays(pa.array([0] * 20 + [1]), pa.array([bytes(40 * MIB), b"small"]))
    file = tmp_path / "a.parquet"
    pq.write_table(
        pa.table({"image": large}), file, compression="zstd", dictionary_pagesize_limit=TOTAL, store_schema=False
    )
    assert file.stat().st_size < MIB
    uris = [(f"parquet://image/{row}::{file}", row) for row in (0, 19, 20)]
    found, grown = fetched_apart(uris, str(tmp_path / "none.jpg"))
    assert [status for status, _ in found] == ["too_large", "too_large", "ok"]
    assert f"over the limit of {LIMIT} bytes" in found[0][1]
    assert grown < 400 * MIB


def test_a_server_that_ignores_the_range_of_a_member(endless: EndlessServer) -> None:
    found, grown = fetched_apart(
        [(f"parquet://image/0::{endless.url}/{kind}.parquet", 0) for kind in ("declared", "chunked")],
        f"{endless.url}/warm/declared",
    )
    assert [status for status, _ in found] == ["fetch_failed"] * 2
    assert "ignores byte ranges" in found[0][1]
    assert grown < LIMIT


# What the listing reads.


def test_a_list_whose_line_has_no_end(tmp_path: Path, endless: EndlessServer) -> None:
    for name in ("a.txt.gz", "a.csv.gz", "a.jsonl.gz"):
        (tmp_path / name).write_bytes(b"".join(packed(b"x")))
        with pytest.raises(InputError, match=r"line 1 of .* is longer than 16777216 characters"):
            list(list_images(tmp_path / name))


def test_an_inventory_without_end(endless: EndlessServer) -> None:
    with pytest.raises(InputError, match="more than 67108864 bytes"):
        list(list_images(f"{endless.url}/chunked/manifest.json"))


@pytest.mark.parametrize("kind", ["long name", "pax", "pax of all", "pax of all, one by one"])
def test_the_headers_of_a_tar_are_bounded(kind: str, tmp_path: Path) -> None:
    formats = {"long name": tarfile.GNU_FORMAT}
    with tarfile.open(tmp_path / "a.tar", "w", format=formats.get(kind, tarfile.PAX_FORMAT)) as file:
        file.addfile(tarfile.TarInfo("a.jpg"))
        info = tarfile.TarInfo("b" * (64 * MIB) if kind == "long name" else "b")
        info.pax_headers = {"comment": "x" * (64 * MIB)} if kind == "pax" else {}
        for number in range(4) if "of all" in kind else ():
            told = {f"comment{number}": "x" * ((MIB >> 1) if "one by one" in kind else 2 * MIB)}
            file.fileobj.write(info.create_pax_global_header(told))  # type: ignore[union-attr]
            file.fileobj.write(tarfile.TarInfo(f"{number}.jpg").tobuf())  # type: ignore[union-attr]
        file.addfile(info)
    tracemalloc.start()
    with pytest.raises(InputError, match=r"a\.tar has headers of more than 1048576 bytes at byte \d+"):
        list(list_images(tmp_path / "a.tar"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 * MIB


def test_headers_within_headers_are_damage(tmp_path: Path) -> None:
    info = tarfile.TarInfo("a.jpg")
    info.pax_headers = {"path": "b.jpg"}
    header = info.tobuf(tarfile.PAX_FORMAT)[:1024]
    (tmp_path / "a.tar").write_bytes(header * 1000 + tarfile.TarInfo("a.jpg").tobuf() + bytes(1024))
    with pytest.raises(InputError, match=r"a\.tar is not a tar, or damaged at its beginning"):
        list_images(tmp_path / "a.tar")
    (tmp_path / "a.tar").write_bytes(tarfile.TarInfo("b.jpg").tobuf() + (tmp_path / "a.tar").read_bytes())
    with pytest.raises(InputError, match=r"a\.tar is damaged: no header at byte 512"):
        list(list_images(tmp_path / "a.tar"))


def test_row_groups_are_read_within_a_bound(tmp_path: Path) -> None:
    """However many threads ask for them; groups that take more than it are read one by one."""
    rng = np.random.default_rng(0)
    cells = [rng.bytes(100_000) for _ in range(32)]
    pq.write_table(pa.table({"image": pa.array(cells, pa.binary())}), tmp_path / "a.parquet", row_group_size=1)
    lock, here, most = threading.Lock(), [0], [0]

    class Slow(io.FileIO):
        def read(self, size: int = -1) -> bytes:  # type: ignore[override]
            with lock:
                here[0] += 1
                most[0] = max(most[0], here[0])
            time.sleep(0.005)
            with lock:
                here[0] -= 1
            return super().read(size)

    for kept_bytes, bound in ((150_000, 1), (850_000, 4)):
        groups = RowGroups(
            lambda *_: lambda: Slow(tmp_path / "a.parquet"), max_bytes=LIMIT, kept_bytes=kept_bytes
        )  # fmt: skip
        assert groups.cell("a.parquet", "image", 0).data == cells[0]  # and the footer
        most[0] = 0
        with ThreadPoolExecutor(16) as pool:
            read = pool.map(partial(groups.cell, "a.parquet", "image"), range(32))
        assert [cell.data for cell in read] == cells
        assert most[0] <= bound


def test_what_lies_beside_an_image_is_bounded(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    with tarfile.open(tar, "w") as file:
        info = tarfile.TarInfo("0.json")
        info.size = 17 * MIB
        file.addfile(info, io.BytesIO(b'{"caption": "' + b"x" * (17 * MIB - 15) + b'"}'))
        file.addfile(tarfile.TarInfo("0.jpg"))
    with pytest.raises(InputError, match=r"0\.json in .* has 17825792 bytes, over the limit of 16777216"):
        list(list_images(tar, keep_columns=["caption"]))
    assert len(list(list_images(tar))) == 1


def test_a_member_over_the_limit_is_not_read(range_server: RangeServer) -> None:
    (range_server.folder / "a.tar").write_bytes(tar_of([("small.jpg", bytes(100)), ("large.jpg", bytes(5000))]))
    small, large = list_images(f"{range_server.uri}/a.tar")
    range_server.requests = 0
    fetcher = Fetcher(max_bytes=1000)
    assert fetch(fetcher, small) == bytes(100)
    with pytest.raises(ImageError, match="5000 bytes, over the limit of 1000 bytes") as caught:
        fetch(fetcher, large)
    assert (caught.value.status, range_server.requests) == ("too_large", 1)


# -- tiles larger than their image -------------------------------------------------------------------------------------

CORNER = np.arange(256, dtype=np.uint8).reshape(16, 16)


@pytest.mark.parametrize(("order", "big"), [("<", False), (">", False), ("<", True)])
def test_a_tile_counts_whole_however_little_of_it_is_in_the_image(order: str, big: bool) -> None:
    header = read_header(tiled_tiff(CORNER, (2048, 1024), order, big=big))
    assert (header.width, header.height) == (16, 16)
    assert 2 * MIB <= header.decode_bytes < 3 * MIB
    assert (header.decode()[..., 0] == CORNER).all()


def test_a_tile_over_the_limit_of_pixels_is_refused() -> None:
    data = tiled_tiff(CORNER, (16384, 8192))
    assert len(data) < MIB
    with pytest.raises(ImageError, match="a tile of 16384 x 8192 pixels, over the limit of 100000000") as caught:
        read_header(data)
    assert caught.value.status == "too_large"
    assert read_header(data, max_pixels=16384 * 8192).decode_bytes > 128 * MIB
    assert decode_image(tiled_tiff(CORNER, (512, 512)), max_pixels=256).shape == (16, 16, 3)  # nothing unusual


@pytest.mark.parametrize("kind", [4, 17])  # of which libraries take the first, and one that only libtiff knows
def test_a_tile_of_two_sizes_is_damage(kind: int) -> None:
    with pytest.raises(ImageError, match="the size of its tiles is missing or ambiguous") as caught:
        read_header(tiled_tiff(CORNER, (512, 512), big=True, entries_before=((322, kind, 16384),)))
    assert caught.value.status == "corrupt"
