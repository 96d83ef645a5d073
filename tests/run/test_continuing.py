"""`ovss-ray continue RUN`: everything that is needed is in run.json, but for secrets, which are nowhere."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ovss_ray import open_run
from ovss_ray.cli import main
from ovss_ray.images.stores import open_store
from ovss_ray.run.additions import load_job, retry_run
from ovss_ray.run.driver import run_job
from ovss_ray.spec import JobSpec
from tests.faults import FaultyEndpoint, status
from tests.run.conftest import CLIP, draw_photos

MakeSpec = Callable[..., JobSpec]
Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """Give a command in this process; returns exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def give(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ovss-ray", *arguments])
        capfd.readouterr()
        with pytest.raises(SystemExit) as left:
            main()
        printed = capfd.readouterr()
        return int(left.value.code or 0), printed.out, printed.err

    return give


def forget_shards(run: str, *shards: int) -> None:
    for name in ["summary.json", *(f"shards/{shard:08d}.parquet" for shard in shards)]:
        (Path(run) / name).unlink()


def test_a_run_continues_from_another_folder_without_its_vocabulary_file(
    photos: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    command: Command,
) -> None:
    (tmp_path / "my classes.txt").write_text("cat\ndog: hound, puppy\n")
    shutil.copytree(photos, tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    job = ["--classes", "my classes.txt", "--templates", "single", "--clip", CLIP, "--engine", "local"]
    code, _, said = command("label", "photos", "the run", *job, "--shard-size", "8", "--limit", "24", "-v")
    assert code == 0, said
    line = f"ovss-ray continue {shlex.quote(str(tmp_path / 'the run'))}"
    assert line in caplog.text
    Path("my classes.txt").unlink()
    forget_shards("the run", 1, 2)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    code, out, said = command(*shlex.split(line)[1:], "--batch-size", "2")
    assert code == 0, said
    assert "24 of 24 images labelled" in out
    with open_run(tmp_path / "the run") as run:
        assert run.status_counts() == {"ok": 24}
        assert run.vocabulary.classes[1].queries == ("dog", "hound", "puppy")


def test_what_is_no_run_is_explained(tmp_path: Path, command: Command) -> None:
    code, _, said = command("continue", str(tmp_path / "nothing"))
    assert (code, said.count("\n")) == (2, 1)
    assert "there is no run directory" in said


def test_a_method_of_ones_own_that_is_gone_is_named(make_spec: MakeSpec, command: Command) -> None:
    spec = make_spec(limit=8, shard_size=4)
    run_job(spec)
    forget_shards(spec.run, 1)
    record = json.loads((Path(spec.run) / "run.json").read_text())
    record["job"]["method"] = record["identity"]["method"] = "my_methods.best:Best"
    (Path(spec.run) / "run.json").write_text(json.dumps(record))
    code, _, said = command("continue", spec.run)
    assert (code, said.count("\n")) == (2, 1)
    assert "method 'my_methods.best:Best': No module named 'my_methods'; install the module" in said


def test_images_under_a_larger_limit_are_continued_under_theirs(make_spec: MakeSpec, command: Command) -> None:
    spec = make_spec(max_pixels=20_000, shard_size=10)
    run_job(spec)  # ten images of 200 x 150 are too large
    retry_run(load_job(spec.run, {"max_pixels": 50_000}))
    forget_shards(spec.run, 0)
    with open_run(spec.run) as run:
        assert len(run.shards_done()) == 3
    code, out, said = command("continue", spec.run)
    assert code == 0, said
    assert "40 of 40 images labelled" in out


SECRET = "Zq8/w+Vb3xK1nE7t"


def test_secrets_are_given_again_and_written_nowhere(
    s3: str, s3_endpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: Command
) -> None:
    fs, root = open_store(s3)
    fs.put(f"{draw_photos(tmp_path / 'few', 8)}/", f"{root}/photos/", recursive=True)
    with FaultyEndpoint(s3_endpoint) as endpoint:
        for name in ("AWS_ENDPOINT_URL", "AWS_SECRET_ACCESS_KEY", "AWS_ACCESS_KEY_ID"):
            monkeypatch.delenv(name)
        options = {"s3": {"key": "AKIAEXAMPLE", "secret": SECRET, "endpoint_url": endpoint.url}}
        given = json.dumps(options)
        endpoint.plan.add(status(403), method="PUT", path="*/shards/00000001.parquet")
        job = ["--classes", "cat,dog", "--templates", "single", "--clip", CLIP, "--engine", "local"]
        job += ["--shard-size", "4", "--storage-options", given, "-vv"]
        started = [sys.executable, "-m", "ovss_ray", "label", f"{s3}/photos", f"{s3}/run", *job]
        done = subprocess.run(started, capture_output=True, text=True, timeout=200)  # with its own logging
        said = done.stderr
        assert done.returncode == 5, said
        assert "If the run stops" in said
        line = f"ovss-ray continue {s3}/run --storage-options ..."
        assert said.rstrip().endswith(f"Continue with:\n  {line}")
        fs.invalidate_cache()
        files = {path: fs.cat_file(path) for path in fs.find(f"{root}/run")}
        assert f"{root}/run/run.json" in files
        assert not any(SECRET.encode() in content for content in files.values())
        assert not any(secret in done.stdout + said for secret in (SECRET, "AKIAEXAMPLE"))
        code, _, again = command(*shlex.split(line)[1:])
        assert code == 2
        assert "--storage-options is not a JSON object" in again
        endpoint.plan.clear()
        (tmp_path / "options.json").write_text(given)
        code, out, said = command("continue", f"{s3}/run", "--storage-options", f"@{tmp_path}/options.json")
        assert code == 0, said
        assert "8 of 8 images labelled" in out


def test_signed_addresses_are_fetched_and_shown_without_their_signature(
    s3: str, s3_endpoint: str, photos: Path, tmp_path: Path, command: Command
) -> None:
    fs, root = open_store(s3)
    fs.put(str(photos / "a" / "0001.jpg"), f"{root}/a.jpg")
    signed = fs.sign(f"{root}/a.jpg")
    absent = fs.sign(f"{root}/gone.jpg")
    (tmp_path / "list.txt").write_text(f"{signed}\n{absent}\n")
    job = ["--classes", "cat,dog", "--templates", "single", "--clip", CLIP, "--engine", "local", "-vv"]
    code, out, said = command("label", str(tmp_path / "list.txt"), str(tmp_path / "run"), *job)
    assert code == 0, said
    assert "1 of 2 images labelled" in out
    secrets = [*re.findall(r"(?<=Signature=)[^&]+", absent), *re.findall(r"(?<=Signature=)[^&]+", signed)]
    assert len(secrets) == 2
    shown = out + said + (tmp_path / "run" / "summary.json").read_text()
    shown += "".join(command("status", str(tmp_path / "run"))[1:])
    assert "gone.jpg" in shown
    assert not any(secret in shown for secret in secrets)
    with open_run(tmp_path / "run") as run:
        assert run.sql("SELECT uri FROM images ORDER BY image_id").fetchall() == [(signed,), (absent,)]
