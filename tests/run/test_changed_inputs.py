"""Inputs that change after a run has planned them: rows that say so, and a retry that plans them again."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ovss_ray import open_run
from ovss_ray.images.stores import open_store
from ovss_ray.run.additions import continue_run, extend_run, load_job, retry_run
from ovss_ray.run.driver import run_job
from ovss_ray.spec import JobSpec
from tests.images.conftest import tar_of

MakeSpec = Callable[..., JobSpec]


def bitmap(number: int, height: int = 0) -> bytes:
    """Pictures of one height and different numbers have the same number of bytes."""
    pixels = np.random.default_rng(number).integers(0, 255, (height or 40, 50, 3), dtype=np.uint8)
    sink = io.BytesIO()
    Image.fromarray(pixels).save(sink, "BMP")
    return sink.getvalue()


def write_tar(folder: Path, numbers: list[int], height: int = 0) -> str:
    (folder / "a.tar").write_bytes(tar_of([(f"{number}.bmp", bitmap(number, height)) for number in numbers]))
    return str(folder / "a.tar")


def write_parquet(folder: Path, numbers: list[int], height: int = 0) -> str:
    captions = [f"no. {number}" for number in numbers]
    pq.write_table(pa.table({"image": [bitmap(n, height) for n in numbers], "caption": captions}), folder / "a.parquet")
    return str(folder / "a.parquet")


def labelled_anew(spec: JobSpec, change: Callable[[], object]) -> dict[str, int]:
    """Change the input of a run that was planned and is not labelled yet, and label it."""
    run_job(spec)
    for shard in (Path(spec.run) / "shards").iterdir():
        shard.unlink()
    change()
    return run_job(spec).statuses


def pictures(run: str) -> list[np.ndarray]:
    with open_run(run) as opened:
        images = [opened.image(image_id) for image_id in range(opened.num_images)]
        for image_id, pixels in enumerate(images):
            assert opened.label_map(image_id).shape == pixels.shape[:2]
        return images


def decoded(number: int, height: int = 0) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(bitmap(number, height))).convert("RGB"))


@pytest.mark.parametrize("height", [0, 30, 60])
def test_a_tar_that_was_packed_in_another_order(height: int, make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(input=write_tar(tmp_path, [0, 1, 2]), extensions="bmp")
    assert labelled_anew(spec, lambda: write_tar(tmp_path, [2, 0, 1], height)) == {"fetch_failed": 3}
    with open_run(spec.run) as run:
        assert all("changed since it was planned" in error for error in run.images()["error"].to_pylist())
    assert retry_run(load_job(spec.run)) is not None
    assert continue_run(load_job(spec.run)).statuses == {"ok": 3}
    for number, found in enumerate(pictures(spec.run)):  # an image is the member of its name
        np.testing.assert_array_equal(found, decoded(number, height))


def test_a_parquet_file_whose_rows_were_sorted(make_spec: MakeSpec, tmp_path: Path) -> None:
    spec = make_spec(input=write_parquet(tmp_path, [2, 0, 1]), keep_columns="caption")
    assert labelled_anew(spec, lambda: write_parquet(tmp_path, [0, 1, 2])) == {"fetch_failed": 3}
    assert retry_run(load_job(spec.run)) is not None
    assert continue_run(load_job(spec.run)).statuses == {"ok": 3}
    with open_run(spec.run) as run:
        captions = [json.loads(extra)["caption"] for extra in run.images()["extra"].to_pylist()]
    assert captions == ["no. 0", "no. 1", "no. 2"]
    for number, found in enumerate(pictures(spec.run)):  # an image is the row of its number
        np.testing.assert_array_equal(found, decoded(number))


def test_objects_that_were_replaced_by_smaller_and_larger_ones(s3: str, make_spec: MakeSpec) -> None:
    fs, root = open_store(s3)
    fs.pipe({f"{root}/p/{number}.bmp": bitmap(number) for number in range(5)})
    spec = make_spec(input=f"{s3}/p")

    def change() -> None:
        fs.pipe({f"{root}/p/{number}.bmp": bitmap(7, height) for number, height in enumerate((20, 40, 70))})
        fs.rm_file(f"{root}/p/3.bmp")

    assert labelled_anew(spec, change) == {"ok": 1, "fetch_failed": 3, "not_found": 1}
    assert retry_run(load_job(spec.run)) is not None
    assert continue_run(load_job(spec.run)).statuses == {"ok": 4, "not_found": 1}
    with open_run(spec.run) as run:
        assert [len(run.image(number)) for number in (0, 1, 2, 4)] == [20, 40, 70, 40]


def test_extensions_are_looked_up_as_they_were_listed(make_spec: MakeSpec, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    spec = make_spec(input=write_tar(tmp_path / "first", [0, 1]))
    run_job(spec)
    (tmp_path / "second").mkdir()
    source = write_parquet(tmp_path / "second", [5, 6])
    extend_run(load_job(spec.run), {"input": source, "keep_columns": ["caption"]})
    write_parquet(tmp_path / "second", [6, 5])
    assert continue_run(load_job(spec.run)).statuses == {"ok": 2, "fetch_failed": 2}
    retry_run(load_job(spec.run))
    assert continue_run(load_job(spec.run)).statuses == {"ok": 4}
    with open_run(spec.run) as run:
        assert run.images(["extra"])["extra"].to_pylist() == [None, None, '{"caption":"no. 6"}', '{"caption":"no. 5"}']
        np.testing.assert_array_equal(run.image(2), decoded(6))
