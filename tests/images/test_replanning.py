"""Images that were planned once and are looked up again, as a retry does."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovss_ray.errors import ImageError
from ovss_ray.images import Fetcher, ImageRef, list_images
from ovss_ray.images.references import Wanted
from ovss_ray.images.replanning import look_up_again
from tests.images.conftest import Place, RangeServer, content, fetch, tar_of

FETCHER = Fetcher(attempts=1, timeout_s=10)


def again(refs: list[ImageRef], *keep: str) -> list[ImageRef]:
    found = list(look_up_again(enumerate(refs), FETCHER, lambda _: Wanted.of(["jpg"], None, None, keep)))
    assert [image_id for image_id, _ in found] == list(range(len(refs)))
    assert [ref.uri for _, ref in found] == [ref.uri for ref in refs]
    return [ref for _, ref in found]


def status_of(ref: ImageRef) -> str:
    with pytest.raises(ImageError) as caught:
        fetch(FETCHER, ref)
    return caught.value.status


def test_members_of_a_tar_are_found_by_their_names(place: Place) -> None:
    refs = place.planned("a.tar", tar_of([(f"{n}.jpg", content(n)) for n in range(5)]))
    assert again(refs) == refs
    turned = [("new.jpg", b"new"), *((f"{n}.jpg", content(10 + n, 100 + n)) for n in (4, 1, 0, 2))]
    place.put("a.tar", tar_of(turned))
    found = again(refs)
    assert [fetch(FETCHER, found[n]) for n in (0, 1, 2, 4)] == [content(10 + n, 100 + n) for n in (0, 1, 2, 4)]
    assert status_of(found[3]) == "not_found"


def test_images_in_parquet_files_are_found_by_their_rows_with_what_is_kept(tmp_path: Path) -> None:
    def write(numbers: list[int]) -> None:
        columns = {"image": [content(n) for n in numbers], "caption": [f"no. {n}" for n in numbers]}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")

    write([0, 1, 2])
    refs = list(list_images(tmp_path / "a.parquet", keep_columns=["caption"]))
    write([2, 1])
    found = again(refs, "caption")
    assert [(fetch(FETCHER, ref), ref.extra) for ref in found[:2]] == [
        (content(2), '{"caption":"no. 2"}'),
        (content(1), '{"caption":"no. 1"}'),
    ]
    assert status_of(found[2]) == "not_found"


def test_objects_that_were_replaced(place: Place) -> None:
    (ref,) = place.planned("a.jpg", content(1))
    for size in (10, 5000):
        place.put("a.jpg", content(2, size))
        (found,) = again([ref])
        assert fetch(FETCHER, found) == content(2, size)
        if ref.size_bytes is not None:
            assert found.size_bytes == size


def test_sizes_in_a_list_of_local_images(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(content(1))
    (tmp_path / "list.csv").write_text("path,size_bytes\na.jpg,1999\nb.jpg,5\n")
    first, second = again(list(list_images(tmp_path / "list.csv")))
    assert (fetch(FETCHER, first), first.size_bytes, first.etag) == (content(1), 2000, None)
    assert status_of(second) == "not_found"


def test_what_cannot_be_looked_up_is_left_to_the_reading(range_server: RangeServer, tmp_path: Path) -> None:
    gone = ImageRef(f"{range_server.uri}/gone.jpg", 5, "tag")
    in_gone = ImageRef(f"tar://0.jpg::{range_server.uri}/gone.tar", 5, "tag", 512, None, 512)
    nowhere = ImageRef("http://127.0.0.1:9/a.jpg", 5, "tag")
    nameless = ImageRef("")
    found = again([gone, in_gone, nowhere, nameless])
    assert [status_of(ref) for ref in found] == ["not_found", "not_found", "fetch_failed", "not_found"]


def test_a_tar_that_is_damaged_now_keeps_what_was_planned(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    tar.write_bytes(tar_of([(f"{n}.jpg", content(n)) for n in range(4)]))
    refs = list(list_images(tar))
    tar.write_bytes(tar_of([(f"{n}.jpg", content(n)) for n in (1, 0, 2, 3)])[:6000])
    found = again(refs)
    assert [fetch(FETCHER, ref) for ref in found[:2]] == [content(0), content(1)]
    assert [status_of(ref) for ref in found[2:]] == ["fetch_failed"] * 2


def test_a_file_of_the_same_size_and_time_may_hold_other_images(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    tar.write_bytes(tar_of([(f"{n}.jpg", content(n)) for n in range(3)]))
    refs, then = list(list_images(tar)), tar.stat()
    tar.write_bytes(tar_of([(f"{n}.jpg", content(10 + n)) for n in (2, 0, 1)]))
    os.utime(tar, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert [status_of(ref) for ref in refs] == ["fetch_failed"] * 3
    assert [fetch(FETCHER, ref) for ref in again(refs)] == [content(10 + n) for n in range(3)]


def test_members_with_one_name_stay_apart_in_a_tar_that_did_not_change(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    tar.write_bytes(tar_of([("a.jpg", content(1)), ("a.jpg", content(2))]))
    refs = list(list_images(tar))
    assert again(refs) == refs


def test_of_members_with_one_name_the_last_is_taken(tmp_path: Path) -> None:
    tar = tmp_path / "a.tar"
    tar.write_bytes(tar_of([("a.jpg", content(1)), ("a.jpg", content(2))]))
    refs = list(list_images(tar))
    tar.write_bytes(tar_of([("b.jpg", b""), ("a.jpg", content(3)), ("a.jpg", content(4))]))
    assert [fetch(FETCHER, ref) for ref in again(refs)] == [content(4)] * 2


def test_long_lists_keep_their_order(tmp_path: Path) -> None:
    refs = [replace(ImageRef(f"{tmp_path}/{n}.jpg"), extra=str(n)) for n in range(9000)]
    assert again(refs) == refs
