"""Every way of calling `segment`, on one method: one image or several, arrays or Pillow images, words or embeddings."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ovss_ray.errors import ImageError, OvssError, SettingError
from ovss_ray.images import decode_image
from ovss_ray.images.stores import open_store
from ovss_ray.segmenters import Segmentation, Segmenter, TextEmbeddings, load_segmenter
from ovss_ray.vocabulary import load_vocabulary


@pytest.fixture
def segmenter(tiny_clip: torch.nn.Module) -> Segmenter:
    return load_segmenter("sclip", clip=tiny_clip, device="cpu", dtype="float32", max_long_side=200)


@pytest.fixture
def text(segmenter: Segmenter) -> TextEmbeddings:
    return segmenter.encode_vocabulary(load_vocabulary("cat,dog,grass"))


def same(a: Segmentation, b: Segmentation) -> bool:
    return np.array_equal(a.labels, b.labels) and np.allclose(a.confidence, b.confidence, atol=1e-5)


def test_one_image_gives_one_segmentation_and_a_list_a_list(segmenter, text, images) -> None:
    image = images[1]
    alone = segmenter.segment(image, text)
    assert isinstance(alone, Segmentation)
    for several in ([image], (image,), image[None], [Image.fromarray(image)]):
        (result,) = segmenter.segment(several, text)
        assert same(result, alone)
    assert same(segmenter.segment(Image.fromarray(image), text), alone)


def test_a_stack_of_images_is_several(segmenter, text, images) -> None:
    stack = np.stack([images[0], images[3]])
    for result, image in zip(segmenter.segment(stack, text), stack, strict=True):
        assert same(result, segmenter.segment(image, text))
    with pytest.raises(ValueError, match="at least one image"):
        segmenter.segment(stack[:0], text)


def test_arrays_and_pillow_images_may_be_mixed(segmenter, text, images) -> None:
    first, second = segmenter.segment([images[0], Image.fromarray(images[1])], text)
    assert same(first, segmenter.segment(images[0], text))
    assert same(second, segmenter.segment(images[1], text))


def test_open_files_are_read_and_not_taken_for_a_list_of_their_lines(segmenter, text, images, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(images[1]).save(path)
    expected = segmenter.segment(images[1], text)
    with path.open("rb") as file:
        assert same(segmenter.segment(file, text), expected)
    in_memory, second = segmenter.segment([io.BytesIO(path.read_bytes()), path], text)
    assert same(in_memory, expected)
    assert same(second, expected)
    with pytest.raises(
        SettingError, match=r"image 0 is a file that is open as text; open it as bytes: open\(path, 'rb'\)"
    ):
        segmenter.segment(io.StringIO("a.png"), text)


def test_words_a_file_a_vocabulary_and_embeddings_are_the_same(segmenter, text, images, tmp_path: Path) -> None:
    (tmp_path / "classes.txt").write_text("cat\ndog\ngrass\n")
    expected = segmenter.segment(images[1], text)
    for given in ("cat,dog,grass", ["cat", "dog", "grass"], load_vocabulary("cat,dog,grass"), tmp_path / "classes.txt"):
        assert same(segmenter.segment(images[1], given), expected)


def test_words_are_encoded_once_until_they_change(segmenter, images, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[tuple[str, ...]] = []
    encode = segmenter.encode_vocabulary
    monkeypatch.setattr(segmenter, "encode_vocabulary", lambda v: encoded.append(v.names) or encode(v))
    for words in ("cat,dog", "cat,dog", "dog,cat", "dog,cat", load_vocabulary("dog,cat")):
        assert segmenter.segment(images[0], words).vocabulary.names == load_vocabulary(words).names
    assert encoded == [("cat", "dog"), ("dog", "cat")]


def saved(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def turned(image: Image.Image, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[274] = orientation
    return saved(image, "JPEG", exif=exif, quality=95)


def in_lab(image: Image.Image) -> Any:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")


FILES = {
    "palette": lambda image: saved(image.quantize(16)),
    "transparent palette": lambda image: saved(image.quantize(16), transparency=0),
    "alpha": lambda image: saved(Image.merge("RGBA", [*image.split(), image.getchannel("R")])),
    "grey": lambda image: saved(image.convert("L")),
    "one bit": lambda image: saved(image.convert("1")),
    "sixteen bit grey": lambda image: saved(Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)),
    "CMYK": lambda image: saved(image.convert("CMYK"), "TIFF"),
    "LAB": lambda image: saved(in_lab(image), "TIFF"),
    "on its side": lambda image: turned(image, 6),
    "mirrored": lambda image: turned(image, 2),
}


@pytest.mark.parametrize("kind", FILES)
def test_pillow_images_are_read_as_a_run_reads_their_files(segmenter, text, images, kind: str) -> None:
    data = FILES[kind](Image.fromarray(images[1]))
    pixels = decode_image(data)
    expected = segmenter.segment(pixels, text)
    with Image.open(io.BytesIO(data)) as opened:
        assert same(segmenter.segment(opened, text), expected)
    assert pixels.shape[:2] == ((110, 70) if kind == "on its side" else (70, 110))


def test_files_are_read_as_a_run_reads_them_from_wherever_they_lie(
    segmenter, text, images, tmp_path: Path, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = FILES["on its side"](Image.fromarray(images[1]))
    path = tmp_path / "a photo #1.jpg"
    path.write_bytes(data)
    fs, root = open_store(s3)
    fs.pipe_file(f"{root}/photo.jpg", data)
    monkeypatch.chdir(tmp_path)
    expected = segmenter.segment(decode_image(data), text)
    for given in (
        path,
        str(path),
        path.name,
        path.as_uri(),
        data,
        bytearray(data),
        memoryview(data),
        f"{s3}/photo.jpg",
    ):
        result = segmenter.segment(given, text)
        assert same(result, expected)
        np.testing.assert_array_equal(result.image, decode_image(data))


def test_options_of_a_store_are_passed_on(segmenter, text, images, s3, s3_endpoint, monkeypatch) -> None:
    data = saved(Image.fromarray(images[1]))
    fs, root = open_store(s3)
    fs.pipe_file(f"{root}/photo.png", data)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    options = {"s3": {"endpoint_url": s3_endpoint, "key": "test", "secret": "test"}}
    assert same(segmenter.segment(f"{s3}/photo.png", text, storage_options=options), segmenter.segment(data, text))


def test_a_list_may_mix_all_kinds(segmenter, text, images, tmp_path: Path) -> None:
    Image.fromarray(images[1]).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    mixed = [tmp_path / "a.png", str(tmp_path / "a.png"), data, images[1], Image.fromarray(images[1])]
    expected = segmenter.segment(images[1], text)
    for several in (mixed, tuple(mixed), iter(mixed)):
        results = segmenter.segment(several, text)
        assert len(results) == 5
        assert all(same(result, expected) for result in results)


def test_a_result_keeps_its_image_for_the_plot(segmenter, text, images) -> None:
    first, second = segmenter.segment([images[0], images[1]], text)
    np.testing.assert_array_equal(first.image, images[0])
    assert np.array_equal(np.asarray(second.plot()), np.asarray(second.plot(images[1])))


@pytest.mark.parametrize(
    ("write", "status", "said"),
    [
        (None, "not_found", "photo.jpg: "),
        (b"", "corrupt", "photo.jpg: empty file"),
        (b"<html>no</html>", "unsupported", "photo.jpg: HTML page"),
        (b"\xff\xd8\xff\xe0" + bytes(50), "corrupt", "photo.jpg: damaged JPEG"),
    ],
)
def test_a_file_that_cannot_be_read_is_named_with_the_reason(
    segmenter, text, tmp_path: Path, write: bytes | None, status: str, said: str
) -> None:
    path = tmp_path / "photo.jpg"
    if write is not None:
        path.write_bytes(write)
    with pytest.raises(ImageError, match=said) as caught:
        segmenter.segment([path], text)
    assert caught.value.status == status


FLOAT = np.linspace(0, 1, 48, dtype=np.float32).reshape(4, 4, 3)
UINT8 = np.zeros((4, 4, 3), np.uint8)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (None, "image 0 is None; give paths, URIs, bytes of image files, Pillow images or uint8 arrays"),
        ([UINT8, 3], "image 1 is an int; give paths"),
        ({"a": UINT8}, "image 0 is a dict; give paths"),
        ([[UINT8]], "image 0 is a list; give paths"),
        ([], "needs at least one image; give paths"),
        ("", "image 0 is an empty path; give paths"),
        (Path(), "image 0 is a folder, .*; give the paths of its images"),
        (UINT8[..., 0], r"array of uint8, shape \(4x4\); give uint8 RGB .* of a grey image `np.stack"),
        (UINT8[..., :1], r"shape \(4x4x1\); give uint8 RGB .* of a grey image `np.repeat"),
        (np.zeros((4, 4, 4), np.uint8), "without an alpha channel"),
        (np.zeros((3, 5, 6), np.uint8), "of channels that come first `np.moveaxis"),
        (np.zeros((2, 4, 4, 4), np.uint8), "image 0 is an array of uint8, shape .4x4x4."),
        (np.zeros((0, 4, 3), np.uint8), "it has no pixels"),
        (FLOAT, r"array of float32, .* of values from 0 to 1 `np.round\(255 \* image\)"),
        (FLOAT * 255, "its values go from 0 to 255"),
        (FLOAT * np.nan, "it has no finite value"),
        (FLOAT.transpose(2, 0, 1)[:, :, :2], "channels that come first .*; of values from 0 to 1"),
        (np.zeros((4, 4, 3), bool), "array of bool, "),
        (np.array([["a", "b"]]), "array of <U1, shape"),
        (np.zeros((4, 4, 3), np.int64), "array of int64, .* its values go from 0 to 0"),
        (torch.zeros(3, 4, 5), r"Tensor of float32, shape \(3x4x5\); .*255 \* image.*permute\(1, 2, 0\)"),
        (torch.zeros(4, 5, 3, dtype=torch.uint8), r"Tensor of uint8, .*`image.cpu\(\).numpy\(\)`"),
        (torch.zeros(2, 3, 4, 5), "Tensor of float32"),
    ],
)
def test_other_things_are_refused_in_one_line_that_says_what_is_taken(
    segmenter, text, given: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        segmenter.segment(given, text)
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, OvssError)


def test_classes_that_cannot_be_read_are_explained(segmenter, images) -> None:
    with pytest.raises(SettingError, match="cat"):
        segmenter.segment(images[0], "cat,cat")
