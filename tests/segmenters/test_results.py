"""Segmentations as pictures and as statistics."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from ovss_ray.errors import SettingError
from ovss_ray.labels.pictures import draw_labels
from ovss_ray.segmenters import Segmentation
from ovss_ray.vocabulary import load_vocabulary


@pytest.fixture
def segmentation() -> Segmentation:
    labels = np.zeros((40, 60), np.uint8)
    labels[:, 30:] = 1
    labels[:10, :10] = 255
    ones = np.ones(labels.shape, np.float32)
    return Segmentation(labels, 0.5 * ones, 0.25 * ones, load_vocabulary("cat,dog"))


def test_segments_are_the_statistics_of_the_classes_present(segmentation: Segmentation) -> None:
    cat, dog = segmentation.segments()
    assert (cat.class_id, cat.pixels, dog.class_id, dog.pixels) == (0, 40 * 30 - 100, 1, 40 * 30)
    assert (dog.confidence_mean, dog.margin_mean) == (0.5, 0.25)


def test_a_photo_of_values_from_0_to_1_is_refused_with_what_to_give(segmentation: Segmentation) -> None:
    photo = np.full((40, 60, 3), 0.5)
    said = r"the image is an array of float64, shape \(40x60x3\); .*np\.round\(255 \* image\)\.astype\(np\.uint8\)"
    with pytest.raises(SettingError, match=said):
        segmentation.plot(photo)
    assert segmentation.plot(np.round(255 * photo).astype(np.uint8)).size
    with pytest.raises(SettingError, match="the image is an array of float64; give one of uint8"):
        draw_labels(segmentation.labels, segmentation.vocabulary, photo)


def test_the_plot_shows_the_colours_of_the_classes(segmentation: Segmentation) -> None:
    picture = np.asarray(segmentation.plot(legend=False))
    assert picture.shape == (40, 60, 3)
    assert tuple(picture[20, 10]) == (128, 0, 0)
    assert tuple(picture[20, 40]) == (0, 128, 0)
    assert tuple(picture[5, 5]) == (0, 0, 0)
    enlarged = np.asarray(segmentation.plot())
    assert tuple(enlarged[80, 160]) == (0, 128, 0)
    assert (enlarged[160:] != 255).any()  # the legend


def test_the_plot_blends_with_the_image_and_leaves_unlabelled_pixels_alone(segmentation: Segmentation) -> None:
    image = np.full((40, 60, 3), 200, np.uint8)
    picture = np.asarray(segmentation.plot(image, legend=False))
    assert tuple(picture[5, 5]) == (200, 200, 200)
    assert tuple(picture[20, 10]) == (160, 90, 90)
    with pytest.raises(ValueError, match=r"the image has shape \(40, 61, 3\), the label map is 40 x 60"):
        segmentation.plot(np.zeros((40, 61, 3), np.uint8))


def test_the_plot_shows_the_image_that_was_labelled(segmentation: Segmentation) -> None:
    image = np.full((40, 60, 3), 200, np.uint8)
    kept = replace(segmentation, image=image)
    assert np.array_equal(np.asarray(kept.plot()), np.asarray(segmentation.plot(image)))
    other = np.full((40, 60, 3), 7, np.uint8)
    assert np.array_equal(np.asarray(kept.plot(other)), np.asarray(segmentation.plot(other)))


def test_a_notebook_shows_the_plot(segmentation: Segmentation) -> None:
    shown = Image.open(io.BytesIO(segmentation._repr_png_()))
    assert shown.format == "PNG"
    assert np.array_equal(np.asarray(shown), np.asarray(segmentation.plot()))


def test_a_segmentation_introduces_itself_in_one_line(segmentation: Segmentation) -> None:
    assert repr(segmentation) == "<Segmentation 40 x 60: dog 50.0%, cat 45.8%>"
    nothing = replace(segmentation, labels=np.full_like(segmentation.labels, 255))
    assert repr(nothing) == "<Segmentation 40 x 60: no pixel has a label>"


def test_the_plot_takes_pillow_images_as_segment_does(segmentation: Segmentation) -> None:
    image = Image.new("L", (60, 40), 77)
    expected = segmentation.plot(np.full((40, 60, 3), 77, np.uint8))
    assert np.array_equal(np.asarray(segmentation.plot(image)), np.asarray(expected))
    with pytest.raises(ValueError, match="40 x 60"):
        segmentation.plot(Image.new("L", (10, 10)))
