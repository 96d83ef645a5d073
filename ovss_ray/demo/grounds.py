"""Procedural grounds: six textures that differ in structure, each with its own range of hue, scale and brightness.

Every painter takes a generator and a size and returns float32 RGB [H, W, 3] in 0..1. Feature sizes are fractions of
the unit (the scene's height), so a scene looks the same at every resolution.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

FloatImage: TypeAlias = npt.NDArray[np.float32]
Painter: TypeAlias = Callable[[np.random.Generator, int, int], FloatImage]


def _noise(rng: np.random.Generator, height: int, width: int, cell_y: float, cell_x: float) -> FloatImage:
    """Smooth noise [H, W] with mean 0 and spread about 1; one random value per cell of the given size in pixels."""
    rows = max(2, math.ceil(height / max(cell_y, 1.0)))
    columns = max(2, math.ceil(width / max(cell_x, 1.0)))
    values = rng.standard_normal((rows, columns), dtype=np.float32)
    if (rows, columns) == (height, width):
        return values
    return np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.BICUBIC))


def _rotated_axes(height: int, width: int, angle: float) -> tuple[FloatImage, FloatImage]:
    """Coordinates in pixels along and across a direction given in radians."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float32)
    cos, sin = math.cos(angle), math.sin(angle)
    return x * cos + y * sin, y * cos - x * sin


def _tint(value: FloatImage, hue: float, saturation: float) -> FloatImage:
    """Colour a brightness map [H, W] with one hue (degrees) and saturation (0..1)."""
    colour = np.array(colorsys.hsv_to_rgb(hue / 360.0 % 1.0, saturation, 1.0), dtype=np.float32)
    return np.clip(value, 0.0, 1.0)[..., None] * colour


def _grass(rng: np.random.Generator, height: int, width: int) -> FloatImage:
    blade = height * rng.uniform(0.045, 0.08)
    strokes = _noise(rng, height, width, blade, blade / 5) + _noise(rng, height, width, blade * 0.6, blade / 6)
    patches = _noise(rng, height, width, height / 4, height / 4)
    value = rng.uniform(0.42, 0.62) + 0.12 * strokes + 0.05 * patches
    return _tint(value, rng.uniform(75, 135), rng.uniform(0.5, 0.8))


def _water(rng: np.random.Generator, height: int, width: int) -> FloatImage:
    wavelength = height * rng.uniform(0.05, 0.09)
    along, across = _rotated_axes(height, width, rng.uniform(-0.2, 0.2))
    bend = _noise(rng, height, width, height / 5, height / 3)
    ripples = np.sin(2 * math.pi * across / wavelength + 2.0 * bend + 0.6 * np.sin(along / wavelength))
    value = rng.uniform(0.55, 0.75) + 0.13 * ripples * np.abs(ripples) + 0.04 * bend
    return _tint(value.astype(np.float32), rng.uniform(180, 225), rng.uniform(0.45, 0.8))


def _sand(rng: np.random.Generator, height: int, width: int) -> FloatImage:
    grain = height * rng.uniform(0.007, 0.011)
    speckles = _noise(rng, height, width, grain, grain)
    dunes = _noise(rng, height, width, height / 5, height / 3)
    value = rng.uniform(0.72, 0.88) + 0.09 * speckles + 0.03 * dunes
    return _tint(value, rng.uniform(32, 50), rng.uniform(0.25, 0.5))


def _brick(rng: np.random.Generator, height: int, width: int) -> FloatImage:
    course = height * rng.uniform(0.07, 0.11)
    length = course * rng.uniform(1.8, 2.3)
    x, y = _rotated_axes(height, width, rng.uniform(-0.06, 0.06))
    y = y + rng.uniform(0, course) + height
    row = np.floor(y / course)
    x = x + length * 0.5 * (row % 2) + rng.uniform(0, length) + height
    column = np.floor(x / length)
    joint = max(1.0, course * 0.14)
    mortar = ((y - row * course) < joint) | ((x - column * length) < joint)
    shades = rng.uniform(-0.1, 0.1, size=(64, 64)).astype(np.float32)
    value = rng.uniform(0.5, 0.7) + shades[row.astype(int) % 64, column.astype(int) % 64]
    value += 0.03 * _noise(rng, height, width, 2, 2)
    bricks = _tint(value, rng.uniform(-5, 22), rng.uniform(0.5, 0.75))
    grey = rng.uniform(0.68, 0.85)
    return np.where(mortar[..., None], np.float32(grey), bricks)


def _wood(rng: np.random.Generator, height: int, width: int) -> FloatImage:
    upright = rng.random() < 0.5
    rows, columns = (width, height) if upright else (height, width)
    plank = height * rng.uniform(0.14, 0.22)
    fibre = height * rng.uniform(0.015, 0.025)
    y = np.arange(rows, dtype=np.float32)[:, None] + rng.uniform(0, plank)
    board = np.floor(y / plank)
    shades = rng.uniform(-0.09, 0.09, size=256).astype(np.float32)
    grain = _noise(rng, rows, columns, fibre, height * 0.6)
    rings = np.sin(7.0 * _noise(rng, rows, columns, plank * 0.8, height * 0.9))
    value = rng.uniform(0.5, 0.68) + shades[board.astype(int) % 256] + 0.07 * grain + 0.05 * rings
    value = np.where(y - board * plank < max(1.0, plank * 0.06), value * 0.45, value).astype(np.float32)
    return _tint(value.T if upright else value, rng.uniform(22, 36), rng.uniform(0.45, 0.7))


def _snow(rng: np.random.Generator, height: int, width: int) -> FloatImage:
    drifts = _noise(rng, height, width, height / 6, height / 4) + 0.5 * _noise(
        rng, height, width, height / 14, height / 10
    )
    value = np.float32(rng.uniform(0.86, 0.95)) + np.float32(0.05) * drifts
    image = _tint(value, rng.uniform(195, 235), rng.uniform(0.03, 0.12))
    sparkle = _noise(rng, height, width, height * 0.008, height * 0.008) > 2.3
    return np.where(sparkle[..., None], np.float32(1.0), image)


GROUND_PAINTERS: dict[str, Painter] = {
    "grass": _grass,
    "water": _water,
    "sand": _sand,
    "brick": _brick,
    "wood": _wood,
    "snow": _snow,
}
