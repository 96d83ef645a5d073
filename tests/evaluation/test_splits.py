"""The images of a benchmark's split as an input: those of the split and no others, wherever the data set lies."""

from __future__ import annotations

import logging
from pathlib import Path

import fsspec
import numpy as np
import pytest

from ovss_ray import open_run
from ovss_ray.errors import InputError, SettingError
from ovss_ray.evaluation.ground_truth import BENCHMARKS, open_ground_truth
from ovss_ray.images.references import ImageRef
from ovss_ray.images.splits import BenchmarkSplit, parse_split
from ovss_ray.run.additions import extend_run, load_job
from ovss_ray.run.driver import run_job
from ovss_ray.run.job import images_of
from ovss_ray.spec import JobSpec
from tests.evaluation.benchmark_trees import TREES, save_photo

HOW = {"classes": "cat,dog", "templates": "single", "clip": "ovss-demo/random", "engine": "local"}


def listed(uri: str, **fields: object) -> list[ImageRef]:
    return list(images_of(JobSpec.build({"input": uri, "run": "run", **HOW, **fields}, source="test")))


@pytest.mark.parametrize("benchmark", BENCHMARKS)
def test_only_the_images_of_the_split_are_listed_and_each_has_its_truth(
    benchmark: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    tree = TREES[benchmark]
    tree.write(tmp_path, rng)
    found = listed(f"benchmark://{benchmark}/val::{tmp_path}")
    assert [image.uri for image in found] == [str(tmp_path / tree.image.format(name)) for name in tree.names]
    truth = open_ground_truth(benchmark, tmp_path)
    assert tuple(truth.name_of(image.uri) for image in found) == truth.names() == tree.names


@pytest.mark.parametrize(
    ("benchmark", "inside"),
    [
        ("voc21", "VOCdevkit"),
        ("voc21", "VOCdevkit/VOC2012"),
        ("context59", "VOCdevkit/VOC2010"),
        ("ade20k", "ADEChallengeData2016"),
        ("ade847", "ADE20K_2021_17_01"),
    ],
)
def test_the_root_may_be_inside_as_for_ground_truth(
    benchmark: str, inside: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    TREES[benchmark].write(tmp_path, rng)
    assert listed(f"benchmark://{benchmark}::{tmp_path / inside}/") == listed(f"benchmark://{benchmark}::{tmp_path}")


def test_another_split(tmp_path: Path, rng: np.random.Generator) -> None:
    TREES["voc21"].write(tmp_path, rng)
    TREES["cityscapes"].write(tmp_path, rng)
    assert [image.uri[-15:] for image in listed(f"benchmark://voc20/train::{tmp_path}")] == ["2007_000032.jpg"]
    (image,) = listed(f"benchmark://cityscapes/train::{tmp_path}")
    assert image.uri.endswith("train/aachen/aachen_000000_000019_leftImg8bit.png")


def test_images_that_were_shrunk_for_the_published_numbers_come_first(tmp_path: Path, rng: np.random.Generator) -> None:
    tree = TREES["ade847"]
    tree.write(tmp_path, rng)
    shrunk = tmp_path / "ADE20K_2021_17_01/images_detectron2/validation"
    save_photo(shrunk / f"{tree.names[1]}.jpg", rng)
    assert [image.uri for image in listed(f"benchmark://ade847::{tmp_path}")] == [str(shrunk / f"{tree.names[1]}.jpg")]


def test_a_bucket_gives_sizes_and_marks_too(s3: str, tmp_path: Path, rng: np.random.Generator) -> None:
    fs = fsspec.filesystem("s3")
    for benchmark in ("voc21", "cityscapes"):
        tree = TREES[benchmark]
        tree.write(tmp_path, rng)
        fs.put(f"{tmp_path}/", f"{s3}/data", recursive=True)
        found = listed(f"benchmark://{benchmark}::{s3}/data")
        assert [image.uri for image in found] == [f"{s3}/data/{tree.image.format(name)}" for name in tree.names]
        sizes = [(tmp_path / tree.image.format(name)).stat().st_size for name in tree.names]
        assert [image.size_bytes for image in found] == sizes
        assert all(image.etag for image in found)


def test_limit_and_sample_hold_for_the_split(tmp_path: Path, rng: np.random.Generator) -> None:
    TREES["coco_stuff"].write(tmp_path, rng)
    for number in range(1000, 1040):
        save_photo(tmp_path / f"val2017/{number:012d}.jpg", rng)
    uri = f"benchmark://coco_stuff::{tmp_path}"
    everything = listed(uri)
    assert len(everything) == 42
    assert listed(uri, limit=5) == everything[:5]
    half = listed(uri, sample=0.5)
    assert 5 < len(half) < 37
    assert half == [image for image in everything if image in half]
    assert listed(uri, sample=0.5, limit=2) == half[:2]
    with pytest.raises(InputError, match="use a larger sample"):
        listed(uri, sample=1e-9)
    with pytest.raises(InputError, match="none of the 42 images of the split in .* is left by sample and extensions"):
        listed(uri, extensions="png")


def test_fewer_images_than_were_published_are_told(
    tmp_path: Path, rng: np.random.Generator, caplog: pytest.LogCaptureFixture
) -> None:
    TREES["voc21"].write(tmp_path, rng)
    with caplog.at_level(logging.WARNING):
        listed(f"benchmark://voc21::{tmp_path}")
    assert "JPEGImages has 2 images of the split 'val' of voc21, published are 1,449" in caplog.text


@pytest.mark.parametrize(
    ("uri", "error", "said"),
    [
        ("benchmark://voc12::{root}", SettingError, "there is no benchmark 'voc12', only voc21, .*did you mean"),
        ("benchmark://ade20k/test::{root}", SettingError, "ade20k has no split 'test', only val, train"),
        ("benchmark://voc21:{root}", SettingError, "names no images; write for example benchmark://voc21/val::DATA"),
        ("benchmark://voc21::", SettingError, "names no images"),
        ("benchmark://::{root}", SettingError, "names no images"),
        ("benchmark://voc21::{root}/nowhere", InputError, "there is no folder .*/nowhere"),
        (
            "benchmark://cityscapes::{root}",
            InputError,
            r"no images of cityscapes in .*: looked for \[cityscapes/\]\[leftImg8bit/\]val/<city>/<name>_leftImg8bit"
            r".png; there is VOCdevkit/",
        ),
        ("benchmark://voc21/trainval::{root}", InputError, "no list of the split 'trainval'"),
        ("benchmark://voc21/train::{root}/other", InputError, "none of the 1 images in .* is of the split 'train'"),
    ],
)
def test_what_cannot_be_listed_is_said_in_one_sentence(
    uri: str, error: type[Exception], said: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    TREES["voc21"].write(tmp_path, rng)
    save_photo(tmp_path / "other/VOC2012/JPEGImages/2012_004331.jpg", rng)
    (tmp_path / "other/VOC2012/ImageSets").symlink_to(tmp_path / "VOCdevkit/VOC2012/ImageSets")
    with pytest.raises(error, match=said):
        listed(uri.format(root=tmp_path))


def test_an_address_names_what_it_was_made_of() -> None:
    split = BenchmarkSplit("voc21", "train", "s3://bucket/VOCdevkit")
    assert split.uri == "benchmark://voc21/train::s3://bucket/VOCdevkit"
    assert parse_split(split.uri) == split
    assert parse_split("benchmark://voc21::data::2") == ("voc21", "val", "data::2")
    assert parse_split("s3://bucket/benchmark") is None


def test_a_run_keeps_an_address_that_holds_anywhere(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    TREES["ade20k"].write(tmp_path / "data", rng)
    monkeypatch.chdir(tmp_path)
    settings = {"short_side": 32, "crop": 32, "stride": 16}
    values = {"input": "benchmark://ade20k::data", "run": "run", "settings": settings, **HOW}
    assert run_job(JobSpec.build(values, source="test")).labelled == 2
    with open_run(str(tmp_path / "run")) as run:
        assert run.job["input"] == f"benchmark://ade20k/val::{tmp_path}/data"
    monkeypatch.chdir("/")
    run_job(JobSpec.build({**values, "input": f"benchmark://ade20k/val::{tmp_path}/data", "run": f"{tmp_path}/run"},
                          source="test"))  # fmt: skip
    assert extend_run(load_job(str(tmp_path / "run"))) is None
    save_photo(tmp_path / "data/ADEChallengeData2016/images/validation/ADE_val_00000003.jpg", rng)
    added = extend_run(load_job(str(tmp_path / "run")))
    assert added is not None
    assert added.images == 1
