"""The images that end their worker, remembered in the run directory so that no later start touches them again."""

from __future__ import annotations

import json
from dataclasses import asdict

from ovss_ray.labels.layout import CRASHED_FOLDER
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.events import CrashedImage


def remember_crashed(directory: RunDirectory, image: CrashedImage) -> None:
    """Note one image, in a file of its own that is created once."""
    name = f"{CRASHED_FOLDER}/{image.shard:08d}-{image.image_id}.json"
    directory.create(name, json.dumps(asdict(image), ensure_ascii=False).encode())


def crashed_images(directory: RunDirectory) -> list[CrashedImage]:
    """All that were noted so far."""
    noted = (directory.read_json(name) for name in directory.files_in(CRASHED_FOLDER))
    return [CrashedImage(**image) for image in noted if image is not None]
