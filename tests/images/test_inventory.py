"""S3 inventories as S3 writes them, in a bucket of their own beside the bucket with the images."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovss_ray.errors import InputError
from ovss_ray.images import Fetcher, ImageRef, list_images, open_store
from tests.images.test_tars import contents, write_tar

KEYS = ["photos/a b+c.jpg", "photos/ä%20.png", "photos/notes.md", "photos/.hidden.jpg", "photos/", "z/old.jpg"]
SCHEMA = "Bucket, Key, VersionId, IsLatest, IsDeleteMarker, Size, LastModifiedDate, ETag, StorageClass"


def objects(bucket: str, keys: list[str]) -> list[dict[str, Any]]:
    """One current row per key, and for the last key two rows that no longer count."""
    rows = [{"key": key, "is_latest": True, "is_delete_marker": False} for key in keys]
    rows[-1]["is_latest"] = False
    rows.append({"key": keys[-1], "is_latest": True, "is_delete_marker": True})
    return [
        {"bucket": bucket, "version_id": "v", "size": len(row["key"]), "e_tag": f"e{number}", **row}
        for number, row in enumerate(rows)
    ]


def write_csv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    for row in rows:
        flags = [str(row[name]).lower() for name in ("is_latest", "is_delete_marker")]
        date = "2024-02-29T00:00:00.000Z"
        key = quote_plus(row["key"], safe="/")
        writer.writerow([row["bucket"], key, "v", *flags, row["size"], date, row["e_tag"], "STANDARD"])
    return gzip.compress(text.getvalue().encode())


def write_parquet(rows: list[dict[str, Any]]) -> bytes:
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), data)
    return data.getvalue()


def publish(s3: str, kind: str, files: list[bytes]) -> str:
    """Write an inventory below `s3`/inventory; the address of its manifest."""
    fs, root = open_store(s3)
    suffix = ".csv.gz" if kind == "CSV" else ".parquet"
    names = [f"inventory/data/{number}{suffix}" for number in range(len(files))]
    for name, data in zip(names, files, strict=True):
        fs.pipe_file(f"{root}/{name}", data)
    manifest = {
        "sourceBucket": "anything",
        "destinationBucket": f"arn:aws:s3:::{root}",
        "version": "2016-11-30",
        "fileFormat": kind,
        "fileSchema": SCHEMA if kind == "CSV" else "message s3.inventory { ... }",
        "files": [{"key": name, "size": len(data)} for name, data in zip(names, files, strict=True)],
    }
    fs.pipe_file(f"{root}/inventory/2024-02-29T00-00Z/manifest.json", json.dumps(manifest).encode())
    return f"{s3}/inventory/2024-02-29T00-00Z/manifest.json"


@pytest.mark.parametrize(("kind", "write"), [("CSV", write_csv), ("Parquet", write_parquet)])
def test_current_images_come_with_size_and_etag(kind: str, write: Any, s3: str, tmp_path: Path) -> None:
    bucket = s3.removeprefix("s3://")
    source = publish(s3, kind, [write(objects(bucket, KEYS)), write(objects(bucket, ["late.jpg", "x"]))])
    expected = [
        ImageRef(f"{s3}/photos/a b+c.jpg", 16, "e0"),
        ImageRef(f"{s3}/photos/ä%20.png", 15, "e1"),
        ImageRef(f"{s3}/late.jpg", 8, "e0"),
    ]
    assert list(list_images(source)) == expected
    fs, _ = open_store(s3)
    fs.get_file(source, str(tmp_path / "manifest.json"))
    assert list(list_images(tmp_path / "manifest.json", limit=2)) == expected[:2]


def test_tars_in_an_inventory_count(s3: str, tmp_path: Path) -> None:
    fs, root = open_store(s3)
    tar = write_tar(tmp_path / "a.tar", [("1.jpg", b"one"), ("2.jpg", b"two")])
    fs.put_file(str(tar), f"{root}/wds/a.tar")
    refs = list(list_images(publish(s3, "CSV", [write_csv(objects(root, ["0.jpg", "wds/a.tar", "9.jpg", "x"]))])))
    assert [ref.uri.partition("::")[0] for ref in refs] == [f"{s3}/0.jpg", "tar://1.jpg", "tar://2.jpg", f"{s3}/9.jpg"]
    assert refs[1].etag == "e1"
    found = [Fetcher().fetch(ref.uri, ref.size_bytes, ref.offset) for ref in refs[1:3]]
    assert found == list(contents(tar).values())


def test_an_inventory_without_versions_and_etags(s3: str) -> None:
    bucket = s3.removeprefix("s3://")
    source = publish(s3, "Parquet", [write_parquet([{"bucket": bucket, "key": "a.jpg"}])])
    assert list(list_images(source)) == [ImageRef(f"{s3}/a.jpg")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b'{"fileFormat": "ORC", "destinationBucket": "b", "files": [], "fileSchema": ""}',
            "inventory in ORC.*Parquet",
        ),
        (b'{"images": []}', r"not the manifest\.json of an S3 Inventory.*lists of images are \.txt"),
        (b"[1, 2]", r"not the manifest\.json"),
        (b"{", r"not the manifest\.json"),
    ],
)
def test_other_json_files_are_explained(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        list_images(tmp_path / "manifest.json")


def test_a_missing_file_of_an_inventory_is_named(s3: str) -> None:
    source = publish(s3, "CSV", [write_csv(objects("b", ["a.jpg", "x"]))])
    fs, root = open_store(s3)
    fs.rm_file(f"{root}/inventory/data/0.csv.gz")
    with pytest.raises(InputError, match=r"inventory/data/0\.csv\.gz does not exist"):
        list_images(source)
