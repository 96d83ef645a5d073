"""A real worker in a process of its own stays below the bound that docs/memory.md promises."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MIB = 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are read from /proc")
def test_photographs_of_24_and_images_of_100_megapixels_stay_within_the_bound(tmp_path: Path) -> None:
    """Fewer than the 24 and 20 of `benchmarks/memory.py`, for the time that they take."""
    result = tmp_path / "result.json"
    command = [sys.executable, str(BENCHMARKS / "memory.py"), "--jpegs", "8", "--pngs", "2", "--prefetch-mib", "256"]
    done = subprocess.run(
        [*command, "--output", str(result)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(result.read_text())
    (photographs, large) = found["cases"].values()
    assert (photographs["ok"], large["ok"]) == (8, 2)
    for case, megapixels in ((photographs, 24), (large, 100)):
        bound = found["base_mib"] + 256 + 16 * megapixels * 1e6 / MIB
        assert case["peak_mib"] <= bound
        assert bound < 3000
