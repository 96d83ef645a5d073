"""A folder of small pictures, and jobs over it that take seconds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ovss_ray.spec import JobSpec

SIZES = ((96, 128), (120, 90), (64, 64), (200, 150))
CLIP = "ovss-demo/random"  # the architecture of the tiny CLIP: small, and there without any file


def draw_photos(folder: Path, count: int, seed: int = 0) -> Path:
    """Write `count` smooth random pictures of four sizes, in two folders."""
    rng = np.random.default_rng(seed)
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        coarse = rng.integers(0, 255, (6, 8, 3), dtype=np.uint8)
        path = folder / ("a" if number % 2 else "b") / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC).save(path)
    return folder


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 good pictures."""
    return draw_photos(tmp_path_factory.mktemp("photos"), 40)


@pytest.fixture
def make_spec(photos: Path, tmp_path: Path) -> Callable[..., JobSpec]:
    """A job over `photos` into a fresh run directory, with fields replaced."""

    def make(**fields: Any) -> JobSpec:
        values: dict[str, Any] = {
            "input": str(photos),
            "run": str(tmp_path / "run"),
            "classes": "cat,dog,grass,sky",
            "templates": "single",
            "clip": CLIP,
            "engine": "local",
            "shard_size": 8,
            **fields,
        }
        return JobSpec.build(values, source="test")

    return make
