"""The whole demo: scenes, run, scores and page, with the shipped weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import ovss_ray
from ovss_ray.demo.scenes import CLASSES
from ovss_ray.demo.tour import Tour, take_tour
from ovss_ray.errors import SettingError

SCENES = 4


@pytest.fixture(scope="module")
def tour(tmp_path_factory: pytest.TempPathFactory) -> Tour:
    return take_tour(tmp_path_factory.mktemp("tour"), scenes=SCENES, seed=40, engine="local")


def test_tour_leaves_scenes_a_run_and_a_page(tour: Tour) -> None:
    assert len(list(tour.images.iterdir())) == SCENES
    with ovss_ray.open_run(tour.run) as run:
        assert run.num_images == SCENES
        assert run.vocabulary.names == CLASSES
        assert run.status_counts() == {"ok": SCENES}
    page = tour.page.read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 * SCENES
    assert all(name in page for name in CLASSES)
    assert f"{100 * tour.miou:.1f} %" in page
    assert "http" not in page


def test_scores_are_those_of_the_label_maps(tour: Tour) -> None:
    """Recounted class by class from what is on disk."""
    truth, prediction = [], []
    with ovss_ray.open_run(tour.run) as run:
        for image_id, labels in run.label_maps():
            truth.append(np.asarray(Image.open(tour.images.parent / "labels" / f"{image_id:05d}.png")))
            prediction.append(labels)
    true, predicted = np.stack(truth), np.stack(prediction)
    assert tour.pixel_accuracy == pytest.approx(float((true == predicted).mean()))
    for index, name in enumerate(CLASSES):
        both = ((true == index) & (predicted == index)).sum()
        either = ((true == index) | (predicted == index)).sum()
        assert tour.class_iou[name] == pytest.approx(both / either if either else float("nan"), nan_ok=True)
    assert tour.miou == pytest.approx(np.nanmean(list(tour.class_iou.values())))


def test_the_shipped_model_really_segments(tour: Tour) -> None:
    # Labelling everything as the most common class scores about 0.01 mIoU.
    assert tour.miou > 0.4
    assert tour.pixel_accuracy > 0.6


def test_doing_it_again_continues_and_agrees(tour: Tour) -> None:
    before = {path: path.stat().st_mtime_ns for path in (tour.run / "shards").iterdir()}
    again = take_tour(tour.images.parent, scenes=SCENES, seed=40, engine="local")
    assert (again.miou, again.pixel_accuracy) == (tour.miou, tour.pixel_accuracy)
    assert again.class_iou == pytest.approx(tour.class_iou, nan_ok=True)
    assert {path: path.stat().st_mtime_ns for path in (tour.run / "shards").iterdir()} == before


def test_other_scenes_need_another_folder(tour: Tour) -> None:
    with pytest.raises(SettingError, match="4 scenes with seed 40"):
        take_tour(tour.images.parent, scenes=SCENES, seed=41, engine="local")


def test_training_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="seed"):
        take_tour(tmp_path, scenes=2, seed=2**32, engine="local")
