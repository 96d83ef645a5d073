"""The reward against plain loops over open_clip's own model."""

from __future__ import annotations

import math

import numpy as np
import open_clip
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ovss_ray.choose.judge import Judge
from ovss_ray.choose.reward import accepted, nearest_pixels
from ovss_ray.demo.scenes import CLASSES, Scene
from ovss_ray.models.clip import load_clip
from ovss_ray.vocabulary import Vocabulary, load_vocabulary
from tests.tiny_models import build

TEMPLATES = ["a photo of a {}.", "{}"]


def plain_accepted(masked: list[list[float]], blank: list[float]) -> list[bool]:
    def probability(row: list[float], k: int) -> float:
        return math.exp(row[k]) / sum(math.exp(other) for other in row)

    return [probability(masked[k], k) > probability(blank, k) for k in range(len(blank))]


@given(st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_acceptance_is_equation_4(count: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    masked, blank = rng.normal(size=(count, count)), rng.normal(size=count)
    assert accepted(masked, blank).tolist() == plain_accepted(masked.tolist(), blank.tolist())


def test_one_class_is_never_accepted() -> None:
    assert accepted(np.array([[30.0]]), np.array([-30.0])).tolist() == [False]


def test_what_equals_the_blank_picture_is_not_accepted() -> None:
    blank = np.array([3.0, 1.0, 2.0])
    assert not accepted(np.stack([blank, blank, blank]), blank).any()


@pytest.mark.parametrize(("height", "width", "side"), [(7, 11, 4), (3, 2, 5), (4, 4, 4)])
def test_label_maps_keep_the_nearest_pixel(height: int, width: int, side: int) -> None:
    labels = np.arange(height * width).reshape(height, width)
    resized = Image.fromarray(labels.astype(np.int32)).resize((side, side), Image.Resampling.NEAREST)
    assert nearest_pixels(labels, side).tolist() == np.asarray(resized).tolist()


class PlainJudge:
    """Equations 4 and 5 word by word: one picture, one class at a time, with open_clip's own encoders."""

    def __init__(self, model: open_clip.CLIP, vocabulary: Vocabulary) -> None:
        self.model, self.side = model, model.visual.image_size[0]
        tokenizer = open_clip.SimpleTokenizer(context_length=model.context_length)
        self.texts = []
        for item in vocabulary.classes:
            queries = []
            for query in item.queries:
                mean = sum(
                    model.encode_text(tokenizer([template.replace("{}", query)]), normalize=True)[0]
                    for template in TEMPLATES
                )
                queries.append(mean / mean.norm())
            self.texts.append(queries)

    def logit(self, picture: np.ndarray, k: int) -> float:
        mean, std = torch.tensor(open_clip.OPENAI_DATASET_MEAN), torch.tensor(open_clip.OPENAI_DATASET_STD)
        pixels = ((torch.tensor(picture) / 255 - mean) / std).permute(2, 0, 1)[None].float()
        image = self.model.encode_image(pixels, normalize=True)[0]
        return float(self.model.logit_scale.exp()) * max(float(image @ text) for text in self.texts[k])

    def probability(self, picture: np.ndarray, k: int, classes: list[int]) -> float:
        return math.exp(self.logit(picture, k)) / sum(math.exp(self.logit(picture, other)) for other in classes)

    def square(self, image: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(image).resize((self.side, self.side), Image.Resampling.BICUBIC))

    def accepted(self, image: np.ndarray, labels: np.ndarray, classes: list[int]) -> list[bool]:
        square = self.square(image)
        small = np.asarray(Image.fromarray(labels).resize((self.side, self.side), Image.Resampling.NEAREST))
        found = []
        for k in classes:
            masked = square.copy()
            masked[small != k] = 0
            blank = np.zeros_like(square)
            found.append(self.probability(masked, k, classes) > self.probability(blank, k, classes))
        return found


@pytest.fixture(scope="module")
def judges() -> tuple[Judge, PlainJudge]:
    vocabulary = load_vocabulary(
        {"sky": ["sky", "clouds"], "cat": ["cat"], "grass": ["grass", "lawn", "meadow"], "ground": ["ground"]},
        templates=TEMPLATES,
        background="ground",
    )
    model = build(seed=3)
    with torch.no_grad():
        model.logit_scale.fill_(math.log(20.0))
    clip = load_clip(model, torch.device("cpu"), torch.float32)
    return Judge(clip, vocabulary), PlainJudge(model, vocabulary)


@torch.no_grad()
def test_verdicts_are_those_of_plain_loops(judges: tuple[Judge, PlainJudge], rng: np.random.Generator) -> None:
    judge, plain = judges
    sizes = [(50, 70), (64, 64), (90, 33), (40, 41), (77, 80), (61, 60)]
    images = [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]
    blocks = [rng.integers(0, 4, (3, 3), dtype=np.uint8) for _ in sizes]
    labels = [
        np.asarray(Image.fromarray(block).resize(size[::-1], Image.Resampling.NEAREST))
        for block, size in zip(blocks, sizes, strict=True)
    ]
    classes = [(0, 1, 2), (2, 0), (1, 2), (0, 1, 2), (1, 0), ()]
    found = judge.accepted([judge.square(image) for image in images], labels, classes)
    expected = [
        tuple(plain.accepted(image, one, list(ids))) for image, one, ids in zip(images, labels, classes, strict=True)
    ]
    assert found == expected
    verdicts = [verdict for image in found for verdict in image]
    assert 0 < sum(verdicts) < len(verdicts)  # or the comparison would say nothing


@torch.no_grad()
def test_similarities_are_those_of_open_clip(judges: tuple[Judge, PlainJudge], rng: np.random.Generator) -> None:
    judge, plain = judges
    pictures = [rng.integers(0, 256, (judge.side, judge.side, 3), dtype=np.uint8) for _ in range(20)]
    expected = [[plain.logit(picture, k) for k in range(4)] for picture in pictures]
    np.testing.assert_allclose(judge.similarities(pictures), expected, atol=2e-4)


def test_an_empty_mask_is_not_accepted(judges: tuple[Judge, PlainJudge], rng: np.random.Generator) -> None:
    judge, _ = judges
    square = rng.integers(0, 256, (judge.side, judge.side, 3), dtype=np.uint8)
    nothing = np.full((30, 40), 255, np.uint8)
    assert judge.accepted([square], [nothing], [(0, 1, 2)]) == [(False, False, False)]


def test_true_masks_are_accepted_more_often_than_exchanged_ones(scenes: list[Scene]) -> None:
    judge = Judge.load("demo", load_vocabulary(list(CLASSES)), device="cpu", dtype="float32")
    squares = [judge.square(scene.image) for scene in scenes]
    classes = [tuple(int(k) for k in np.unique(scene.labels)) for scene in scenes]
    exchanged = []
    for scene, ids in zip(scenes, classes, strict=True):
        table = np.arange(len(CLASSES))
        table[list(ids)] = np.roll(ids, 1)
        exchanged.append(table[scene.labels])
    right = judge.accepted(squares, [scene.labels for scene in scenes], classes)
    wrong = judge.accepted(squares, exchanged, classes)
    assert sum(map(sum, right)) > 2 * sum(map(sum, wrong))


def test_classes_that_clip_finds(judges: tuple[Judge, PlainJudge], rng: np.random.Generator) -> None:
    judge, _ = judges
    squares = [rng.integers(0, 256, (judge.side, judge.side, 3), dtype=np.uint8) for _ in range(8)]
    logits = judge.similarities(squares)[:, :3]  # the background is no candidate
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    for threshold in (0.2, 1.0):
        for row, found in zip(probabilities, judge.present(squares, threshold), strict=True):
            expected = {k for k in range(3) if row[k] >= threshold} | {int(row.argmax())}
            assert set(found) == expected
            assert list(found) == sorted(found, key=lambda k: -row[k])
