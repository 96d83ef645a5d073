"""Synthetic scenes with exact labels: coloured shapes lying on textured grounds.

A class is a shape or a texture, never a colour: shapes take any colour, and grounds vary in hue, scale and brightness.
Everything follows from one integer seed. Seeds from `FIRST_TRAINING_SEED` on belong to the training of the shipped
model; all below are held out.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw

from ovss_ray.demo.captions import Thing, describe
from ovss_ray.demo.grounds import GROUND_PAINTERS, FloatImage

SHAPES = ("circle", "square", "triangle", "star", "cross", "heart")
GROUNDS = tuple(GROUND_PAINTERS)
CLASSES = SHAPES + GROUNDS
FIRST_TRAINING_SEED = 2**32

_OVERSAMPLING = 3
_TILT = math.radians(30)
_MIN_VISIBLE_AREA = 0.02  # of the picture: what covers less is not mentioned
_MIN_VISIBLE_PART = 0.4  # of the shape: what is hidden further is not recognisable
_COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 45, 40),
    "orange": (240, 140, 30),
    "yellow": (240, 215, 50),
    "green": (50, 160, 70),
    "blue": (45, 85, 205),
    "purple": (135, 60, 175),
    "pink": (240, 130, 175),
    "white": (240, 240, 240),
    "black": (35, 35, 40),
    "grey": (130, 130, 135),
}


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Attributes:
        image: uint8 RGB [H, W, 3].
        labels: uint8 [H, W], index into `CLASSES`.
        caption: one sentence that names everything visible.
        things: what the scene was drawn from, in painting order.
        thing_map: uint8 [H, W], index into `things`.
    """

    image: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]
    caption: str
    things: tuple[Thing, ...]
    thing_map: npt.NDArray[np.uint8]

    def visible(
        self, top: int = 0, left: int = 0, height: int | None = None, width: int | None = None
    ) -> tuple[Thing, ...]:
        """The things that can be recognised in a rectangle (default: the whole scene)."""
        part = self.thing_map[top:, left:][:height, :width]
        inside = np.bincount(part.ravel(), minlength=len(self.things))
        overall = np.bincount(self.thing_map.ravel(), minlength=len(self.things))
        return tuple(
            thing
            for thing, pixels, whole in zip(self.things, inside, overall, strict=True)
            if pixels >= _MIN_VISIBLE_AREA * part.size and (thing.is_ground or pixels >= _MIN_VISIBLE_PART * whole)
        )


