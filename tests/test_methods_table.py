"""`ovss-ray methods`: a line a method, without torch; the card in a file is the card of its class."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ovss_ray.segmenters import get_method, method_names
from ovss_ray.segmenters.cards import read_card

_NO_TORCH = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "open_clip", "ray"):
            raise ImportError(name + " must not be imported here")
sys.meta_path.insert(0, Forbidden())
"""


@pytest.mark.parametrize("flags", [(), ("--json",), ("--protocols",)])
def test_the_table_has_a_line_for_each_method_that_fits_80_columns(tmp_path: Path, flags: tuple[str, ...]) -> None:
    (tmp_path / "sitecustomize.py").write_text(_NO_TORCH)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "COLUMNS": "80"}
    command = [sys.executable, "-m", "ovss_ray", "methods", *flags]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    if not flags:
        lines = result.stdout.splitlines()
        assert [line.split()[0] for line in lines[1 : 1 + len(method_names())]] == list(method_names())
        assert lines[0].split() == ["method", "published", "in", "passes", "VOC21", "ADE20K", "scenes"]
        assert max(map(len, lines)) <= 80
        (maskclip,) = [line.split() for line in lines if line.startswith("maskclip ")]
        assert maskclip[1:6] == ["ECCV", "2022", "1", "43.4", "11.9"]


@pytest.mark.parametrize("method", method_names())
def test_the_card_in_the_file_is_that_of_the_class(method: str) -> None:
    assert read_card(method) == get_method(method).card
