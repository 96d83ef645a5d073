"""Files that change between planning and reading, or while they are read: never another image's content."""

from __future__ import annotations

import hashlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovss_ray.errors import ImageError
from ovss_ray.images import Fetcher, ImageRef, list_images, open_store
from tests.faults import FaultyEndpoint
from tests.images.conftest import FORMATS, Place, RangeServer, content, fetch, tar_of

NAMES = {
    "short": "{}.jpg",
    "prefixed": "a-folder/" * 15 + "{}.jpg",
    "very long": "a-folder-with-a-long-name/" * 20 + "{}.jpg",
    "not ASCII": "ä b/{}.jpg",
}


def parquet_of(numbers: list[int], rows_together: int = 2) -> bytes:
    sink = io.BytesIO()
    data = [content(number) for number in numbers]
    pq.write_table(
        pa.table({"image": data, "caption": [f"no. {number}" for number in numbers]}), sink,
        row_group_size=rows_together, use_dictionary=False, compression="none",
    )  # fmt: skip
    return sink.getvalue()


TAR, TURNED_TAR = (tar_of([(f"{n}.jpg", content(n)) for n in order]) for order in ((0, 1, 2, 3), (3, 2, 1, 0)))
PARQUET, TURNED_PARQUET = parquet_of([0, 1, 2, 3]), parquet_of([3, 2, 1, 0])


def refused(fetcher: Fetcher, ref: ImageRef) -> str:
    with pytest.raises(ImageError, match="changed since it was planned") as caught:
        fetch(fetcher, ref)
    assert caught.value.status == "fetch_failed"
    return caught.value.reason


@pytest.fixture
def waits() -> list[float]:
    return []


@pytest.fixture
def fetcher(waits: list[float]) -> Fetcher:
    return Fetcher(attempts=3, timeout_s=10, sleep=waits.append)


@pytest.mark.parametrize(
    ("name", "before", "after"), [("a.tar", TAR, TURNED_TAR), ("a.parquet", PARQUET, TURNED_PARQUET)]
)
def test_containers_whose_images_changed_places(
    name: str, before: bytes, after: bytes, place: Place, fetcher: Fetcher, waits: list[float]
) -> None:
    refs = place.planned(name, before)
    assert [fetch(Fetcher(), ref) for ref in refs] == [content(number) for number in range(4)]
    place.put(name, after)
    for ref in refs:
        refused(fetcher, ref)
    assert waits == []
    anew = list(list_images(f"{place.uri}/{name}"))
    assert sorted(fetch(fetcher, ref) for ref in anew) == sorted(content(number) for number in range(4))


@pytest.mark.parametrize("size", [1500, 2500])
def test_single_images_that_were_replaced(size: int, place: Place, fetcher: Fetcher, waits: list[float]) -> None:
    (ref,) = place.planned("a.jpg", content(1))
    assert fetch(fetcher, ref) == content(1)
    place.put("a.jpg", content(2, size))
    if ref.size_bytes is None and ref.etag is None:  # a local image, which planning does not look at
        assert fetch(fetcher, ref) == content(2, size)
        ref = replace(ref, size_bytes=2000)
    refused(fetcher, ref)
    assert waits == []


def test_objects_of_the_same_size_are_told_apart_with_one_request_each(
    s3: str, s3_endpoint: str, fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, root = open_store(s3)
    fs.pipe({f"{root}/p/{number}.jpg": content(number) for number in range(4)})
    refs = list(list_images(f"{s3}/p"))
    fs.pipe_file(f"{root}/p/2.jpg", content(9))
    with FaultyEndpoint(s3_endpoint) as endpoint:
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint.url)
        assert [fetch(fetcher, refs[number]) for number in (0, 1, 3)] == [content(number) for number in (0, 1, 3)]
        assert "ETag" in refused(fetcher, refs[2])
        assert [request.method for request in endpoint.requests] == ["GET"] * 4


@pytest.mark.parametrize(
    ("format", "kind"), [(f, k) for f in FORMATS for k in NAMES if (f, k) != ("ustar", "very long")]
)
def test_names_in_tars_are_compared_where_nothing_else_differs(format: str, kind: str, tmp_path: Path) -> None:
    first, second = (NAMES[kind].format(number) for number in (1, 2))
    tar = tmp_path / "a.tar"
    tar.write_bytes(tar_of([(first, content(1)), (second, content(2))], format))
    refs = [replace(ref, etag=None) for ref in list_images(tar)]
    assert [fetch(Fetcher(), ref) for ref in refs] == [content(1), content(2)]
    tar.write_bytes(tar_of([(second, content(2)), (first, content(1))], format))
    for ref, name in zip(refs, ("2.jpg", "1.jpg"), strict=True):
        assert f"{name}' where" in refused(Fetcher(), ref)


