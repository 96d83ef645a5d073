"""Where a new run may go: not among somebody's files, and not among its own images unnoticed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ovss_ray.errors import SettingError
from ovss_ray.images.stores import open_store
from ovss_ray.labels import reading
from ovss_ray.run.additions import extend_run, load_job
from ovss_ray.run.driver import run_job
from ovss_ray.run.vacancy import check_place
from ovss_ray.spec import JobSpec
from tests.run.conftest import draw_photos

MakeSpec = Callable[..., JobSpec]


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "place") if request.param == "local" else f"{request.getfixturevalue('s3')}/place"


def put(place: str, *names: str) -> None:
    fs, root = open_store(place)
    for name in names:
        path = f"{root}/{name}"
        fs.makedirs(path.rsplit("/", 1)[0], exist_ok=True)
        fs.pipe_file(path, b"x")


def listed(place: str) -> list[str]:
    fs, root = open_store(place)
    fs.invalidate_cache()
    return sorted(path.removeprefix(f"{root}/") for path in fs.find(root))


def test_a_place_that_holds_other_files_is_refused_and_left_as_it_is(place: str, make_spec: MakeSpec) -> None:
    put(place, "thesis.tex", "figures/1.pdf", "data.csv", "notes.txt", "readme.md")
    before = listed(place)
    with pytest.raises(SettingError) as told:
        run_job(make_spec(run=place))
    said = f"{place} is not empty and holds no run (data.csv, figures, notes.txt and 2 more); name a new or an empty "
    assert str(told.value) == f"{said}folder for the run"
    assert listed(place) == before


def test_the_folder_of_the_images_is_refused(place: str, make_spec: MakeSpec) -> None:
    put(place, "a.jpg")
    for run in (place, f"{place}/"):
        with pytest.raises(SettingError, match="is the folder of the images .*; name another folder for the run"):
            run_job(make_spec(input=place, run=run))
    assert listed(place) == ["a.jpg"]


@pytest.mark.parametrize(
    "left", [(), (".DS_Store", "lost+found/x"), ("manifest/00000.parquet", ".tmp/host-1-abc", ".tmp/probe-1")]
)
def test_what_a_planning_or_the_system_left_is_no_obstacle(
    place: str, left: tuple[str, ...], make_spec: MakeSpec
) -> None:
    put(place, *left)
    check_place(make_spec(run=place))


def test_a_file_is_no_place_for_a_run(tmp_path: Path, make_spec: MakeSpec) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(SettingError, match="file is a file; name a folder for the run"):
        check_place(make_spec(run=str(tmp_path / "file")))


def test_a_run_continues_whatever_else_was_put_into_its_folder(make_spec: MakeSpec) -> None:
    spec = make_spec(limit=8)
    run_job(spec)
    put(spec.run, "notes.txt", "export/0.png")
    assert run_job(spec).labelled == 8


@pytest.mark.parametrize("name", ["run", "deep/er/run"])
def test_a_run_among_its_images_does_not_label_its_own_files(
    name: str, tmp_path: Path, photos: Path, make_spec: MakeSpec
) -> None:
    folder = draw_photos(tmp_path / "photos", 4)
    spec = make_spec(input=str(folder), run=str(folder / name), shard_size=2)
    assert run_job(spec).labelled == 4
    shutil.copy(photos / "a" / "0001.jpg", folder / name / "overview.jpg")  # as an export would
    assert extend_run(load_job(spec.run)) is None
    (tmp_path / "link").symlink_to(folder)
    assert extend_run(load_job(spec.run), {"input": str(tmp_path / "link" / "a")}) is not None  # other addresses
    with reading.open_run(spec.run) as run:
        assert run.num_images == 6


def test_in_a_bucket_too(s3: str, tmp_path: Path, make_spec: MakeSpec) -> None:
    fs, root = open_store(s3)
    fs.put(f"{draw_photos(tmp_path / 'few', 4)}/", f"{root}/", recursive=True)
    spec = make_spec(input=s3, run=f"{s3}/runs/first", shard_size=2)
    assert run_job(spec).labelled == 4
    assert extend_run(load_job(spec.run)) is None
