"""A tiny random CLIP and material to segment."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import open_clip
import pytest
import torch

from ovss_ray.vocabulary import Vocabulary, load_vocabulary
from tests import tiny_models

# Models of methods that do not run on the tiny vision transformer: 64 x 64 pixels, 24 joint dimensions as well.
OTHER_MODELS: dict[str, Callable[[], torch.nn.Module]] = {"convclip": tiny_models.build_conv}


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """The models are tiny: more threads only wait for each other."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny_clip() -> open_clip.CLIP:
    """A random open_clip model with native input 64, patch 8, 4 blocks; shared, because nothing may change it."""
    return tiny_models.build()


@pytest.fixture(scope="session")
def clip_for(tiny_clip: open_clip.CLIP) -> Callable[[str], torch.nn.Module]:
    """The model on which the shared tests run a method, by its name."""

    @cache
    def model(method: str) -> torch.nn.Module:
        return OTHER_MODELS[method]() if method in OTHER_MODELS else tiny_clip

    return model


@pytest.fixture(scope="session")
def deep_clip_for(clip_for: Callable[[str], torch.nn.Module]) -> Callable[[str], torch.nn.Module]:
    """As `clip_for`, with 12 blocks, as the vision transformers have for which most methods were published."""
    deep = tiny_models.build(layers=12)
    return lambda method: clip_for(method) if method in OTHER_MODELS else deep


@pytest.fixture(scope="session")
def vocabulary() -> Vocabulary:
    """Four classes, one with synonyms, the last one the background."""
    return load_vocabulary(
        {"cat": ["kitten"], "dog": [], "grass": [], "other": []}, templates="single", background="other"
    )


@pytest.fixture(scope="session")
def images() -> list[np.ndarray]:
    """Images of sizes that meet every case: native, larger, smaller than a window, than a patch, one pixel."""
    rng = np.random.default_rng(3)
    sizes = [(64, 64), (70, 110), (110, 70), (64, 64), (20, 30), (1, 1), (1, 90), (90, 2)]
    return [smooth_image(rng, *size) for size in sizes]


def smooth_image(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """An image of a few random coloured areas, so that patches differ."""
    coarse = rng.integers(0, 256, (height // 16 + 1, width // 16 + 1, 3), dtype=np.uint8)
    fine = rng.integers(-20, 20, (height, width, 3))
    big = coarse.repeat(16, 0).repeat(16, 1)[:height, :width]
    return np.clip(big + fine, 0, 255).astype(np.uint8)
