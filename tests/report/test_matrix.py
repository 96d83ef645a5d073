"""The picture of a confusion matrix: what is painted, what is written, and what many classes do to it."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from ovss_ray.report.matrix import MOST_CLASSES, ConfusionPicture, confusion_picture
from ovss_ray.vocabulary import load_vocabulary
from tests.report.test_page import Outline


def painted(html: str) -> np.ndarray:
    """The picture inside, [R, K, 4]."""
    (source,) = [source for source in Outline(html).sources if source.startswith("data:image/png;base64,")]
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))))


def random_counts(rng: np.random.Generator, classes: int) -> np.ndarray:
    counts = rng.integers(0, 100, (classes, classes + 1))
    counts[np.arange(classes), np.arange(classes)] += 300
    return counts.astype(np.int64)


def test_a_cell_is_the_share_of_the_true_pixels_and_right_ones_are_green(rng: np.random.Generator) -> None:
    counts = random_counts(rng, 5)
    picture = confusion_picture(counts, list("abcde"))
    assert (picture.rows, picture.columns) == (tuple("abcde"), (*"abcde", "no label"))
    colours = painted(picture.html())
    for row in range(5):
        for column in range(6):
            share = counts[row, column] / sum(counts[row])
            assert picture.shares[row, column] == pytest.approx(share)
            assert colours[row, column, 3] == round(255 * share**0.5)
            red, green, _ = colours[row, column, :3].tolist()
            assert (green > red) == (row == column)


def test_shares_are_written_and_told_with_the_names() -> None:
    counts = np.array([[120, 70, 10], [0, 199, 1]])
    html = confusion_picture(counts, ["<road>", "tree & bush"]).html()
    assert "<title>&lt;road&gt; labelled tree &amp; bush: 35.0 %</title>" in html
    assert "<title>&lt;road&gt; labelled no label: 5.0 %</title>" in html
    assert re.findall(r">(\d+)</text>", html) == ["60", "35", "5", "100"]  # 0.5 % is too little


def test_a_class_that_is_never_true_has_an_empty_row() -> None:
    picture = confusion_picture(np.array([[10, 10, 0], [0, 0, 0]]), ["a", "b"])
    assert picture.columns == ("a", "b")
    assert np.isnan(picture.shares[1]).all()
    assert painted(picture.html())[1, :, 3].tolist() == [0, 0]


@pytest.mark.parametrize("vocabulary", ["cityscapes", "coco_object", "coco_stuff"])
def test_all_names_can_be_read(vocabulary: str, rng: np.random.Generator) -> None:
    names = load_vocabulary(vocabulary).names
    picture = confusion_picture(random_counts(rng, len(names)), names)
    html = picture.html()
    text = "".join(Outline(html).text)
    assert all(name[:20] in text for name in names)
    assert painted(html).shape == (len(names), len(names) + 1, 4)
    size = int(re.search(r'<svg [^>]*font-size="(\d+)"', html)[1])  # type: ignore[index]
    rows = [float(y) for y in re.findall(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end" dom', html)]
    assert len(rows) == len(names)
    assert size >= 9
    assert np.diff(rows).min() >= size  # no line touches the next
    assert len(html) < 3_000_000


def test_of_very_many_classes_those_with_most_pixels_are_shown(rng: np.random.Generator) -> None:
    names = load_vocabulary("ade847").names
    counts = random_counts(rng, len(names))
    counts[5] = 0
    picture = confusion_picture(counts, names)
    true = counts.sum(axis=1)
    shown = sorted(np.argsort(-true, kind="stable")[:MOST_CLASSES].tolist())
    assert picture.rows == tuple(names[index] for index in shown)
    assert picture.columns[-2:] == ("other classes", "no label")
    np.testing.assert_allclose(picture.shares.sum(axis=1), 1.0)
    others = [index for index in range(len(names)) if index not in shown]
    assert picture.shares[0, -2] == pytest.approx(counts[shown[0], others].sum() / true[shown[0]])


def test_long_names_are_cut_and_told_in_full() -> None:
    name = "a name that is much too long for the margin of a picture"
    html = ConfusionPicture(np.ones((1, 1)), (name,), (name,)).html()
    assert html.count(f"{name[:25]}…<title>{name}</title>") == 2
