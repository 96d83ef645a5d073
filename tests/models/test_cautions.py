"""Labels that mean nothing are said to: before the run, in its record, in its summary, and in Python."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import ovss_ray
from ovss_ray.errors import MeaninglessLabelsWarning
from ovss_ray.run.driver import run_job
from ovss_ray.spec import JobSpec
from tests import processes
from tests.run.conftest import make_spec, photos

__all__ = ["make_spec", "photos"]
MakeSpec = Callable[..., JobSpec]
RANDOM = "ovss-demo/random:0 has random weights: good for timing, but its labels mean nothing"
IMAGE = np.zeros((64, 64, 3), np.uint8)


def test_a_run_with_random_weights_says_so_from_beginning_to_end(photos: Path, tmp_path: Path) -> None:
    flags = ["--classes", "cat,dog", "--clip", "ovss-demo/random", "--engine", "local", "--limit", "2"]
    result = processes.ovss_ray("label", str(photos), str(tmp_path / "run"), *flags)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count(RANDOM) == 1
    assert f"Warning: {RANDOM}\n" in result.stdout
    assert json.loads((tmp_path / "run" / "run.json").read_text())["warnings"] == [RANDOM]
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"] == [RANDOM]
    assert ovss_ray.open_run(str(tmp_path / "run")).warnings == (RANDOM,)
    assert f"Warning: {RANDOM}\n" in processes.ovss_ray("status", str(tmp_path / "run")).stdout


@pytest.mark.parametrize(
    ("classes", "unseen"),
    [
        ("circle,star,grass", None),
        ("a red circle,The Small Stars", None),
        ("cat,star,dog", "2 of these 3 classes, and their labels mean nothing: cat, dog"),
        ("traffic circle,grass", "1 of these 2 classes, and their labels mean nothing: traffic circle"),
        ("pets: cat, dog\nlawn: grass", "1 of these 2 classes, and their labels mean nothing: pets"),
        ("cityscapes", "19 of these 19 classes, and their labels mean nothing: road, sidewalk, "),
        ("voc21", "20 of these 20 classes"),  # the background is what is no class
    ],
)
def test_the_demos_model_names_the_classes_that_it_never_saw(
    make_spec: MakeSpec, tmp_path: Path, caplog: pytest.LogCaptureFixture, classes: str, unseen: str | None
) -> None:
    if "\n" in classes:
        (tmp_path / "classes.txt").write_text(classes)
        classes = str(tmp_path / "classes.txt")
    with caplog.at_level(logging.WARNING), warnings.catch_warnings():
        warnings.simplefilter("error", MeaninglessLabelsWarning)  # said by the driver alone
        summary = run_job(make_spec(classes=classes, clip="demo", limit=1))
    if unseen is None:
        assert (summary.warnings, caplog.text) == ([], "")
    else:
        (warning,) = summary.warnings
        assert "was trained on drawings of circle, square, triangle, " in warning
        assert unseen in warning
        assert caplog.text.count(warning) == 1


def test_a_long_list_of_unseen_classes_is_cut(make_spec: MakeSpec) -> None:
    (warning,) = run_job(make_spec(classes="cityscapes", clip="demo", limit=1)).warnings
    assert warning.endswith(" and 9 more")


def test_python_warns_once_it_knows_the_classes() -> None:
    segmenter = ovss_ray.load_segmenter("maskclip", clip="demo", device="cpu")
    with pytest.warns(MeaninglessLabelsWarning, match="never saw 1 of these 2 classes.*: cat$"):
        segmenter.segment(IMAGE, "cat,circle")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        segmenter.segment(IMAGE, "star,circle")
    with pytest.warns(MeaninglessLabelsWarning, match=RANDOM):
        ovss_ray.load_segmenter("maskclip", clip="ovss-demo/random", device="cpu").segment(IMAGE, "star")
