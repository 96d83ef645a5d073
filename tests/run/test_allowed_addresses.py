"""Runs over lists that somebody else has written: what their addresses may lead to, through growth and retries."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from ovss_ray import open_run
from ovss_ray.errors import ImageError, InputError
from ovss_ray.images import open_store
from ovss_ray.run.additions import continue_run, extend_run, load_job, retry_run
from ovss_ray.run.driver import run_job
from ovss_ray.spec import JobSpec

MakeSpec = Callable[..., JobSpec]


def rows(run: str) -> list[tuple[str, str | None]]:
    table = open_run(run).images(["status", "error"])
    return list(zip(table["status"].to_pylist(), table["error"].to_pylist(), strict=True))


def test_each_image_is_read_as_the_list_that_names_it_is_trusted(
    s3: str, photos: Path, tmp_path: Path, make_spec: MakeSpec
) -> None:
    pictures = sorted(photos.rglob("*.jpg"))
    trusted, foreign = tmp_path / "mine.txt", f"{s3}/theirs.txt"
    trusted.write_text(f"{pictures[0]}\n")
    fs, path = open_store(foreign)
    fs.pipe({path: f"{pictures[1].as_uri()}\na.jpg\n".encode(), f"{path[:-10]}a.jpg": pictures[2].read_bytes()})
    run = make_spec(input=str(trusted)).run
    run_job(make_spec(input=str(trusted)))
    job = load_job(run)
    extend_run(job, {"input": foreign})
    continue_run(load_job(run, {"max_failed_fraction": 1.0}))
    refusal = "a list in a bucket or on a web server may not name local files; --allow-schemes can allow it"
    assert rows(run) == [("ok", None), ("forbidden", refusal), ("ok", None)]
    opened = open_run(run)
    assert opened.image(0).ndim == 3
    with pytest.raises(ImageError, match="may not name local files"):
        opened.image(1)

    retry_run(load_job(run))
    continue_run(load_job(run, {"max_failed_fraction": 1.0}))  # an image that is listed again is trusted no more
    assert rows(run)[1] == ("forbidden", refusal)
    retry_run(load_job(run))
    continue_run(load_job(run, {"allow_schemes": "s3,file"}))
    assert rows(run) == [("ok", None)] * 3


def test_folders_whose_names_are_not_utf8(photos: Path, tmp_path: Path, make_spec: MakeSpec) -> None:
    name = os.fsdecode(b"caf\xe9")
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(sorted(photos.rglob("*.jpg"))[0], folder / f"{name}.jpg")
    spec = make_spec(input=str(folder), run=str(tmp_path / f"{name} run"))
    assert run_job(spec).labelled == 1
    assert run_job(spec).labelled == 1  # continued, and complete
    (uri,) = open_run(tmp_path / f"{name} run").images(["uri"])["uri"].to_pylist()
    assert uri == f"file://{tmp_path}/caf%E9/caf%E9.jpg"


def test_a_list_that_may_name_nothing_starts_no_run(s3: str, photos: Path, make_spec: MakeSpec) -> None:
    fs, path = open_store(f"{s3}/theirs.txt")
    fs.pipe_file(path, "\n".join(file.as_uri() for file in photos.rglob("*.jpg")).encode())
    spec = make_spec(input=f"{s3}/theirs.txt")
    with pytest.raises(InputError, match=r"theirs\.txt names may be read .*--allow-schemes"):
        run_job(spec)
    assert not Path(spec.run).exists()
    assert run_job(make_spec(input=f"{s3}/theirs.txt", allow_schemes="s3,file", limit=2)).labelled == 2
