"""Images in Parquet files: Hugging Face's layout and plain columns, on disks, in buckets and on the web."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovss_ray.errors import ImageError, InputError, SettingError
from ovss_ray.images import Fetcher, ImageRef, list_images, open_store
from ovss_ray.images.row_groups import RowGroups
from tests.images.conftest import RangeServer, fetch

HF_IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def images(count: int, seed: int = 0) -> list[bytes]:
    rng = np.random.default_rng(seed)
    return [rng.bytes(500 + number) for number in range(count)]


def write_hf(path: Path, data: list[bytes | None], paths: list[str | None] | None = None, **others: Any) -> Path:
    """A file as `datasets` writes it: an image struct among other columns, in small row groups."""
    cells = [{"bytes": item, "path": name} for item, name in zip(data, paths or [None] * len(data), strict=True)]
    table = pa.table({"label": list(range(len(data))), "image": pa.array(cells, HF_IMAGE), **others})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=7)
    return path


def fetched(refs: Iterable[ImageRef], fetcher: Fetcher | None = None) -> list[bytes]:
    fetcher = fetcher or Fetcher(attempts=1)
    return [fetch(fetcher, ref) for ref in refs]


def test_every_row_is_an_image(tmp_path: Path) -> None:
    data = images(30)
    file = write_hf(tmp_path / "train.parquet", data)
    refs = list(list_images(file))
    mark = f"size={file.stat().st_size};modified="
    assert refs[17].etag is not None
    assert refs[17].etag.startswith(mark)
    assert replace(refs[17], etag=None) == ImageRef(f"parquet://image/17::{file}", None, None, 17)
    assert fetched(refs) == data
    assert fetched(reversed(refs)) == data[::-1]


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), HF_IMAGE, pa.struct([("bytes", pa.binary())])])
@pytest.mark.parametrize("name", ["image", "JPG", "image_bytes"])
def test_columns_are_found_by_name_and_type(name: str, kind: pa.DataType, tmp_path: Path) -> None:
    data = images(3)
    cells = [{"bytes": item} for item in data] if pa.types.is_struct(kind) else data
    pq.write_table(pa.table({"text": list("abc"), name: pa.array(cells, kind)}), tmp_path / "a.parquet")
    assert fetched(list_images(tmp_path / "a.parquet")) == data


def test_bytes_go_before_addresses_unless_asked_otherwise(tmp_path: Path) -> None:
    data = images(2)
    write_hf(tmp_path / "a.parquet", list(data), url=["https://host/0.jpg", "https://host/1.jpg"], other=data)
    assert fetched(list_images(tmp_path / "a.parquet")) == data
    assert fetched(list_images(tmp_path / "a.parquet", image_column="other")) == data
    refs = list_images(tmp_path / "a.parquet", uri_column="url")
    assert [ref.uri for ref in refs] == ["https://host/0.jpg", "https://host/1.jpg"]


def test_several_columns_of_images_are_not_guessed(tmp_path: Path) -> None:
    cells = pa.array([{"bytes": b"1", "path": None}], HF_IMAGE)
    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"before": cells, "after": cells}), file)
    with pytest.raises(InputError, match=r"several columns of images: before, after; name one with image_column"):
        list_images(file)
    assert fetched(list_images(file, image_column="after")) == [b"1"]
    pq.write_table(pa.table({"mask": cells, "image": cells}), file)
    assert [ref.uri for ref in list_images(file)] == [f"parquet://image/0::{file}"]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("imaeg", r"no column 'imaeg'; did you mean 'image'"),
        ("xyz", r"no column 'xyz'; its columns are: label, image"),
        ("label", r"'label' of .* holds int64, not the bytes of images"),
    ],
)
def test_a_wrong_column_is_explained(column: str, message: str, tmp_path: Path) -> None:
    file = write_hf(tmp_path / "a.parquet", [b"1"])
    with pytest.raises(InputError, match=message):
        list_images(file, image_column=column)
    with pytest.raises(SettingError, match="exclude each other"):
        list_images(file, image_column=column, uri_column="label")


def test_rows_without_bytes_are_read_from_their_path(tmp_path: Path, s3: str) -> None:
    fs, root = open_store(s3)
    fs.pipe_file(f"{root}/far.jpg", b"far")
    (tmp_path / "near.jpg").write_bytes(b"near")
    paths = ["near.jpg", f"{s3}/far.jpg", "ignored.jpg", None]
    file = write_hf(tmp_path / "a.parquet", [None, None, b"here", None], paths)
    refs = list(list_images(file))
    assert fetched(refs[:3]) == [b"near", b"far", b"here"]
    with pytest.raises(ImageError, match="neither bytes nor a path") as caught:
        fetched(refs[3:])
    assert caught.value.status == "not_found"


def test_folders_and_patterns_of_parquet_files(tmp_path: Path, s3: str) -> None:
    fs, root = open_store(s3)
    expected = []
    for number in range(4):
        data = images(9, seed=number)
        file = write_hf(tmp_path / f"data/train-{number:05}-of-00004.parquet", list(data))
        fs.put_file(str(file), f"{root}/data/{file.name}")
        expected += data
    for place in (tmp_path, s3):
        for source in ("data", "data/*.parquet", "data/train-{00000..00003}-of-00004.parquet"):
            assert fetched(list_images(f"{place}/{source}")) == expected
    assert {ref.etag is None for ref in list_images(f"{s3}/data")} == {False}


def test_lists_in_a_folder_are_no_images_but_in_a_pattern_they_are(tmp_path: Path) -> None:
    for number in range(3):
        pq.write_table(pa.table({"url": [f"https://host/{number}.jpg"]}), tmp_path / f"{number}.parquet")
    with pytest.raises(InputError, match=r"3 \.parquet.*lists in a folder are named by a pattern"):
        list_images(tmp_path)
    (tmp_path / "a.jpg").write_bytes(b"a")
    assert [ref.uri for ref in list_images(tmp_path)] == [str(tmp_path / "a.jpg")]
    uris = [ref.uri for ref in list_images(tmp_path / "*.parquet")]
    assert uris == [f"https://host/{number}.jpg" for number in range(3)]


def test_a_damaged_file_among_others_is_named(tmp_path: Path) -> None:
    write_hf(tmp_path / "a.parquet", list(images(3)))
    (tmp_path / "b.parquet").write_bytes(b"PAR1 but damaged")
    with pytest.raises(InputError, match=r"b\.parquet cannot be read as Parquet"):
        list(list_images(tmp_path))


# How much is read.


def test_planning_reads_footers_and_an_image_costs_its_row_group(range_server: RangeServer) -> None:
    data = images(200)
    file = write_hf(range_server.folder / "a.parquet", list(data), noise=images(200, seed=1))
    refs = list(list_images(f"{range_server.uri}/a.parquet"))
    assert range_server.sent_bytes < file.stat().st_size / 2
    group = refs[70:77]
    range_server.sent_bytes = 0
    fetcher = Fetcher()
    assert fetched(group, fetcher) == data[70:77]
    first = range_server.sent_bytes
    assert fetched(group, fetcher) == data[70:77]
    assert range_server.sent_bytes == first
    fetched(refs[77:78], fetcher)
    assert sum(map(len, data[77:84])) <= range_server.sent_bytes - first < 2 * sum(map(len, data[77:84]))


def test_many_threads_wait_for_one_read(tmp_path: Path) -> None:
    data = images(70)
    file = write_hf(tmp_path / "a.parquet", list(data))
    opened = []
    start = threading.Barrier(16)

    def open_file(uri: str, _: str | None) -> Any:
        def again() -> Any:
            opened.append(uri)
            return open(uri, "rb")

        return again

    groups = RowGroups(open_file, max_bytes=10**6)

    def read(row: int) -> bytes | None:
        if row < 16:
            start.wait()
        return groups.cell(str(file), "image", row).data

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(read, range(70))) == data
    assert len(opened) == 1 + 10  # the footer, and each row group once


def test_what_is_kept_is_bounded(tmp_path: Path) -> None:
    data = images(70)
    file = write_hf(tmp_path / "a.parquet", list(data))
    groups = RowGroups(lambda uri, _: partial(open, uri, "rb"), max_bytes=10**6, kept_bytes=10_000)
    kept = []
    for row in [*range(70), *range(70)]:
        assert groups.cell(str(file), "image", row).data == data[row]
        kept.append(sum(groups._kept._sizes.values()))
        assert set(groups._kept._sizes) == set(groups._kept._futures)
    assert max(kept) < 10_000 + 5_000


def test_a_failed_read_is_made_again(range_server: RangeServer) -> None:
    data = images(3)
    write_hf(range_server.folder / "a.parquet", list(data))
    refs = list(list_images(f"{range_server.uri}/a.parquet"))
    range_server.ranges = False
    fetcher = Fetcher(attempts=1)
    with pytest.raises(ImageError, match="ignores byte ranges"):
        fetched(refs, fetcher)
    range_server.ranges = True
    assert fetched(refs, fetcher) == data


def test_a_server_without_byte_ranges_is_refused_when_planning(range_server: RangeServer) -> None:
    write_hf(range_server.folder / "a.parquet", list(images(300)))
    range_server.ranges = False
    with pytest.raises(InputError, match=r"a\.parquet knows no byte ranges.*download"):
        list_images(f"{range_server.uri}/a.parquet")


def test_a_file_that_is_gone_or_shorter_gives_rows_without_an_image(tmp_path: Path) -> None:
    file = write_hf(tmp_path / "a.parquet", list(images(30)))
    refs = [replace(ref, etag=None) for ref in list_images(file)]  # as planned where a store tells no version
    write_hf(file, list(images(3)))
    assert fetched(refs[:3]) == images(3)
    with pytest.raises(ImageError, match="no row 29") as caught:
        fetched(refs[29:])
    assert caught.value.status == "not_found"
    file.write_bytes(b"PAR1 but damaged")
    with pytest.raises(ImageError, match="cannot be read") as caught:
        fetched(refs[:1])
    assert caught.value.status == "corrupt"
    file.unlink()
    with pytest.raises(ImageError) as caught:
        fetched(refs[:1])
    assert caught.value.status == "not_found"


def test_a_fetcher_with_row_groups_travels(s3: str, tmp_path: Path) -> None:
    fs, root = open_store(s3)
    data = images(10)
    fs.put_file(str(write_hf(tmp_path / "a.parquet", list(data))), f"{root}/a.parquet")
    refs = list(list_images(f"{s3}/a.parquet"))
    fetcher = Fetcher()
    assert fetched(refs, fetcher) == data
    assert fetched(refs, pickle.loads(pickle.dumps(fetcher))) == data
