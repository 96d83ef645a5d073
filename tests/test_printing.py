"""Names of classes and files are data: their markup, escape sequences and line ends never reach the terminal."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovss_ray.errors import SettingError
from ovss_ray.printable import printable, printable_lines
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import load_vocabulary
from tests import processes
from tests.evaluation.tiny_runs import TinyRun, draw_labels, write_truth

CLASSES = ("sky[/b]", "[red]grass :dog:", "\x1b[31mdog\x1b[2J", "c\u202eat\x9b", "<script>alert(1)</script>")
FLAGS = ["--clip", "ovss-demo/random", "--engine", "local", "--templates", "single", "--shard-size", "2"]
BROKEN = "b\n\x1b]0;title\x07[red]\u202e.jpg"


def ovss_ray(*arguments: str, encoding: str = "utf-8", **environment: str) -> subprocess.CompletedProcess[str]:
    """What a command prints, checked to hold nothing that a terminal would act on."""
    shell = {**os.environ, "COLUMNS": "160", "PYTHONIOENCODING": encoding, **environment}
    result = processes.ovss_ray(*arguments, env=shell)
    for text in (result.stdout, result.stderr):
        assert re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text) is None, ascii(text)
    return result


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Three pictures and a broken one, whose name is an attack on the terminal, labelled with such classes."""
    folder = tmp_path_factory.mktemp("odd")
    photos = folder / "photos"
    photos.mkdir()
    for number in range(3):
        Image.new("RGB", (48, 40), (90, 30, 60 * number)).save(photos / f"{number}.png")
    (photos / BROKEN).write_bytes(b"\xff\xd8\xff broken")
    (folder / "classes.yaml").write_text(json.dumps([f'"{name}"' for name in CLASSES]))  # a colon would begin synonyms
    (folder / "labels").mkdir()
    for number in range(3):
        Image.new("L", (48, 40), number).save(folder / "labels" / f"{number}.png")
    labelled = ovss_ray("label", str(photos), str(folder / "run"), "--classes", str(folder / "classes.yaml"), *FLAGS)
    assert labelled.returncode == 0, labelled.stderr
    assert r"/b\n\x1b]0;title\x07[red]\u202e.jpg" in labelled.stdout
    return str(folder / "run")


def test_a_name_is_one_line_without_control_characters() -> None:
    assert printable("a\x1b[31m\r\n\t\x9b\u202e\udcff\U000e0041") == r"a\x1b[31m\r\n\t\x9b\u202e\xff\U000e0041"
    assert (
        printable("\u06cc\u200c\u06a9 \U0001f469\u200d\U0001f680 \u00e9 \\n")
        == "\u06cc\u200c\u06a9 \U0001f469\u200d\U0001f680 \u00e9 \\n"
    )
    assert printable_lines("a\n\tb\x1b\r") == "a\n\tb\\x1b\\r"


def test_status_and_verify_show_odd_names_in_one_line_each(run: str) -> None:
    state = ovss_ray("status", run)
    assert state.returncode == 0, state.stderr
    assert r"/b\n\x1b]0;title\x07[red]\u202e.jpg" in state.stdout
    (example,) = [failure["example"] for failure in json.loads(ovss_ray("status", run, "--json").stdout)["failures"]]
    assert example.endswith(f"/{BROKEN}")
    stray = Path(run) / "shards" / "00\x1b[2J\nshards  9 of 9.parquet"
    stray.write_bytes(b"")
    checked = ovss_ray("verify", run)
    stray.unlink()
    assert r"  stray    shards/00\x1b[2J\nshards  9 of 9.parquet" in checked.stdout


def test_evaluate_prints_classes_as_they_are_named(run: str, tmp_path: Path) -> None:
    folder, page = Path(run).parent, tmp_path / "page.html"
    truth = ["--ground-truth", str(folder / "labels"), "--classes", str(folder / "classes.yaml")]
    found = ovss_ray("evaluate", run, *truth, "--engine", "local", "--page", str(page))
    assert found.returncode == 0, found.stderr
    for shown in ("sky[/b]", "[red]grass :dog:", r"\x1b[31mdog\x1b[2J", r"c\u202eat\x9b", "<script>alert(1)</script>"):
        assert f" {shown} " in found.stdout
    bars = {line.index(" ┃ ") for line in found.stdout.splitlines() if " ┃ " in line}
    assert len(bars) == 1  # escapes are counted when columns are measured
    html = page.read_text()
    assert "<script" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    record = json.loads(ovss_ray("evaluate", run, *truth, "--engine", "local", "--json", "-").stdout)
    assert [row["name"] for row in record["scores"]["classes"]] == list(CLASSES)


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_terminal_cannot_show_are_escaped(tmp_path: Path, encoding: str) -> None:
    labels, names = {0: draw_labels(np.random.default_rng(0), 4)}, ("\u732b", "caf\u00e9", "dog", "cat")
    TinyRun(str(tmp_path / "run"), [labels[0]], names).write()
    write_truth(str(tmp_path / "truth"), labels)
    truth = ["--ground-truth", str(tmp_path / "truth"), "--classes", ",".join(names), "--engine", "local"]
    found = ovss_ray("evaluate", str(tmp_path / "run"), *truth, encoding=encoding, LANG="C", LC_ALL="C")
    assert found.returncode == 0, found.stderr
    assert r"\u732b" in found.stdout
    assert (r"caf\xe9" if encoding == "ascii" else "caf\u00e9") in found.stdout


