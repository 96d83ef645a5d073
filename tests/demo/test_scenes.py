"""Scenes: deterministic, exactly labelled, truthfully captioned, balanced."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ovss_ray.demo.captions import Thing, describe
from ovss_ray.demo.grounds import GROUND_PAINTERS
from ovss_ray.demo.scenes import (
    CLASSES,
    FIRST_TRAINING_SEED,
    GROUNDS,
    SHAPES,
    Scene,
    draw_scene,
    write_scenes,
)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [draw_scene(seed, height=96, width=128) for seed in range(150)]


def named_classes(caption: str) -> set[str]:
    """The classes whose singular or plural occurs in a caption."""
    words = re.findall(r"[a-z]+", caption)
    forms = {form: name for name in CLASSES for form in (name, name + "s", name + "es")}
    return {forms[word] for word in words if word in forms}


def test_same_seed_same_scene() -> None:
    first, second = draw_scene(7), draw_scene(7)
    assert np.array_equal(first.image, second.image)
    assert np.array_equal(first.labels, second.labels)
    assert first.caption == second.caption
    assert not np.array_equal(first.image, draw_scene(8).image)


@pytest.mark.parametrize(("height", "width"), [(192, 256), (32, 32), (50, 33)])
def test_sizes_and_types(height: int, width: int) -> None:
    scene = draw_scene(3, height, width)
    assert scene.image.shape == (height, width, 3)
    assert scene.labels.shape == scene.thing_map.shape == (height, width)
    assert scene.image.dtype == scene.labels.dtype == np.uint8


def test_a_scene_that_is_too_small_is_refused() -> None:
    with pytest.raises(ValueError, match="31 x 64"):
        draw_scene(0, height=31, width=64)


def test_labels_are_the_classes_of_the_painted_things(scenes: list[Scene]) -> None:
    for scene in scenes:
        for index, thing in enumerate(scene.things):
            assert set(scene.labels[scene.thing_map == index]) <= {CLASSES.index(thing.name)}


def test_shapes_lie_where_the_label_map_says() -> None:
    """A shape has one flat colour and a ground has texture, so colours vary less around shape pixels."""
    spreads: dict[bool, list[float]] = {True: [], False: []}
    for seed in range(20):
        scene = draw_scene(seed)
        for index, thing in enumerate(scene.things):
            inside = scene.image[scene.thing_map == index].astype(float)
            if len(inside) > 400 and thing.name != "snow":
                spreads[thing.is_ground].append(float(np.median(np.abs(inside - np.median(inside, axis=0)))))
    assert np.median(spreads[False]) < np.median(spreads[True])


def test_outlines_have_the_area_of_their_shape() -> None:
    """Relative to the enclosing circle: a square fills 2/pi of it, an equilateral triangle 3*sqrt(3)/(4*pi)."""
    expected = {"circle": 1.0, "square": 2 / np.pi, "triangle": 3 * np.sqrt(3) / (4 * np.pi)}
    fractions: dict[str, list[float]] = {name: [] for name in expected}
    for seed in range(60):
        scene = draw_scene(seed)
        height, width = scene.labels.shape
        for index, thing in enumerate(scene.things):
            y, x = np.nonzero(scene.thing_map == index)
            whole = len(y) and y.min() > 0 and x.min() > 0 and y.max() < height - 1 and x.max() < width - 1
            if thing.name in fractions and whole:
                reach = np.hypot(y - y.mean(), x - x.mean()).max()
                fractions[thing.name].append(len(y) / (np.pi * reach**2))
    for name, share in expected.items():
        # The largest of the sample is a shape that is neither squeezed nor hidden in part.
        assert max(fractions[name]) == pytest.approx(share, rel=0.12), name


def test_captions_name_what_is_visible_and_nothing_else(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert named_classes(scene.caption) == {thing.name for thing in scene.visible()}, scene.caption
        assert named_classes(scene.caption) <= {CLASSES[i] for i in np.unique(scene.labels)}


def test_captions_of_a_part_name_only_that_part() -> None:
    scene = draw_scene(0)
    names = {thing.name for thing in scene.visible(0, 0, 96, 96)}
    present = {CLASSES[i] for i in np.unique(scene.labels[:96, :96])}
    assert names <= present
    assert names


def test_captions_count_and_colour(rng: np.random.Generator) -> None:
    stars = [Thing("star", "red", "large"), Thing("star", "orange"), Thing("cross", "blue", "small")]
    plain = describe(stars, rng, adjectives=0.0)
    assert "two stars" in plain
    assert "a cross" in plain
    assert "red" not in plain
    coloured = describe(stars, rng, adjectives=1.0)
    assert all(phrase in coloured for phrase in ("a large red star", "an orange star", "a small blue cross"))


def test_captions_vary(rng: np.random.Generator) -> None:
    things = [Thing("star", "red"), Thing("snow")]
    assert len({describe(things, rng) for _ in range(50)}) >= 6


def test_every_class_is_common(scenes: list[Scene]) -> None:
    pixels = np.bincount(np.concatenate([scene.labels.ravel() for scene in scenes]), minlength=len(CLASSES))
    share = dict(zip(CLASSES, pixels / pixels.sum(), strict=True))
    assert all(share[name] > 0.02 for name in SHAPES), share
    assert all(share[name] > 0.07 for name in GROUNDS), share
    counts = Counter(thing.name for scene in scenes for thing in scene.things)
    for group in (SHAPES, GROUNDS):
        assert min(counts[name] for name in group) > 0.5 * max(counts[name] for name in group), counts


def test_colour_says_nothing_about_the_shape(scenes: list[Scene]) -> None:
    colours = {name: {t.colour for s in scenes for t in s.things if t.name == name} for name in SHAPES}
    assert all(len(seen) == 10 for seen in colours.values()), colours


@pytest.mark.parametrize("name", GROUNDS)
def test_grounds_vary_but_stay_in_range(name: str, rng: np.random.Generator) -> None:
    first, second = (GROUND_PAINTERS[name](rng, 60, 80) for _ in range(2))
    assert first.shape == (60, 80, 3)
    assert 0.0 <= first.min() < first.max() <= 1.0
    assert np.abs(first - second).mean() > 0.01


def test_written_scenes_are_the_drawn_ones(tmp_path: Path) -> None:
    write_scenes(tmp_path, 3, seed=5)
    assert sorted(path.name for path in (tmp_path / "images").iterdir()) == [f"0000{i}.jpg" for i in range(3)]
    for index in range(3):
        scene = draw_scene(5 + index)
        with Image.open(tmp_path / f"labels/0000{index}.png") as labels:
            assert labels.mode == "L"
            assert np.array_equal(np.asarray(labels), scene.labels)
        with Image.open(tmp_path / f"images/0000{index}.jpg") as image:
            difference = np.abs(np.asarray(image, dtype=int) - scene.image)
        assert difference.mean() < 5


def test_training_seeds_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seeds"):
        write_scenes(tmp_path, 2, seed=FIRST_TRAINING_SEED - 1)
