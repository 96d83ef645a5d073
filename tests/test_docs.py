"""The pages name things that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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