def test_choose_prints_candidates_and_reasons_in_one_line_each(run: str) -> None:
    photos = str(Path(run).parent / "photos")
    flags = ["--clip", "ovss-demo/random", "--engine", "local", "--templates", "single"]
    found = ovss_ray("choose", photos, "--methods", "clipbase", "--sample", "4", "--class-threshold", "0.0001",
                     "--classes", str(Path(run).parent / "classes.yaml"), *flags)  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert "left out for all: 1 (e.g. " in found.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ("status", "no\x1b[31m\nrun"),
        ("label", "no\u202e\nphotos", "run", "--classes", "a,b"),
        ("evaluate", "no\x9brun", "--ground-truth", "x", "--classes", "a\x1b[2Jb,c"),
        ("extend", "no\x1b[31m\nrun"),
        ("run", "no\x1b[31m\njob.yaml"),
    ],
)
def test_errors_quote_names_in_one_line(arguments: tuple[str, ...], tmp_path: Path) -> None:
    result = ovss_ray(*arguments, HOME=str(tmp_path), HF_HUB_OFFLINE="1")
    assert result.returncode in (2, 3), result.stderr
    assert "Traceback" not in result.stderr
    started = ["Labelling no\\u202e\\nphotos"] if arguments[0] == "label" else []  # said before anything is looked at
    assert len(result.stderr.splitlines()) == 1 + len(started)
    assert all(line in result.stderr for line in started)


HOSTILE_YAML = {
    "deep": "[" * 10_000,
    "tag": "!!python/object/apply:os.system ['touch marker']",
    "aliases": "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"{c}: &{c} [{', '.join([f'*{b}'] * 9)}]\n" for b, c in zip("abcdefgh", "bcdefghi", strict=True)),
    "circle": "&a [*a]",
    "number": f"a: {'9' * 5000}",
}


@pytest.mark.parametrize("kind", HOSTILE_YAML)
def test_hostile_yaml_is_one_clear_error(kind: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.yaml"
    file.write_text(HOSTILE_YAML[kind])
    doors: list[Callable[[], object]] = [
        lambda: JobSpec.from_file(file),
        lambda: load_vocabulary(file),
        lambda: load_vocabulary("a,b", templates=str(file)),
    ]
    for door in doors:
        with pytest.raises(SettingError, match=r"odd\.yaml") as caught:
            door()
        assert len(str(caught.value).splitlines()) == 1
        assert len(str(caught.value)) < 300


def test_a_hostile_job_file_ends_the_command_with_a_wrong_setting(tmp_path: Path) -> None:
    marker, job = tmp_path / "marker", tmp_path / "job.yaml"
    job.write_text(f"input: !!python/object/apply:os.system ['touch {marker}']\n")
    result = ovss_ray("run", str(job))
    assert (result.returncode, marker.exists()) == (2, False)
    assert "line 1, column 8: the tag '!!python/object/apply:os.system' is not allowed" in result.stderr


def test_a_host_with_an_odd_name_is_shown_in_one_line(run: str, tmp_path: Path) -> None:
    copy = shutil.copytree(run, tmp_path / "copy", symlinks=True)
    (copy / "shards" / "00000001.parquet").unlink()
    (copy / "summary.json").unlink()
    (sign,) = (copy / "drivers").iterdir()
    driver = json.loads(sign.read_text())
    now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
    sign.write_text(
        json.dumps({**driver, "host": "gpu\x1b[2J\n[red]7", "process": None, "state": "running", "beat_at": now})
    )
    shown = ovss_ray("status", str(copy)).stdout
    assert r" on gpu\x1b[2J\n[red]7 (process " in shown
