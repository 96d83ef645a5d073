"""Every kind of input, planned, fetched and labelled: tars, Parquet files with images, lists, inventories."""

from __future__ import annotations

import gzip
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

import ovss_ray
from ovss_ray.cli import app
from ovss_ray.errors import RunMismatchError
from ovss_ray.images import open_store
from ovss_ray.run.driver import run_job
from ovss_ray.spec import JobSpec
from tests.run.conftest import CLIP

MakeSpec = Callable[..., JobSpec]


def packed(photos: Path, folder: Path, tars: int = 3) -> Path:
    """The photos of a folder in tars, in the order of their names."""
    folder.mkdir(parents=True)
    files = sorted(photos.rglob("*.jpg"))
    for number, part in enumerate(np.array_split(np.arange(len(files)), tars)):
        with tarfile.open(folder / f"train-{number:05}.tar", "w") as tar:
            for index in part:
                tar.add(files[index], files[index].name)
    return folder


def in_parquet(photos: Path, folder: Path, files: int = 3) -> Path:
    folder.mkdir(parents=True)
    names = sorted(photos.rglob("*.jpg"))
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    for number, part in enumerate(np.array_split(np.arange(len(names)), files)):
        cells = [{"bytes": names[index].read_bytes(), "path": names[index].name} for index in part]
        table = pa.table({"image": pa.array(cells, kind), "caption": [f"no. {index}" for index in part]})
        pq.write_table(table, folder / f"train-{number:05}.parquet", row_group_size=5)
    return folder


def label_maps(run: str) -> list[np.ndarray]:
    opened = ovss_ray.open_run(run)
    assert set(opened.images().column("status").to_pylist()) == {"ok"}
    return [opened.label_map(image) for image in range(len(opened.images()))]


def extras(run: str) -> list[Any]:
    column = ovss_ray.open_run(run).images().column("extra").to_pylist()
    return [None if value is None else json.loads(value) for value in column]


@pytest.fixture(scope="module")
def expected(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> list[np.ndarray]:
    """Label maps of the photos as files of their own, in the order of their names."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "list.txt").write_text("\n".join(map(str, sorted(photos.rglob("*.jpg")))))
    values = {"classes": "cat,dog,grass,sky", "templates": "single", "clip": CLIP, "engine": "local", "shard_size": 8}
    run_job(JobSpec.build({"input": str(folder / "list.txt"), "run": str(folder / "run"), **values}, source="test"))
    return label_maps(str(folder / "run"))


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    assert len(found) == len(expected)
    assert all(np.array_equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.parametrize("shard_size", [3, 16])
def test_tars_on_disk(
    shard_size: int, photos: Path, tmp_path: Path, make_spec: MakeSpec, expected: list[np.ndarray]
) -> None:
    folder = packed(photos, tmp_path / "wds")
    spec = make_spec(input=f"{folder}/train-{{00000..00002}}.tar", shard_size=shard_size)
    run_job(spec)
    assert_same(label_maps(spec.run), expected)


def test_parquet_images_on_disk_keep_their_captions(
    photos: Path, tmp_path: Path, make_spec: MakeSpec, expected: list[np.ndarray]
) -> None:
    spec = make_spec(input=str(in_parquet(photos, tmp_path / "hf")), keep_columns="caption")
    run_job(spec)
    assert_same(label_maps(spec.run), expected)
    assert extras(spec.run) == [{"caption": f"no. {number}"} for number in range(40)]


def test_tars_and_parquet_images_in_a_bucket(
    s3: str, photos: Path, tmp_path: Path, make_spec: MakeSpec, expected: list[np.ndarray]
) -> None:
    fs, root = open_store(s3)
    for folder in (packed(photos, tmp_path / "wds"), in_parquet(photos, tmp_path / "hf")):
        fs.put(str(folder), f"{root}/{folder.name}", recursive=True)
        spec = make_spec(input=f"{s3}/{folder.name}", run=f"{s3}/runs/{folder.name}")
        run_job(spec)
        assert_same(label_maps(spec.run), expected)


def test_an_inventory_in_a_bucket(s3: str, photos: Path, make_spec: MakeSpec, expected: list[np.ndarray]) -> None:
    fs, root = open_store(s3)
    files = sorted(photos.rglob("*.jpg"))
    fs.pipe({f"{root}/p/{file.name}": file.read_bytes() for file in files})
    rows = "".join(f'"{root}","p/{file.name}","{file.stat().st_size}"\n' for file in files)
    fs.pipe_file(f"{root}/inv/0.csv.gz", gzip.compress(rows.encode()))
    manifest = {"fileFormat": "CSV", "fileSchema": "Bucket, Key, Size", "files": [{"key": "inv/0.csv.gz"}]}
    fs.pipe_file(f"{root}/inv/manifest.json", json.dumps({**manifest, "destinationBucket": root}).encode())
    spec = make_spec(input=f"{s3}/inv/manifest.json")
    run_job(spec)
    assert_same(label_maps(spec.run), expected)


def test_the_command_line_keeps_columns(photos: Path, tmp_path: Path) -> None:
    files = sorted(photos.rglob("*.jpg"))[:3]
    rows = "".join(f"{file},no. {number},{number}\n" for number, file in enumerate(files))
    (tmp_path / "list.csv").write_text("url,caption,id\n" + rows)
    command = ["label", str(tmp_path / "list.csv"), str(tmp_path / "run"), "--classes", "cat,dog", "--clip", CLIP]
    command += ["--engine", "local", "--keep-columns", "caption,id"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    assert extras(str(tmp_path / "run")) == [{"caption": f"no. {n}", "id": str(n)} for n in range(3)]


def test_other_kept_columns_are_another_run(photos: Path, tmp_path: Path, make_spec: MakeSpec) -> None:
    source = in_parquet(photos, tmp_path / "hf")
    run_job(make_spec(input=str(source), limit=3))
    with pytest.raises(RunMismatchError, match=r"input\.keep_columns: the run has \[\], asked for \[\"caption\"\]"):
        run_job(make_spec(input=str(source), limit=3, keep_columns="caption"))


def test_captions_that_change_are_another_manifest(photos: Path, tmp_path: Path, make_spec: MakeSpec) -> None:
    digests = []
    for caption in ("a", "b"):
        (tmp_path / "list.csv").write_text(f"url,caption\n{sorted(photos.rglob('*.jpg'))[0]},{caption}\n")
        spec = make_spec(input=str(tmp_path / "list.csv"), run=str(tmp_path / caption), keep_columns=["caption"])
        run_job(spec)
        record = json.loads((tmp_path / caption / "run.json").read_text())
        digests.append(record["identity"]["input"]["manifest"])
    assert digests[0] != digests[1]
