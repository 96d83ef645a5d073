"""Files of image-level classes: formats, names of images, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ovss_ray.choose.image_classes import ImageClasses, read_image_classes
from ovss_ray.errors import InputError, OvssError, SettingError
from ovss_ray.images.stores import open_store
from ovss_ray.vocabulary import load_vocabulary

VOCABULARY = load_vocabulary(["ground", "cat", "dog", "door, double"], background="ground")
EXPECTED = {"a.jpg": (1, 2), "b.jpg": (3,), "c.jpg": ()}
ROWS: list[tuple[str, list[str]]] = [("a.jpg", ["dog", "cat", "ground"]), ("b.jpg", ["door, double"]), ("c.jpg", [])]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "classes.csv"
    path.write_text('Image,Classes\na.jpg,dog;cat;ground\nb.jpg,"door, double"\nc.jpg,\n')
    assert read_image_classes(str(path), VOCABULARY).classes == EXPECTED


def test_csv_with_commas_and_with_one_row_per_class(tmp_path: Path) -> None:
    path = tmp_path / "classes.csv"
    path.write_text('file_name,label\na.jpg,"dog, cat"\na.jpg,ground\nb.jpg,"door, double"\nc.jpg,\n')
    assert read_image_classes(str(path), VOCABULARY).classes == EXPECTED


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "classes.jsonl"
    path.write_text("\n".join(json.dumps({"image": name, "classes": classes}) for name, classes in ROWS))
    assert read_image_classes(str(path), VOCABULARY).classes == EXPECTED


def test_parquet_in_an_object_store(s3: str) -> None:
    table = pa.table({"uri": [name for name, _ in ROWS], "labels": [classes for _, classes in ROWS]})
    fs, bucket = open_store(s3)
    with fs.open(f"{bucket}/classes.parquet", "wb") as file:
        pq.write_table(table, file)
    assert read_image_classes(f"{s3}/classes.parquet", VOCABULARY).classes == EXPECTED


@pytest.mark.parametrize(
    ("uri", "name"),
    [
        ("s3://bucket/x/a.jpg", "a.jpg"),
        ("/data/y/a.jpg", "y/a.jpg"),
        ("https://host/z/b.png", "b"),
        ("tar://train/a.jpg::s3://bucket/train-0.tar", "a.jpg"),
        ("s3://bucket/exact/c.jpg", "s3://bucket/exact/c.jpg"),
        ("/data/unknown.jpg", None),
    ],
)
def test_images_are_found_by_the_longest_name(uri: str, name: str | None) -> None:
    names = ["a.jpg", "y/a.jpg", "b", "c.jpg", "s3://bucket/exact/c.jpg"]
    assert ImageClasses("classes.csv", dict.fromkeys(names, ())).name_of(uri) == name


def test_one_name_for_two_images_is_refused() -> None:
    known = ImageClasses("classes.csv", {"a.jpg": (1,), "y/a.jpg": (2,)})
    known.check_unambiguous(["/x/a.jpg", "/y/a.jpg", "/x/a.jpg"])
    with pytest.raises(SettingError, match=r"'a\.jpg' is the name of /x/a\.jpg and of /z/a\.jpg"):
        known.check_unambiguous(["/x/a.jpg", "/z/a.jpg"])


@pytest.mark.parametrize(
    ("name", "text", "kind", "sentence"),
    [
        ("c.csv", "image,classes\na.jpg,cot\n", SettingError, "the class 'cot'.*did you mean 'cat'"),
        (
            "c.csv",
            "picture,classes\na.jpg,cat\n",
            SettingError,
            "no column of images.*its columns are picture, classes",
        ),
        ("c.csv", "image,what\na.jpg,cat\n", SettingError, "no column of classes"),
        ("c.csv", "image,classes\n", InputError, "names no image"),
        ("c.txt", "a.jpg\n", SettingError, "is no file of image classes"),
        ("c.jsonl", "nothing\n", InputError, "is not JSON"),
        ("c.parquet", "nothing\n", InputError, "cannot be read as Parquet"),
    ],
)
def test_bad_files_are_explained(tmp_path: Path, name: str, text: str, kind: type[OvssError], sentence: str) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(kind, match=sentence):
        read_image_classes(str(path), VOCABULARY)


def test_a_missing_file_is_explained(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere\.csv cannot be read"):
        read_image_classes(str(tmp_path / "nowhere.csv"), VOCABULARY)


def test_digests_follow_the_content(tmp_path: Path) -> None:
    digests = []
    for number, rows in enumerate(("a.jpg,cat\nb.jpg,dog", "b.jpg,dog\na.jpg,cat", "a.jpg,dog\nb.jpg,dog")):
        path = tmp_path / f"{number}.csv"
        path.write_text(f"image,classes\n{rows}\n")
        digests.append(read_image_classes(str(path), VOCABULARY).digest)
    assert digests[0] == digests[1] != digests[2]
