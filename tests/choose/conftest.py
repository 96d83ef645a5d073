"""Scenes whose classes are known, as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovss_ray.demo.scenes import CLASSES, Scene, draw_scene

NAMES = ",".join(CLASSES)
TEMPLATE = "a picture of a {}"
"""One, because texts take most of the time."""


@pytest.fixture(scope="session")
def scenes() -> list[Scene]:
    """Six small held-out scenes."""
    return [draw_scene(seed, 96, 128) for seed in range(3000, 3006)]


@pytest.fixture(scope="session")
def folder(scenes: list[Scene], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The scenes as 0.png to 5.png."""
    folder = tmp_path_factory.mktemp("scenes")
    for number, scene in enumerate(scenes):
        Image.fromarray(scene.image).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="session")
def class_file(scenes: list[Scene], folder: Path) -> Path:
    """What is in each scene, as a CSV file beside the images."""
    path = folder / "classes.csv"
    rows = [
        f"{number}.png,{';'.join(CLASSES[k] for k in np.unique(scene.labels))}" for number, scene in enumerate(scenes)
    ]
    path.write_text("\n".join(["image,classes", *rows]) + "\n")
    return path
