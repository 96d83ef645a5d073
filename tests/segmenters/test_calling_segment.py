"""Every way of calling `segment`, on one method: one image or several, arrays or Pillow images, words or embeddings."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from ovss_ray.errors import SettingError
from ovss_ray.images import decode_image
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("photo.jpg", "image 0 is a str; give Pillow images or uint8 arrays"),
        ([Path("photo.jpg")], "image 0 is a .*Path; give Pillow images or uint8 arrays"),
        (np.zeros((4, 4), np.uint8), r"image 0 has shape \(4, 4\)"),
        (np.zeros((2, 4, 4, 4), np.uint8), r"image 0 has shape \(4, 4, 4\)"),
        (torch.zeros(4, 4, 3, dtype=torch.uint8), "image 0 is a Tensor"),
    ],
)
def test_other_things_are_refused(segmenter, text, given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        segmenter.segment(given, text)


def test_classes_that_cannot_be_read_are_explained(segmenter, images) -> None:
    with pytest.raises(SettingError, match="cat"):
        segmenter.segment(images[0], "cat,cat")
