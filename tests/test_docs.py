"""The pages name things that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import duckdb
import pytest
from PIL import Image

from ovss_ray.demo.scenes import CLASSES, write_scenes
from ovss_ray.run.driver import run_job
from ovss_ray.spec import JobSpec

ROOT = Path(__file__).parents[1]
NAMED = re.findall(r"`([\w/]+\.py)::(\w+)`", (ROOT / "docs" / "failure_modes.md").read_text())


def test_every_failure_mode_names_a_test() -> None:
    rows = [line for line in (ROOT / "docs" / "failure_modes.md").read_text().splitlines() if line.startswith("| ")]
    faults = [row for row in rows if not row.startswith("| fault |")]
    assert len(faults) == len(NAMED) > 30
    assert all("::" in row for row in faults)


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_the_test_exists(file: str, name: str) -> None:
    tree = ast.parse((ROOT / "tests" / file).read_text())
    assert name in {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_the_examples_of_the_page_on_python_run(first_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "python.md").read_text(), re.DOTALL)
    assert len(blocks) > 6
    monkeypatch.chdir(first_run)
    Image.effect_noise((90, 70), 80).convert("RGB").save("photo.jpg")
    names: dict[str, Any] = {}
    for block in blocks:
        exec(block.replace("ViT-B/16", "demo"), names)  # the published weights would be downloaded
    assert Image.open("labels.png").width >= 90
    assert Image.open("image_0.png").width >= 100
    assert names["components"].num_rows > 0
    assert names["labels"].shape == names["pixels"].shape[:2]


def test_the_short_form_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = re.findall(
        r"One image, without a run:\n\n```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((90, 70), 80).convert("RGB").save("photo.jpg")
    names: dict[str, Any] = {}
    exec(code.replace("ViT-B/16", "demo"), names)  # the published weights would be downloaded
    assert names["result"].labels.shape == (70, 90)
    assert Image.open("labels.png").height >= 70


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `runs/first` is a run, as the pages call it."""
    folder = tmp_path_factory.mktemp("pages")
    write_scenes(folder, 3, 0)
    job = {"input": str(folder / "images"), "run": str(folder / "runs/first"), "classes": list(CLASSES), "clip": "demo",
           "engine": "local", "components": 100, "confidence_map": "uint8"}  # fmt: skip
    run_job(JobSpec.build(job, source="test"))
    return folder


def test_the_sql_of_the_readme_runs_in_plain_duckdb(first_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    queries = re.findall(r"```sql\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(queries) >= 2
    monkeypatch.chdir(first_run)
    results = [duckdb.sql(query).fetchall() for query in queries]
    assert all(results)
    assert {name for name, *_ in results[0]} <= set(CLASSES)
    assert results[0][0][1] <= 3