def test_names_and_marks_that_were_not_planned_are_not_asked_for(tmp_path: Path) -> None:
    """Runs that were planned before the manifest knew the length of headers."""
    tar = tmp_path / "a.tar"
    tar.write_bytes(tar_of([(NAMES["very long"].format(n), content(n)) for n in range(2)]))
    refs = [replace(ref, etag=None, header_bytes=None) for ref in list_images(tar)]
    assert [fetch(Fetcher(), ref) for ref in refs] == [content(0), content(1)]
    tar.write_bytes(tar_of([("other.txt", b"x" * 1700), *[(f"{n}.jpg", content(n)) for n in range(2)]]))
    assert "no file of 2000 bytes" in refused(Fetcher(), refs[0])


def test_a_tar_that_became_shorter(place: Place, fetcher: Fetcher, waits: list[float]) -> None:
    refs = [replace(ref, etag=None) for ref in place.planned("a.tar", TAR)]
    place.put("a.tar", TAR[: refs[1].offset])
    assert fetch(fetcher, refs[0]) == content(0)
    assert re.search(r"at least \d+ bytes then, (\d+|fewer) now", refused(fetcher, refs[1]))
    assert re.search(r"at least \d+ bytes then, (\d+|fewer) now", refused(fetcher, refs[3]))
    assert waits == []


def test_a_tar_that_is_gone(place: Place, tmp_path: Path, fetcher: Fetcher) -> None:
    refs = place.planned("a.tar", TAR)
    fs, path = open_store(f"{place.uri}/a.tar")
    if place.uri.startswith("http"):
        (tmp_path / "served" / "a.tar").unlink()
    else:
        fs.rm_file(path)
    with pytest.raises(ImageError) as caught:
        fetch(fetcher, refs[0])
    assert caught.value.status == "not_found"


# While a run reads it.


def test_a_parquet_file_that_changes_between_two_row_groups(place: Place, fetcher: Fetcher) -> None:
    refs = place.planned("a.parquet", PARQUET)
    assert fetch(fetcher, refs[0]) == content(0)
    place.put("a.parquet", TURNED_PARQUET)
    assert fetch(fetcher, refs[1]) == content(1)  # was read with the first
    refused(fetcher, refs[2])


def test_a_parquet_file_whose_version_was_not_planned_is_one_version_for_a_worker(place: Place) -> None:
    refs = [replace(ref, etag=None) for ref in place.planned("a.parquet", PARQUET)]
    fetcher = Fetcher(attempts=1)
    assert fetch(fetcher, refs[0]) == content(0)
    place.put("a.parquet", TURNED_PARQUET)
    refused(fetcher, refs[2])


def test_a_tar_that_changes_between_two_images(place: Place, fetcher: Fetcher) -> None:
    refs = place.planned("a.tar", TAR)
    assert fetch(fetcher, refs[0]) == content(0)
    place.put("a.tar", TURNED_TAR)
    refused(fetcher, refs[1])


def test_a_local_file_that_is_written_over_in_place(tmp_path: Path, fetcher: Fetcher) -> None:
    tar = tmp_path / "a.tar"
    tar.write_bytes(TAR)
    refs = list(list_images(tar))
    with tar.open("r+b") as file:
        file.seek(refs[1].offset or 0)
        file.write(content(7))
    assert "last modified" in refused(fetcher, refs[1])


# Tags of every kind.


@pytest.mark.parametrize("planned", ['"{}"', "{}", 'W/"{}"', ' "{}" '])
def test_tags_in_lists_are_compared_however_they_are_written(
    planned: str, range_server: RangeServer, tmp_path: Path, fetcher: Fetcher
) -> None:
    (range_server.folder / "a.jpg").write_bytes(content(1))
    tag = planned.format(hashlib.md5(content(1)).hexdigest()).replace('"', '""')
    (tmp_path / "list.csv").write_text(f'url,etag\n{range_server.uri}/a.jpg,"{tag}"\n')
    (ref,) = list_images(tmp_path / "list.csv")
    for range_server.etags in ("strong", "weak", "none"):
        assert fetch(fetcher, ref) == content(1)
    range_server.etags = "strong"
    (range_server.folder / "a.jpg").write_bytes(content(2))
    refused(fetcher, ref)


def test_multipart_tags(s3: str, fetcher: Fetcher) -> None:
    fs, root = open_store(s3)
    big = content(1, 11 << 20)
    with fs.open(f"{root}/a.jpg", "wb", block_size=5 << 20) as file:
        file.write(big)
    (ref,) = list_images(f"{s3}/a.jpg")
    assert "-" in (ref.etag or "")
    assert fetch(fetcher, ref) == big
    fs.pipe_file(f"{root}/a.jpg", big[:-1] + b"x")
    refused(fetcher, ref)
