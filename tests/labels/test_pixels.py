"""Images read back out of a run: from files, containers, buckets and web servers, after extensions and retries."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ovss_ray import open_run
from ovss_ray.errors import DamagedRunError, ImageError, SettingError
from ovss_ray.images.listing import ImageRef, list_images
from ovss_ray.images.stores import open_store
from ovss_ray.labels.additions import Addition
from ovss_ray.labels.layout import addition_name
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.manifest import write_manifest, write_parts
from ovss_ray.vocabulary import load_vocabulary
from tests.images.conftest import RangeServer, range_server  # noqa: F401 (a fixture)

IMAGES = 7


def picture(number: int) -> np.ndarray:
    return np.random.default_rng(number).integers(0, 255, (20 + number, 30, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(picture(number)).save(sink, "PNG")
    return sink.getvalue()


def planned_run(place: str, refs: Sequence[ImageRef], **job: Any) -> str:
    """A run of which no image is labelled yet, in shards of 3."""
    directory = RunDirectory(place)
    directory.prepare()
    manifest = write_manifest(refs, directory, 3)
    vocabulary = json.loads(load_vocabulary("cat,dog").to_json())
    record = {"format_version": 1, "fingerprint": "f", "job": job, "vocabulary": vocabulary}
    directory.create("run.json", json.dumps({**record, "manifest": manifest.to_json()}).encode())
    return place


def add(place: str, kind: str, images: Sequence[tuple[int, ImageRef]], number: int, **fields: Any) -> None:
    directory = RunDirectory(place)

    def write(index: int, data: bytes) -> str:
        name = f"manifest/{number:05d}-{index:08x}-00000.parquet"
        directory.create(name, data)
        return name

    parts, digest = write_parts(images, 3, write)
    known: dict[str, Any] = {"created_at": "", "package_version": "", "settings": {}, "digest": digest}
    addition = Addition(kind=kind, images=len(images), parts=tuple(parts), **known, **fields)  # type: ignore[arg-type]
    directory.create(addition_name(number), addition.model_dump_json().encode())


def write_tar(path: Path) -> Path:
    with tarfile.open(path, "w") as tar:
        for number in range(IMAGES):
            info = tarfile.TarInfo(f"{'long/' * 40}{number}.png")
            info.size = len(png(number))
            tar.addfile(info, io.BytesIO(png(number)))
    return path


def write_parquet(path: Path) -> Path:
    pq.write_table(pa.table({"image": [png(number) for number in range(IMAGES)]}), path, row_group_size=2)
    return path


@pytest.fixture(params=["folder", "tar", "parquet", "web"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "tar":
        return str(write_tar(tmp_path / "a.tar"))
    if request.param == "parquet":
        return str(write_parquet(tmp_path / "a.parquet"))
    server: RangeServer | None = request.getfixturevalue("range_server") if request.param == "web" else None
    folder = tmp_path / "photos" if server is None else server.folder
    folder.mkdir(exist_ok=True)
    for number in range(IMAGES):
        (folder / f"{number}.png").write_bytes(png(number))
    if server is None:
        return str(folder)
    (tmp_path / "list.txt").write_text("".join(f"{server.uri}/{number}.png\n" for number in range(IMAGES)))
    return str(tmp_path / "list.txt")


def test_images_of_every_kind_of_input_are_read_back(source: str, tmp_path: Path) -> None:
    with open_run(planned_run(str(tmp_path / "run"), list(list_images(source)))) as run:
        for number in (6, 0, 3, 4, 5, 1, 2):
            image = run.image(number)
            assert (image.dtype, image.flags.c_contiguous) == (np.uint8, True)
            np.testing.assert_array_equal(image, picture(number))


def test_images_and_run_in_a_bucket_that_needs_options(
    s3: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs, root = open_store(s3)
    fs.put_file(str(write_tar(tmp_path / "a.tar")), f"{root}/a.tar")
    place = planned_run(f"{s3}/run", list(list_images(f"{s3}/a.tar")))
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    with open_run(place, {"s3": {"endpoint_url": s3_endpoint}}) as run:
        np.testing.assert_array_equal(run.image(np.int64(5)), picture(5))  # type: ignore[arg-type]


def test_images_that_were_added_or_planned_again_are_read_from_where_they_are_now(tmp_path: Path) -> None:
    def ref(number: int, name: str = "") -> ImageRef:
        path = tmp_path / f"{number}{name}.png"
        path.write_bytes(png(number + len(name)))
        return ImageRef(str(path))

    place = planned_run(str(tmp_path / "run"), [ref(number) for number in range(4)], max_pixels=24 * 30)
    add(place, "extend", [(4, ref(4)), (5, ref(5))], 1)
    add(place, "retry", [(1, ref(1, "again")), (5, ref(5, "b"))], 2, max_pixels=26 * 30)
    with open_run(place) as run:
        assert [len(run.image(number)) for number in (0, 1, 2, 3, 4, 5)] == [20, 26, 22, 23, 24, 26]
    add(place, "retry", [(5, ref(5, "bb"))], 3)
    with open_run(place) as run, pytest.raises(ImageError, match="27 x 30|30 x 27 pixels, over the limit") as caught:
        run.image(5)
    assert caught.value.status == "too_large"


def test_what_cannot_be_read_says_why(tmp_path: Path) -> None:
    gone, damaged = tmp_path / "gone.png", tmp_path / "damaged.png"
    damaged.write_bytes(png(0)[:200])
    place = planned_run(str(tmp_path / "run"), [ImageRef(str(gone)), ImageRef(str(damaged))], fetch_attempts=1)
    with open_run(place) as run:
        for number, status, path in ((0, "not_found", gone), (1, "corrupt", damaged)):
            with pytest.raises(ImageError, match=rf"\(image {number}, {path}\)") as caught:
                run.image(number)
            assert caught.value.status == status
        for wrong, said in ((2, "its image ids are 0 to 1"), (-1, "has no image -1")):
            with pytest.raises(SettingError, match=said):
                run.image(wrong)
        for odd in ("0", 1.0, None):
            with pytest.raises(SettingError, match="give the number of an image"):
                run.image(odd)  # type: ignore[arg-type]
            with pytest.raises(SettingError, match="give the number of an image"):
                run.label_map(odd)  # type: ignore[arg-type]


def test_a_run_whose_manifest_is_gone_or_spoilt_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(0))
    place = planned_run(str(tmp_path / "run"), [ImageRef(str(tmp_path / "a.png"))])
    part = tmp_path / "run" / "manifest" / "00000.parquet"
    part.write_bytes(part.read_bytes()[:-9])
    with open_run(place) as run, pytest.raises(DamagedRunError, match=r"00000\.parquet is damaged"):
        run.image(0)
    part.unlink()
    with open_run(place) as run, pytest.raises(DamagedRunError, match=r"00000\.parquet is missing"):
        run.image(0)
