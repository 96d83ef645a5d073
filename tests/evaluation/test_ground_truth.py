"""The benchmarks' ground truth, from trees in the real formats, against the published definitions in plain loops."""

from __future__ import annotations

import io
import pickle
import re
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from label_files import (
    Labels,
    object_class_image,
    save_grey,
    save_indexed,
    save_lines,
    save_mat,
    save_merged,
    save_rgb,
)
from PIL import Image

from ovss_ray.errors import InputError, SettingError
from ovss_ray.evaluation.ground_truth import (
    BENCHMARKS,
    DamagedAnnotationError,
    GroundTruth,
    MissingAnnotationError,
    UnknownIdsError,
    open_ground_truth,
)
from ovss_ray.vocabulary import load_vocabulary

DATA = Path(__file__).parents[2] / "../shared/data"

# Facts of the data sets, each written down from its own documentation and not from the package's tables.
# fmt: off
CONTEXT_59 = [
    2, 9, 18, 19, 22, 23, 25, 31, 33, 34, 44, 45, 46, 59, 65, 68, 72, 80, 85, 98, 104, 105, 113, 115, 144, 158, 159,
    162, 187, 189, 207, 220, 232, 258, 259, 260, 284, 295, 296, 308, 324, 326, 347, 349, 354, 355, 360, 366, 368, 397,
    415, 416, 420, 424, 427, 440, 445, 454, 458,
]
CITYSCAPES_TRAIN_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15,
    31: 16, 32: 17, 33: 18,
}
COCO_DROPPED = {11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90}
# fmt: on
COCO_THINGS = [value for value in range(90) if value not in COCO_DROPPED]
COCO_ALL = [value for value in range(182) if value not in COCO_DROPPED]
VOC_IDS = ("2007_000033", "2007_000042", "2011_003256")
CONTEXT_IDS = ("2008_000002", "2008_000003")
SHAPE = (6, 7)

Rule = Callable[[int], int]


def mapped(values: Labels, rule: Rule, dtype: type = np.uint8) -> Labels:
    return np.array([[rule(int(value)) for value in row] for row in values], dtype)


def assert_truth(truth: GroundTruth, name: str, expected: Labels) -> None:
    read = truth.read(name)
    assert read.dtype == expected.dtype
    np.testing.assert_array_equal(read, expected)


def voc_tree(devkit: Path, rng: np.random.Generator) -> dict[str, Labels]:
    """SegmentationClass has all 21 classes, the border, and an image of another split."""
    values = {name: rng.choice([*range(21), 255], SHAPE) for name in (*VOC_IDS, "2007_000032")}
    for name, labels in values.items():
        save_indexed(devkit / "VOC2012" / "SegmentationClass" / f"{name}.png", labels)
    save_lines(devkit / "VOC2012" / "ImageSets" / "Segmentation" / "val.txt", sorted(VOC_IDS))
    save_lines(devkit / "VOC2012" / "ImageSets" / "Segmentation" / "train.txt", ["2007_000032"])
    return values


@pytest.mark.parametrize("root", [".", "VOCdevkit", "VOCdevkit/VOC2012"])
@pytest.mark.parametrize(
    ("benchmark", "rule"),
    [("voc21", lambda v: v), ("voc20", lambda v: 255 if v in (0, 255) else v - 1)],
)
def test_voc(benchmark: str, rule: Rule, root: str, tmp_path: Path, rng: np.random.Generator) -> None:
    values = voc_tree(tmp_path / "VOCdevkit", rng)
    truth = open_ground_truth(benchmark, tmp_path / root)
    assert truth.names() == VOC_IDS
    assert (truth.name, truth.ignore_index, truth.expected_images) == (benchmark, 255, 1449)
    assert truth.vocabulary == load_vocabulary(benchmark)
    for name in VOC_IDS:
        assert_truth(truth, name, mapped(values[name], rule))
    train = open_ground_truth(benchmark, tmp_path / root, split="train")
    assert (train.names(), train.expected_images) == (("2007_000032",), 1464)
    assert train.identity() != truth.identity()


