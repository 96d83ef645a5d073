"""Training pictures: crops of synthetic scenes, with what their captions may name."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ovss_ray.demo.captions import Thing
from ovss_ray.demo.scenes import FIRST_TRAINING_SEED, Scene, draw_scene

SCENE_SIZE = (144, 192)
CLOSE_UP, NATIVE = 64, 96
_JITTER = 10.0


@dataclass(frozen=True)
class Crop:
    """A square training picture, uint8 RGB [S, S, 3], and the things that can be recognised in it."""

    image: npt.NDArray[np.uint8]
    things: tuple[Thing, ...]


def draw_crops(seed: int) -> list[Crop]:
    """Crops of one training scene; those in which nothing can be recognised are left out.

    A close-up of every shape, as people take pictures of things, one close-up of any place, and one native picture.
    """
    scene = draw_scene(FIRST_TRAINING_SEED + seed, *SCENE_SIZE)
    rng = np.random.default_rng(seed)
    spots = [(CLOSE_UP, centre + rng.uniform(-_JITTER, _JITTER, size=2)) for centre in _shape_centres(scene)]
    spots += [(size, rng.uniform(0, SCENE_SIZE)) for size in (CLOSE_UP, NATIVE)]
    crops = []
    for size, (y, x) in spots:
        top, left = (int(np.clip(c - size / 2, 0, side - size)) for c, side in zip((y, x), SCENE_SIZE, strict=True))
        things = scene.visible(top, left, size, size)
        if things:
            crops.append(Crop(scene.image[top : top + size, left : left + size].copy(), things))
    return crops


def draw_pool(scenes: int, seed: int, processes: int) -> list[Crop]:
    """The crops of many scenes, drawn by several processes; the same for any number of processes."""
    first = seed * 1_000_000
    with multiprocessing.get_context("spawn").Pool(processes) as workers:
        drawn = workers.imap(draw_crops, range(first, first + scenes), chunksize=16)
        return [crop for crops in drawn for crop in crops]


def batches(crops: Sequence[Crop], batch_size: int, rng: np.random.Generator) -> Iterator[list[Crop]]:
    """Endless shuffled batches; pictures are mirrored left to right at random, which changes no caption."""
    while True:
        order = rng.permutation(len(crops))
        for start in range(0, len(crops) - batch_size + 1, batch_size):
            yield [_mirror(crops[i], rng) for i in order[start : start + batch_size]]


def _mirror(crop: Crop, rng: np.random.Generator) -> Crop:
    return Crop(crop.image[:, :: int(rng.choice((-1, 1)))], crop.things)


def _shape_centres(scene: Scene) -> list[npt.NDArray[np.float64]]:
    centres = []
    for index, thing in enumerate(scene.things):
        rows, columns = np.nonzero(scene.thing_map == index)
        if not thing.is_ground and len(rows):
            centres.append(np.array([rows.mean(), columns.mean()]))
    return centres
