"""Ground truth from folders of one's own."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from label_files import save_grey, save_indexed, save_rgb
from PIL import Image

from ovss_ray.errors import InputError, SettingError
from ovss_ray.evaluation.ground_truth import (
    ColourAnnotationError,
    DamagedAnnotationError,
    MissingAnnotationError,
    UnknownIdsError,
    open_folder_truth,
)

CAMVID = Path(__file__).parents[2] / "../shared/data/camvid"
CLASSES = ["road", "tree", "car"]
SHAPE = (5, 8)


def some_labels(rng: np.random.Generator, values: list[int], dtype: type = np.uint8) -> np.ndarray:
    return rng.choice(values, SHAPE).astype(dtype)


def test_values_are_class_ids_and_255_is_ignored(tmp_path: Path, rng: np.random.Generator) -> None:
    labels = some_labels(rng, [0, 1, 2, 255])
    save_grey(tmp_path / "masks/a.png", labels)
    save_indexed(tmp_path / "masks/b.png", labels)
    save_grey(tmp_path / "masks/c.tif", labels.astype(np.uint16))
    truth = open_folder_truth(tmp_path / "masks", CLASSES)
    assert (truth.name, truth.names(), truth.expected_images) == ("masks", ("a", "b", "c"), None)
    for name in truth.names():
        read = truth.read(name)
        assert read.dtype == np.uint8
        np.testing.assert_array_equal(read, labels)


def test_more_than_255_classes_are_16_bits_wide_with_65535_ignored(tmp_path: Path, rng: np.random.Generator) -> None:
    labels = some_labels(rng, [0, 255, 256, 299, 65535], np.uint16)
    save_grey(tmp_path / "a.png", labels)
    save_grey(tmp_path / "b.png", np.full(SHAPE, 255, np.uint8))
    truth = open_folder_truth(tmp_path, [f"class {number}" for number in range(300)])
    assert truth.ignore_index == 65535
    np.testing.assert_array_equal(truth.read("a"), labels)
    assert truth.read("b").dtype == np.uint16
    assert (truth.read("b") == 255).all()  # a class here


def test_a_stated_ignore_value_is_the_only_one(tmp_path: Path) -> None:
    save_grey(tmp_path / "a.png", np.array([[0, 2, 11]], np.uint8))
    save_grey(tmp_path / "b.png", np.array([[0, 255]], np.uint8))
    truth = open_folder_truth(tmp_path, CLASSES, ignore_index=11)
    assert truth.read("a").tolist() == [[0, 2, 255]]
    with pytest.raises(UnknownIdsError, match=r"255 \(1 pixels\); check"):
        truth.read("b")
    with pytest.raises(SettingError, match="the value 1 cannot be ignored, because it is that of the class 'tree'"):
        open_folder_truth(tmp_path, CLASSES, ignore_index=1)


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("map.yaml", "0: ignore\n7: road\n21: 1\n26: car\n33: car\n"),
        ("map.json", '{"0": "ignore", "7": "road", "21": 1, "26": "car", "33": 2}'),
        ("map.csv", "value,class\n0,ignore\n7,road\n21,tree\n26,2\n33, car\n"),
        ("map.csv", "Name, ID\nignore,0\nroad,7\ntree,21\ncar,26\ncar,33\n"),
    ],
)
def test_id_maps_from_files(file: str, text: str, tmp_path: Path) -> None:
    save_grey(tmp_path / "labels/a.png", np.array([[0, 7, 21, 26, 33, 255]], np.uint8))
    (tmp_path / file).write_text(text)
    truth = open_folder_truth(tmp_path / "labels", CLASSES, id_map=tmp_path / file)
    assert truth.read("a").tolist() == [[255, 0, 1, 2, 2, 255]]


def test_an_id_map_leaves_other_values_unknown_and_may_use_255(tmp_path: Path) -> None:
    save_grey(tmp_path / "a.png", np.array([[1, 2, 2, 255]], np.uint8))
    truth = open_folder_truth(tmp_path, CLASSES, id_map={255: "tree", 1: 0})
    with pytest.raises(UnknownIdsError) as caught:
        truth.read("a")
    assert (caught.value.values, caught.value.counts) == ((2,), (2,))
    truth = open_folder_truth(tmp_path, CLASSES, id_map={255: "tree", 1: 0}, ignore_index=2)
    assert truth.read("a").tolist() == [[0, 255, 255, 1]]


COLOURS = {"128,64,128": "road", "#00FF00": "tree", (0, 0, 142): 2, "0, 0, 0": "ignore"}
PIXELS = np.array([[(128, 64, 128), (0, 255, 0)], [(0, 0, 142), (0, 0, 0)]], np.uint8)


@pytest.mark.parametrize("id_map", [COLOURS, "name,r,g,b\nroad,128,64,128\ntree,0,255,0\ncar,0,0,142\nignore,0,0,0\n"])
def test_colour_images_with_a_map_of_colours(id_map: Any, tmp_path: Path) -> None:
    save_rgb(tmp_path / "labels/a.png", PIXELS)
    Image.fromarray(PIXELS).quantize(4).save(tmp_path / "labels/b.png")  # the same colours in a palette
    if isinstance(id_map, str):
        (tmp_path / "classes.csv").write_text(id_map)
        id_map = tmp_path / "classes.csv"
    truth = open_folder_truth(tmp_path / "labels", CLASSES, id_map=id_map)
    assert truth.read("a").tolist() == [[0, 1], [2, 255]]
    assert truth.read("b").tolist() == [[0, 1], [2, 255]]
    save_rgb(tmp_path / "labels/a.png", np.where(PIXELS == 142, 141, PIXELS))
    with pytest.raises(UnknownIdsError, match=r"not ignored: 0,0,141 \(1 pixels\)"):
        pickle.loads(pickle.dumps(truth)).read("a")


def test_a_colour_image_without_a_map_is_refused_with_advice(tmp_path: Path) -> None:
    save_rgb(tmp_path / "a.png", PIXELS)
    with pytest.raises(SettingError, match=r"a\.png .* colour image, and a label map .* id map \('128,64,128: road'\)"):
        open_folder_truth(tmp_path, CLASSES)
    with pytest.raises(SettingError, match="write 'r,g,b: ignore' in it"):
        open_folder_truth(tmp_path, CLASSES, id_map=COLOURS, ignore_index=0)
    save_grey(tmp_path / "a.png", np.zeros(SHAPE, np.uint8))
    save_rgb(tmp_path / "b.png", PIXELS)
    with pytest.raises(SettingError, match=r"a\.png has no colours"):
        open_folder_truth(tmp_path, CLASSES, id_map=COLOURS)
    with pytest.raises(ColourAnnotationError, match=r"b\.png"):
        open_folder_truth(tmp_path, CLASSES).read("b")


@pytest.mark.parametrize(
    ("id_map", "message"),
    [
        ({}, "is empty"),
        ({"7": "roda"}, "'roda' is neither one of the classes .* did you mean 'road'"),
        ({"7": 3}, "nor an id from 0 to 2"),
        ({"7": None}, "'' is neither"),
        ({"-1": "road"}, "'-1' is neither a number from 0 to 65535 nor a colour"),
        ({"70000": "road"}, "'70000' is neither"),
        ({"1,2,256": "road"}, "has a part over 255"),
        ({"7": "road", 7: "car"}, "7 is given twice"),
        ({"#010203": "road", "1,2,3": "car"}, "1,2,3 is given twice"),
        ({"7": "road", "1,2,3": "car"}, "mixes numbers and colours"),
        ("map.txt", "not the name of a .yaml, .json or .csv file"),
        ("map.yaml", "the id map .* does not exist"),
    ],
)
def test_id_maps_that_cannot_be_used(id_map: Any, message: str, tmp_path: Path) -> None:
    save_grey(tmp_path / "a.png", np.zeros(SHAPE, np.uint8))
    source = str(tmp_path / id_map) if isinstance(id_map, str) else id_map
    with pytest.raises(SettingError, match=message):
        open_folder_truth(tmp_path, CLASSES, id_map=source)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("map.json", "[1, 2]", "must hold lines"),
        ("map.json", '{"7": "road",', "cannot be read as JSON"),
        ("map.json", '{"7": "road", "7": "car"}', "7 is given twice"),
        ("map.yaml", "7: road\n7: car\n", "given twice"),
        ("map.yaml", "- road\n", "must hold lines"),
        ("map.csv", "7,road\n", "must begin with a line of headings"),
        ("map.csv", "r,g,class\n1,2,road\n", "must begin with a line of headings"),
    ],
)
def test_id_map_files_that_cannot_be_used(file: str, text: str, message: str, tmp_path: Path) -> None:
    save_grey(tmp_path / "a.png", np.zeros(SHAPE, np.uint8))
    (tmp_path / file).write_text(text)
    with pytest.raises(SettingError, match=message):
        open_folder_truth(tmp_path, CLASSES, id_map=tmp_path / file)


def test_names_in_nested_folders(tmp_path: Path) -> None:
    for value, name in enumerate(["seq1/0001", "seq2/0001", "0001"]):
        save_grey(tmp_path / f"{name}.png", np.full(SHAPE, value, np.uint8))
    save_grey(tmp_path / ".thumbs/0001.png", np.zeros(SHAPE, np.uint8))
    truth = open_folder_truth(tmp_path, CLASSES)
    assert truth.names() == ("0001", "seq1/0001", "seq2/0001")
    assert truth.name_of("s3://photos/drive/seq2/0001.jpg") == "seq2/0001"
    assert truth.name_of("tar://seq1/0001.jpg::s3://photos/all.tar") == "seq1/0001"
    assert truth.name_of("/photos/0001.jpg") == "0001"
    assert truth.name_of("/photos/seq3/0002.v2.jpg") == "0002.v2"
    assert truth.read("seq2/0001")[0, 0] == 1
    with pytest.raises(MissingAnnotationError, match="seq3/0001 is not in"):
        truth.read("seq3/0001")


def test_suffixes_of_labels_and_images(tmp_path: Path) -> None:
    save_grey(tmp_path / "0001_L.png", np.ones(SHAPE, np.uint8))
    save_rgb(tmp_path / "0001_colour.png", np.zeros((*SHAPE, 3)))
    truth = open_folder_truth(tmp_path, CLASSES, label_suffix="_L", image_suffix="_left")
    assert truth.names() == ("0001",)
    assert truth.name_of("/images/0001_left.jpg") == "0001"
    assert truth.read("0001")[0, 0] == 1
    with pytest.raises(InputError, match=r"looked for \*_M\.png, .*; there is 0001_L\.png, 0001_colour\.png$"):
        open_folder_truth(tmp_path, CLASSES, label_suffix="_M")


def test_two_label_images_of_one_name_are_refused(tmp_path: Path) -> None:
    save_grey(tmp_path / "a.png", np.zeros(SHAPE, np.uint8))
    save_grey(tmp_path / "a.tif", np.zeros(SHAPE, np.uint8))
    with pytest.raises(InputError, match=r"two label images of a: a\.(png|tif) and a\.(png|tif); remove one"):
        open_folder_truth(tmp_path, CLASSES)


def test_a_damaged_first_file_does_not_keep_the_folder_from_being_opened(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    save_grey(tmp_path / "b.png", np.ones(SHAPE, np.uint8))
    truth = open_folder_truth(tmp_path, CLASSES)
    with pytest.raises(DamagedAnnotationError, match=r"a\.png is a damaged PNG"):
        truth.read("a")
    assert truth.read("b").all()


def test_the_same_from_a_bucket(s3: str, tmp_path: Path, rng: np.random.Generator) -> None:
    import s3fs

    labels = some_labels(rng, [0, 1, 2, 9])
    save_grey(tmp_path / "labels/seq 1/a#1.png", labels)
    (tmp_path / "map.yaml").write_text("0: road\n1: tree\n2: car\n9: ignore\n")
    s3fs.S3FileSystem().put(f"{tmp_path}/", f"{s3}/", recursive=True)
    truth = open_folder_truth(f"{s3}/labels", CLASSES, id_map=f"{s3}/map.yaml")
    assert truth.names() == ("seq 1/a#1",)
    assert truth.name_of("/images/seq 1/a#1.jpg") == "seq 1/a#1"
    np.testing.assert_array_equal(truth.read("seq 1/a#1"), np.where(labels == 9, 255, labels))


def documented(name: str, path: Path) -> Path:
    """A file of the worked example, as docs/evaluation.md shows it."""
    page = (Path(__file__).parents[2] / "docs/evaluation.md").read_text()
    block = page.partition(f"`{name}`:\n\n```")[2].partition("```")[0]
    (path / name).write_text(block.partition("\n")[2])
    return path / name


def test_the_worked_example_of_the_documentation(tmp_path: Path) -> None:
    save_grey(tmp_path / "valannot/a.png", np.arange(12, dtype=np.uint8)[None])
    classes, id_map = documented("camvid.txt", tmp_path), documented("camvid_ids.yaml", tmp_path)
    truth = open_folder_truth(tmp_path / "valannot", classes, id_map=id_map)
    assert truth.read("a").tolist() == [[*range(11), 255]]
    assert truth.vocabulary.names[::5] == ("Sky", "Tree", "Bicyclist")


@pytest.mark.skipif(not CAMVID.is_dir(), reason="needs CamVid")
def test_real_camvid() -> None:
    names = (CAMVID / "classes.txt").read_text().split()
    truth = open_folder_truth(CAMVID / "valannot", names[:11], ignore_index=11)
    assert len(truth.names()) == 101
    seen = set()
    for image in sorted((CAMVID / "val").iterdir())[::10]:
        name = truth.name_of(str(image))
        raw = np.asarray(Image.open(CAMVID / "valannot" / f"{name}.png"))
        np.testing.assert_array_equal(truth.read(name), np.where(raw == 11, 255, raw))
        seen |= set(np.unique(raw).tolist())
    assert seen == set(range(12))