def test_a_value_that_voc_does_not_have_is_named(tmp_path: Path, rng: np.random.Generator) -> None:
    voc_tree(tmp_path / "VOCdevkit", rng)
    labels = np.zeros(SHAPE, np.uint8)
    labels[0, :3], labels[1, 0] = 37, 21
    save_indexed(tmp_path / "VOCdevkit/VOC2012/SegmentationClass" / f"{VOC_IDS[0]}.png", labels)
    with pytest.raises(
        UnknownIdsError, match=rf"{VOC_IDS[0]}\.png has values .*: 21 \(1 pixels\), 37 \(3 pixels\)"
    ) as caught:
        open_ground_truth("voc21", tmp_path).read(VOC_IDS[0])
    again = pickle.loads(pickle.dumps(caught.value))
    assert (again.values, again.counts, str(again)) == ((21, 37), (1, 3), str(caught.value))


def test_files_that_the_list_has_and_the_folder_lacks_are_told_from_images_of_other_splits(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    voc_tree(tmp_path / "VOCdevkit", rng)
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass" / f"{VOC_IDS[1]}.png").unlink()
    truth = open_ground_truth("voc21", tmp_path)
    assert truth.names() == (VOC_IDS[0], VOC_IDS[2])
    with pytest.raises(MissingAnnotationError, match=f"annotation of {VOC_IDS[1]} is missing, although the list"):
        truth.read(VOC_IDS[1])
    with pytest.raises(MissingAnnotationError, match="2007_000032 is not in the split 'val' of voc21"):
        truth.read("2007_000032")


def test_a_file_that_goes_away_later_is_missing(tmp_path: Path, rng: np.random.Generator) -> None:
    voc_tree(tmp_path / "VOCdevkit", rng)
    truth = open_ground_truth("voc21", tmp_path)
    shutil.rmtree(tmp_path / "VOCdevkit/VOC2012/SegmentationClass")
    with pytest.raises(MissingAnnotationError, match=f"there is no .*{VOC_IDS[0]}"):
        truth.read(VOC_IDS[0])


def test_what_is_not_there_is_said_with_what_is(tmp_path: Path, rng: np.random.Generator) -> None:
    voc_tree(tmp_path / "VOCdevkit", rng)
    looked_for = r"looked for \[stuffthingmaps_trainval2017/\]\[val2017/\]<12 digits>\.png, or "
    with pytest.raises(InputError, match=f"no ground truth of coco_stuff in .*: {looked_for}.*; there is VOCdevkit/$"):
        open_ground_truth("coco_stuff", tmp_path)
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").unlink()
    with pytest.raises(InputError, match=r"no list of the split 'val' in .*Segmentation/val\.txt"):
        open_ground_truth("voc21", tmp_path)
    with pytest.raises(InputError, match="there is no folder"):
        open_ground_truth("voc21", tmp_path / "nowhere")
    with pytest.raises(SettingError, match="no benchmark 'voc12', only voc21, .*did you mean"):
        open_ground_truth("voc12", tmp_path)
    with pytest.raises(SettingError, match="ade20k has no split 'test', only val, train"):
        open_ground_truth("ade20k", tmp_path, split="test")


def context_values(rng: np.random.Generator) -> dict[str, list[tuple[int, Labels]]]:
    """Overlapping masks of categories of the 59, in painting order."""
    painted = {}
    for name in CONTEXT_IDS:
        categories = rng.choice(CONTEXT_59, 4, replace=False).tolist()
        painted[name] = [(category, rng.random(SHAPE) < 0.3) for category in categories]
    return painted


def paint(masks: list[tuple[int, Labels]]) -> Labels:
    values = np.zeros(SHAPE, int)
    for category, mask in masks:
        for row, column in np.argwhere(mask):
            values[row, column] = category
    return values


def context_60(category: int) -> int:
    return 0 if category == 0 else 1 + CONTEXT_59.index(category)


def context_59(category: int) -> int:
    return 255 if category == 0 else CONTEXT_59.index(category)


@pytest.mark.parametrize("root", [".", "VOCdevkit", "VOCdevkit/VOC2010"])
@pytest.mark.parametrize(("benchmark", "rule"), [("context60", context_60), ("context59", context_59)])
def test_context_from_the_merged_json(
    benchmark: str, rule: Rule, root: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    painted = context_values(rng)
    others = {"2008_000008": (SHAPE, [(CONTEXT_59[0], np.ones(SHAPE, bool))])}  # of the training split
    file = tmp_path / "VOCdevkit/VOC2010/trainval_merged.json"
    save_merged(file, {name: (SHAPE, masks) for name, masks in painted.items()} | others)
    truth = open_ground_truth(benchmark, tmp_path / root)
    assert (truth.names(), truth.expected_images) == (CONTEXT_IDS, 5104)
    for name in CONTEXT_IDS:
        assert_truth(truth, name, mapped(paint(painted[name]), rule))
    copy = pickle.loads(pickle.dumps(truth))
    np.testing.assert_array_equal(copy.read(CONTEXT_IDS[0]), truth.read(CONTEXT_IDS[0]))


@pytest.mark.parametrize(("benchmark", "rule"), [("context60", context_60), ("context59", context_59)])
def test_converted_context_gives_what_the_json_gives(
    benchmark: str, rule: Rule, tmp_path: Path, rng: np.random.Generator
) -> None:
    painted = context_values(rng)
    folder = tmp_path / "VOC2010/SegmentationClassContext"
    for name, masks in painted.items():
        save_grey(folder / f"{name}.png", mapped(paint(masks), context_60))
    truth = open_ground_truth(benchmark, tmp_path)
    assert truth.names() == CONTEXT_IDS
    for name in CONTEXT_IDS:
        assert_truth(truth, name, mapped(paint(painted[name]), rule))
    save_grey(folder / f"{CONTEXT_IDS[0]}.png", np.full(SHAPE, 60, np.uint8))
    with pytest.raises(UnknownIdsError, match=r"60 \(42 pixels\)"):
        truth.read(CONTEXT_IDS[0])


def test_a_category_of_the_json_that_is_none_of_the_59_is_named(tmp_path: Path) -> None:
    save_merged(tmp_path / "trainval_merged.json", {CONTEXT_IDS[0]: (SHAPE, [(3, np.eye(*SHAPE, dtype=bool))])})
    with pytest.raises(UnknownIdsError, match=rf"image {CONTEXT_IDS[0]} of .*merged\.json .*: 3 \(6 pixels\)"):
        open_ground_truth("context60", tmp_path).read(CONTEXT_IDS[0])


def test_a_mask_of_another_size_and_a_json_of_another_kind_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "trainval_merged.json"
    save_merged(file, {CONTEXT_IDS[0]: (SHAPE, [(2, np.ones((7, 6), bool))])})
    with pytest.raises(DamagedAnnotationError, match="a mask is of another size than the image"):
        open_ground_truth("context60", tmp_path).read(CONTEXT_IDS[0])
    for text in ('{"images": [{"id": 1}]}', file.read_text()[:-40], "[]"):
        file.write_text(text)
        with pytest.raises(InputError, match="is not the annotation file of PASCAL in Detail, or is cut off"):
            open_ground_truth("context60", tmp_path)


def test_the_shipped_list_of_context_has_5104_images() -> None:
    from importlib import resources

    names = (resources.files("ovss_ray.evaluation.ground_truth") / "context_val.txt").read_text().split()
    assert len(names) == len(set(names)) == 5104
    assert all(re.fullmatch(r"20(08|09|10)_\d{6}", name) for name in names)


@pytest.mark.parametrize("root", [".", "VOCdevkit/VOC2010", "VOCdevkit/VOC2010/trainval"])
def test_context_459_from_matlab_files(root: str, tmp_path: Path, rng: np.random.Generator) -> None:
    values = {name: rng.integers(0, 460, SHAPE) for name in CONTEXT_IDS}
    values[CONTEXT_IDS[0]][0, :4] = (0, 1, 256, 459)
    for name, labels in values.items():
        save_mat(tmp_path / f"VOCdevkit/VOC2010/trainval/{name}.mat", labels)
    save_mat(tmp_path / "VOCdevkit/VOC2010/trainval/2008_000008.mat", values[CONTEXT_IDS[0]])
    truth = open_ground_truth("context459", tmp_path / root)
    assert (truth.names(), truth.ignore_index) == (CONTEXT_IDS, 65535)
    for name in CONTEXT_IDS:
        assert_truth(truth, name, mapped(values[name], lambda v: 65535 if v == 0 else v - 1, np.uint16))
    save_mat(tmp_path / f"VOCdevkit/VOC2010/trainval/{CONTEXT_IDS[0]}.mat", np.full(SHAPE, 460))
    with pytest.raises(UnknownIdsError, match=r"460 \(42 pixels\)"):
        truth.read(CONTEXT_IDS[0])


@pytest.mark.parametrize(
    "folder", ["VOCdevkit/VOC2010/annotations_detectron2/pc459_val", "pascal_ctx_d2/annotations_ctx459/validation"]
)
def test_context_459_from_tiffs(folder: str, tmp_path: Path, rng: np.random.Generator) -> None:
    labels = rng.choice([*range(459), 65535], SHAPE).astype(np.uint16)
    labels[0, :3] = (255, 458, 65535)
    save_grey(tmp_path / folder / f"{CONTEXT_IDS[1]}.tif", labels)
    truth = open_ground_truth("context459", tmp_path)
    assert truth.names() == CONTEXT_IDS[1:]
    assert_truth(truth, CONTEXT_IDS[1], labels)


def coco_stuff(value: int) -> int:
    return 255 if value == 255 else COCO_ALL.index(value)


def coco_object(value: int) -> int:
    return 1 + COCO_THINGS.index(value) if value in COCO_THINGS else 0


@pytest.mark.parametrize("folder", ["stuffthingmaps_trainval2017/val2017", "annotations/val2017", "val2017", "."])
@pytest.mark.parametrize(("benchmark", "rule"), [("coco_stuff", coco_stuff), ("coco_object", coco_object)])
def test_coco(benchmark: str, rule: Rule, folder: str, tmp_path: Path, rng: np.random.Generator) -> None:
    labels = rng.permutation([*COCO_ALL, *[255] * 9]).reshape(12, 15).astype(np.uint8)
    save_grey(tmp_path / folder / "000000000139.png", labels)
    # Converted copies beside the original are left alone.
    save_grey(tmp_path / folder / "000000000139_labelTrainIds.png", np.zeros(SHAPE, np.uint8))
    save_grey(tmp_path / folder / "000000000285_instanceTrainIds.png", np.zeros(SHAPE, np.uint8))
    truth = open_ground_truth(benchmark, tmp_path)
    assert (truth.names(), truth.expected_images) == (("000000000139",), 5000)
    assert_truth(truth, "000000000139", mapped(labels, rule))


@pytest.mark.parametrize(
    ("benchmark", "suffix", "values"),
    [("coco_stuff", "_labelTrainIds", [*range(171), 255]), ("coco_object", "_instanceTrainIds", list(range(81)))],
)
def test_converted_coco_is_taken_as_it_is(
    benchmark: str, suffix: str, values: list[int], tmp_path: Path, rng: np.random.Generator
) -> None:
    labels = rng.choice(values, SHAPE).astype(np.uint8)
    save_grey(tmp_path / "coco_stuff164k/annotations/val2017" / f"000000000139{suffix}.png", labels)
    truth = open_ground_truth(benchmark, tmp_path)
    assert_truth(truth, "000000000139", labels)
    save_grey(tmp_path / "coco_stuff164k/annotations/val2017" / f"000000000139{suffix}.png", labels * 0 + 200)
    with pytest.raises(UnknownIdsError, match="200"):
        truth.read("000000000139")


def test_a_category_that_coco_stuff_dropped_is_unknown_and_background_for_coco_object(tmp_path: Path) -> None:
    save_grey(tmp_path / "val2017/000000000139.png", np.full(SHAPE, 11, np.uint8))
    with pytest.raises(UnknownIdsError, match=r": 11 \("):
        open_ground_truth("coco_stuff", tmp_path).read("000000000139")
    assert not open_ground_truth("coco_object", tmp_path).read("000000000139").any()


@pytest.mark.parametrize("root", ["cityscapes", "cityscapes/gtFine", "."])
def test_cityscapes(root: str, tmp_path: Path, rng: np.random.Generator) -> None:
    folder = tmp_path / "cityscapes/gtFine/val"
    values = {}
    for city, number in (("frankfurt", 294), ("munster", 12)):
        name = f"{city}_000000_{number:06d}"
        values[name] = rng.permutation(np.arange(42) % 34).reshape(SHAPE).astype(np.uint8)
        save_grey(folder / city / f"{name}_gtFine_labelIds.png", values[name])
        save_grey(folder / city / f"{name}_gtFine_labelTrainIds.png", np.zeros(SHAPE, np.uint8))
        save_grey(folder / city / f"{name}_gtFine_instanceIds.png", values[name].astype(np.uint16) * 1000)
        save_grey(folder / city / f"._{name}_gtFine_labelIds.png", np.zeros(SHAPE, np.uint8))
        save_rgb(folder / city / f"{name}_gtFine_color.png", np.zeros((*SHAPE, 3)))
    truth = open_ground_truth("cityscapes", tmp_path / root)
    assert (truth.names(), truth.expected_images) == (tuple(sorted(values)), 500)
    for name, labels in values.items():
        assert_truth(truth, name, mapped(labels, lambda v: CITYSCAPES_TRAIN_IDS.get(v, 255)))
    image = "s3://bucket/leftImg8bit/val/munster/munster_000000_000012_leftImg8bit.png"
    assert truth.name_of(image) == "munster_000000_000012"


def test_cityscapes_from_train_ids_if_nothing_else_is_there(tmp_path: Path, rng: np.random.Generator) -> None:
    labels = rng.choice([*range(19), 255], SHAPE).astype(np.uint8)
    file = tmp_path / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelTrainIds.png"
    save_grey(file, labels)
    truth = open_ground_truth("cityscapes", tmp_path)
    assert_truth(truth, "lindau_000000_000019", labels)
    save_grey(file, np.full(SHAPE, 19, np.uint8))
    with pytest.raises(UnknownIdsError, match=": 19 "):
        truth.read("lindau_000000_000019")


@pytest.mark.parametrize("root", [".", "ADEChallengeData2016", "ADEChallengeData2016/annotations"])
def test_ade20k(root: str, tmp_path: Path, rng: np.random.Generator) -> None:
    labels = rng.permutation(np.arange(152) % 151).reshape(8, 19).astype(np.uint8)
    save_grey(tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png", labels)
    save_grey(tmp_path / "ADEChallengeData2016/annotations/training/ADE_train_00000001.png", labels)
    truth = open_ground_truth("ade20k", tmp_path / root)
    assert (truth.names(), truth.expected_images) == (("ADE_val_00000001",), 2000)
    assert_truth(truth, "ADE_val_00000001", mapped(labels, lambda v: 255 if v == 0 else v - 1))
    assert open_ground_truth("ade20k", tmp_path / root, split="train").names() == ("ADE_train_00000001",)


def test_ade847_from_the_full_release(tmp_path: Path, rng: np.random.Generator) -> None:
    known = {2978: 0, 312: 1, 2420: 2, 2855: 3, 2131: 4}  # wall, building, sky, tree, road
    classes = rng.choice([*known, 0, 3333], SHAPE)
    scene = tmp_path / "ADE20K_2021_17_01/images/ADE/validation/urban/street"
    save_rgb(scene / "ADE_val_00000007_seg.png", object_class_image(classes, rng))
    save_rgb(scene / "ADE_val_00000007_parts_1.png", np.zeros((*SHAPE, 3)))
    save_grey(scene / "ADE_val_00000007/instance_000_ADE_val_00000007.png", np.zeros(SHAPE, np.uint8))
    (tmp_path / "ADE20K_2021_17_01/index_ade20k.pkl").write_bytes(b"never opened")
    truth = open_ground_truth("ade847", tmp_path)
    assert (truth.names(), truth.ignore_index) == (("ADE_val_00000007",), 65535)
    assert_truth(truth, "ADE_val_00000007", mapped(classes, lambda v: known.get(v, 65535), np.uint16))


@pytest.mark.parametrize(
    ("full", "reduced"), [((600, 850), (512, 725)), ((700, 513), (699, 512)), ((512, 900), (512, 900))]
)
def test_ade847_is_shrunk_and_the_labels_with_it(
    full: tuple[int, int], reduced: tuple[int, int], tmp_path: Path, rng: np.random.Generator
) -> None:
    classes = rng.choice([2978, 312, 2420], full)
    save_rgb(tmp_path / "images/ADE/validation/ADE_val_00000007_seg.png", object_class_image(classes, rng))
    truth = open_ground_truth("ade847", tmp_path)
    read = truth.read("ADE_val_00000007")
    assert read.shape == reduced
    expected = np.empty(reduced, np.uint16)
    for row in range(reduced[0]):
        for column in range(reduced[1]):
            value = classes[row * full[0] // reduced[0], column * full[1] // reduced[1]]
            expected[row, column] = {2978: 0, 312: 1, 2420: 2}[int(value)]
    np.testing.assert_array_equal(read, expected)
    labels = rng.integers(0, 847, full).astype(np.uint16)
    aligned = truth.aligned(labels, read)
    assert aligned.shape == reduced
    assert aligned[reduced[0] // 2, 7] == labels[reduced[0] // 2 * full[0] // reduced[0], 7 * full[1] // reduced[1]]
    assert truth.aligned(aligned, read) is aligned
    assert truth.aligned(labels[1:], read).shape == (
        full[0] - 1,
        full[1],
    )  # another image: left for the caller to refuse


def test_ade847_from_tiffs(tmp_path: Path, rng: np.random.Generator) -> None:
    labels = rng.choice([*range(847), 65535], (30, 40)).astype(np.uint16)
    file = tmp_path / "ADE20K_2021_17_01/annotations_detectron2/validation/ADE_val_00000001.tif"
    save_grey(file, labels)
    truth = open_ground_truth("ade847", tmp_path)
    assert_truth(truth, "ADE_val_00000001", labels)
    save_grey(file, np.full(SHAPE, 847, np.uint16))
    with pytest.raises(UnknownIdsError, match=r": 847 \("):
        truth.read("ADE_val_00000001")


def test_only_ade847_ever_resizes_labels(tmp_path: Path, rng: np.random.Generator) -> None:
    voc_tree(tmp_path / "VOCdevkit", rng)
    truth = open_ground_truth("voc21", tmp_path)
    labels = np.zeros((600, 850), np.uint8)
    assert truth.aligned(labels, np.zeros((512, 725), np.uint8)) is labels


@pytest.mark.parametrize(
    "uri",
    [
        "/data/JPEGImages/2007_000033.jpg",
        "s3://bucket/VOC2012/JPEGImages/2007_000033.jpg",
        "tar://2007_000033.jpg::s3://bucket/val-000.tar",
        "https://host/images/2007_000033.jpg?signature=a/b.c",
        "2007_000033",
    ],
)
def test_names_of_images(uri: str, tmp_path: Path, rng: np.random.Generator) -> None:
    voc_tree(tmp_path / "VOCdevkit", rng)
    assert open_ground_truth("voc21", tmp_path).name_of(uri) == "2007_000033"


def test_the_same_from_a_bucket_and_after_pickling(s3: str, tmp_path: Path, rng: np.random.Generator) -> None:
    import s3fs

    voc_tree(tmp_path / "VOCdevkit", rng)
    save_grey(tmp_path / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png", np.full(SHAPE, 26, np.uint8))
    s3fs.S3FileSystem().put(f"{tmp_path}/", f"{s3}/data/", recursive=True)
    for root in (f"{s3}/data", f"{s3}/data/VOCdevkit/"):
        local, remote = open_ground_truth("voc21", tmp_path), open_ground_truth("voc21", root)
        assert remote.names() == local.names()
        assert remote.identity() != local.identity()
        copy = pickle.loads(pickle.dumps(remote))
        for name in local.names():
            np.testing.assert_array_equal(copy.read(name), local.read(name))
        assert copy.identity() == remote.identity() == open_ground_truth("voc21", root).identity()
    assert open_ground_truth("cityscapes", f"{s3}/data").read("lindau_000000_000019")[0, 0] == 13
    with pytest.raises(InputError, match=r"no ground truth of ade20k .*; there is VOCdevkit/, gtFine/$"):
        open_ground_truth("ade20k", f"{s3}/data")
    with pytest.raises(InputError, match="there is no folder"):
        open_ground_truth("voc21", f"{s3}/nowhere")


def test_what_cannot_be_reached_stops_and_is_no_missing_annotation(
    tmp_path: Path, rng: np.random.Generator, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    voc_tree(tmp_path / "VOCdevkit", rng)
    s3fs.S3FileSystem().put(f"{tmp_path}/", f"{s3}/", recursive=True)
    truth = pickle.dumps(open_ground_truth("voc21", s3))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setattr("ovss_ray.images.backoff.wait_s", lambda *_: 0.0)
    with pytest.raises(InputError, match="cannot be read: .*; try again later"):
        pickle.loads(truth).read(VOC_IDS[0])


def test_the_identity_changes_with_files_and_can_be_written_as_json(tmp_path: Path, rng: np.random.Generator) -> None:
    import json

    voc_tree(tmp_path / "VOCdevkit", rng)
    before = open_ground_truth("voc21", tmp_path).identity()
    assert json.loads(json.dumps(before)) == before
    assert open_ground_truth("voc20", tmp_path).identity()["ids"] != before["ids"]
    (tmp_path / "VOCdevkit/VOC2012/SegmentationClass" / f"{VOC_IDS[1]}.png").unlink()
    assert open_ground_truth("voc21", tmp_path).identity() != before


def test_every_benchmark_has_a_vocabulary_with_its_ignore_index() -> None:
    for benchmark in BENCHMARKS:
        assert load_vocabulary(benchmark).ignore_index == (65535 if benchmark in ("ade847", "context459") else 255)


@pytest.mark.skipif(not (DATA / "voc/val1449_masks.tar").is_file(), reason="needs the VOC masks")
def test_real_voc_masks(tmp_path: Path) -> None:
    folder = tmp_path / "VOC2012/SegmentationClass"
    raw = {}
    with tarfile.open(DATA / "voc/val1449_masks.tar") as tar:
        tar.extractall(folder, filter="data")
    save_lines(tmp_path / "VOC2012/ImageSets/Segmentation/val.txt", (DATA / "voc/val1449.txt").read_text().split())
    truth = open_ground_truth("voc21", tmp_path)
    assert repr(truth) == f"GroundTruth('voc21', 1449 images in '{tmp_path}')"
    without_background = open_ground_truth("voc20", tmp_path)
    names = truth.names()
    assert len(names) == truth.expected_images == 1449
    seen = set()
    for name in names[::25]:
        raw = np.asarray(Image.open(io.BytesIO((folder / f"{name}.png").read_bytes())))
        np.testing.assert_array_equal(truth.read(name), raw)
        reduced = without_background.read(name)
        assert ((reduced == 255) == ((raw == 0) | (raw == 255))).all()
        assert (reduced[reduced != 255] + 1 == raw[reduced != 255]).all()
        seen |= set(np.unique(raw).tolist())
    assert seen == {*range(21), 255}


@pytest.mark.skipif(not (DATA / "ade20k_samples").is_dir(), reason="needs samples of ADE20K")
def test_real_ade20k_annotations(tmp_path: Path) -> None:
    shutil.copytree(DATA / "ade20k_samples/annotations", tmp_path / "annotations/validation")
    truth = open_ground_truth("ade20k", tmp_path)
    assert len(truth.names()) == 3
    for name in truth.names():
        with Image.open(DATA / "ade20k_samples/images" / f"{name}.jpg") as image:
            assert truth.read(name).shape == (image.height, image.width)
        raw = np.asarray(Image.open(DATA / "ade20k_samples/annotations" / f"{name}.png"))
        np.testing.assert_array_equal(truth.read(name), (raw - 1).astype(np.uint8))  # 0 - 1 wraps to 255