def draw_scene(seed: int, height: int = 192, width: int = 256) -> Scene:
    """Draw one scene; the same seed and size always give the same scene.

    Args:
        seed: any non-negative integer.
        height: rows in pixels, at least 32. All sizes in the scene are relative to it.
        width: columns in pixels, at least 32.
    """
    if height < 32 or width < 32:
        raise ValueError(f"a scene needs at least 32 x 32 pixels, got {height} x {width}")
    rng = np.random.default_rng(seed)
    canvas, thing_map, things = _paint_grounds(rng, height, width)
    for name, centre, radius in _place_shapes(rng, height, width):
        colour = str(rng.choice(list(_COLOURS)))
        _paint_shape(rng, canvas, thing_map, len(things), name, colour, centre, radius)
        size = "large" if radius > 0.21 * height else "small" if radius < 0.15 * height else ""
        things.append(Thing(name, colour, size))
    canvas += rng.normal(0.0, 0.012, size=canvas.shape).astype(np.float32)
    image = (np.clip(canvas, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
    class_ids = np.array([CLASSES.index(thing.name) for thing in things], dtype=np.uint8)
    scene = Scene(image, class_ids[thing_map], "", tuple(things), thing_map)
    return Scene(image, scene.labels, describe(scene.visible(), rng), scene.things, thing_map)


def write_scenes(folder: str | Path, count: int, seed: int = 0) -> None:
    """Write `count` held-out scenes as `images/00000.jpg` and `labels/00000.png` (grey, value = class id).

    Scene i has the seed `seed + i`. Raises ValueError where that would reach into the seeds used for training.
    """
    if seed < 0 or seed + count > FIRST_TRAINING_SEED:
        raise ValueError(f"seeds {seed} to {seed + count - 1} must lie in 0 to {FIRST_TRAINING_SEED - 1}")
    images, labels = Path(folder) / "images", Path(folder) / "labels"
    images.mkdir(parents=True, exist_ok=True)
    labels.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        scene = draw_scene(seed + index)
        Image.fromarray(scene.image).save(images / f"{index:05d}.jpg", quality=95)
        Image.fromarray(scene.labels).save(labels / f"{index:05d}.png")


def _paint_grounds(
    rng: np.random.Generator, height: int, width: int
) -> tuple[FloatImage, npt.NDArray[np.uint8], list[Thing]]:
    upper, lower = (str(name) for name in rng.choice(GROUNDS, size=2, replace=False))
    canvas = GROUND_PAINTERS[upper](rng, height, width).copy()
    thing_map = np.zeros((height, width), dtype=np.uint8)
    things = [Thing(upper)]
    if rng.random() < 0.6:
        x = np.linspace(-1.0, 1.0, width, dtype=np.float32)
        horizon = rng.uniform(0.3, 0.7) + rng.uniform(-0.25, 0.25) * x
        horizon += rng.uniform(0.0, 0.06) * np.sin(rng.uniform(2, 6) * x + rng.uniform(0, 6))
        below = np.arange(height)[:, None] >= horizon[None, :] * height
        canvas[below] = GROUND_PAINTERS[lower](rng, height, width)[below]
        thing_map[below] = 1
        things.append(Thing(lower))
    return canvas, thing_map, things


def _place_shapes(rng: np.random.Generator, height: int, width: int) -> list[tuple[str, tuple[float, float], float]]:
    """Names, centres (y, x) and radii in pixels; neighbours may overlap a little, never hide each other."""
    placed: list[tuple[str, tuple[float, float], float]] = []
    wanted = int(rng.integers(2, 7))
    for _ in range(4 * wanted):
        if len(placed) == wanted:
            break
        radius = height * rng.uniform(0.14, 0.26)
        y = rng.uniform(0.6 * radius, height - 0.6 * radius)
        x = rng.uniform(0.6 * radius, width - 0.6 * radius)
        if all(math.hypot(y - cy, x - cx) > 0.85 * (radius + other) for _, (cy, cx), other in placed):
            placed.append((str(rng.choice(SHAPES)), (y, x), radius))
    return placed


def _paint_shape(
    rng: np.random.Generator,
    canvas: FloatImage,
    thing_map: npt.NDArray[np.uint8],
    index: int,
    name: str,
    colour: str,
    centre: tuple[float, float],
    radius: float,
) -> None:
    """Paint one shape with a rim and, often, inner contours that repeat its outline."""
    angle = rng.uniform(-_TILT, _TILT)
    squeeze = rng.uniform(0.85, 1.0)
    outline = _OUTLINES[name] * np.array([1.0, squeeze])
    cos, sin = math.cos(angle), math.sin(angle)
    outline = outline @ np.array([[cos, sin], [-sin, cos]]) * radius

    fill = np.array(_COLOURS[colour], dtype=np.float32) / 255.0 + rng.normal(0.0, 0.04, size=3).astype(np.float32)
    contrast = -1.0 if fill.mean() > 0.45 else 1.0
    rim = fill + contrast * rng.uniform(0.2, 0.35)
    layers = [(1.0, rim), (1.0 - rng.uniform(0.1, 0.16), fill)]
    if rng.random() < 0.6:
        inner = rng.uniform(0.5, 0.62)
        layers += [(inner, fill + contrast * rng.uniform(0.12, 0.22)), (inner - 0.14, fill)]

    reach = math.ceil(1.2 * radius) + 1
    top, left = max(0, int(centre[0]) - reach), max(0, int(centre[1]) - reach)
    region = canvas[top : int(centre[0]) + reach, left : int(centre[1]) + reach]
    light = 1.0 + rng.uniform(-0.12, 0.12) * np.linspace(-1.0, 1.0, region.shape[0], dtype=np.float32)[:, None, None]
    for scale, paint in layers:
        cover = _coverage(outline * scale + (centre[1] - left, centre[0] - top), region.shape[0], region.shape[1])
        region += cover[..., None] * (np.clip(paint, 0.0, 1.0).astype(np.float32) * light - region)
        if scale == 1.0:
            thing_map[top : top + region.shape[0], left : left + region.shape[1]][cover >= 0.5] = index


def _coverage(polygon: npt.NDArray[np.float64], height: int, width: int) -> FloatImage:
    """Fraction of each pixel that a polygon of (x, y) corners covers, [H, W] in 0..1."""
    fine = Image.new("L", (width * _OVERSAMPLING, height * _OVERSAMPLING))
    ImageDraw.Draw(fine).polygon([(x, y) for x, y in polygon * _OVERSAMPLING], fill=255)
    return np.asarray(fine.reduce(_OVERSAMPLING), dtype=np.float32) / 255.0


def _ring_of_points(radii: npt.NDArray[np.float64], start: float = 0.0) -> npt.NDArray[np.float64]:
    angles = start + np.arange(len(radii)) * 2.0 * math.pi / len(radii)
    return np.stack([radii * np.sin(angles), -radii * np.cos(angles)], axis=1)


def _heart() -> npt.NDArray[np.float64]:
    t = np.linspace(0.0, 2.0 * math.pi, 48, endpoint=False)
    x = 16.0 * np.sin(t) ** 3
    y = -(13.0 * np.cos(t) - 5.0 * np.cos(2 * t) - 2.0 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y - 2.0], axis=1) / 15.5


def _cross(arm: float = 0.36) -> npt.NDArray[np.float64]:
    corner = [(arm, -1.05), (arm, -arm), (1.05, -arm), (1.05, arm)]
    return np.array(
        [(x, y) for x, y in corner]
        + [(-y + 0.0, x) for x, y in corner][1:3]
        + [(-x, -y) for x, y in corner]
        + [(y, -x) for x, y in corner][1:3]
    )


_OUTLINES: dict[str, npt.NDArray[np.float64]] = {
    "circle": _ring_of_points(np.full(48, 0.95)),
    "square": _ring_of_points(np.full(4, 1.15), start=math.pi / 4),
    "triangle": _ring_of_points(np.full(3, 1.2)),
    "star": _ring_of_points(np.tile([1.2, 0.55], 5)),
    "cross": _cross(),
    "heart": _heart(),
}
