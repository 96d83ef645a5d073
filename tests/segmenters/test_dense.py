"""The frame of dense methods: what an image is resized to, defaults that follow the model, and a method's last word."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ovss_ray.errors import SettingError
from ovss_ray.models.vision import TowerShape
from ovss_ray.segmenters import DenseSegmenter, load_segmenter, method_names
from ovss_ray.segmenters.registry import get_method
from ovss_ray.vocabulary import Vocabulary, load_vocabulary
from tests.reference import class_probabilities

DENSE = [name for name in method_names() if issubclass(get_method(name), DenseSegmenter)]


def load(method: str, clip: Any, **settings: Any) -> Any:
    return load_segmenter(method, clip=clip, device="cpu", dtype="float32", **settings)


def sclip(clip: Any, **settings: Any) -> Any:
    return load("sclip", clip, **settings)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of what goes into the tower."""
    shapes: list[tuple[int, ...]] = []
    original = DenseSegmenter.patch_scores

    def patch_scores(self: DenseSegmenter, pixels: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(pixels.shape))
        return original(self, pixels, *rest)

    monkeypatch.setattr(DenseSegmenter, "patch_scores", patch_scores)
    return shapes


@pytest.mark.parametrize(
    ("settings", "size", "shape"),
    [
        ({"crop": 0}, (70, 110), (1, 3, 96, 151)),
        ({"crop": 0}, (110, 70), (1, 3, 151, 96)),
        ({"crop": 0, "max_long_side": 120}, (70, 110), (1, 3, 76, 120)),
        ({"crop": 0, "max_long_side": 120}, (1, 90), (1, 3, 8, 120)),
        ({"crop": 0, "short_side": 40}, (70, 110), (1, 3, 40, 63)),
        ({"crop": 0, "resize": "square"}, (70, 110), (1, 3, 96, 96)),
        ({"crop": 0, "resize": "square", "short_side": 50}, (1, 90), (1, 3, 50, 50)),
        ({"crop": 0, "resize": "patches"}, (70, 110), (1, 3, 72, 112)),
        ({"crop": 0, "resize": "patches"}, (64, 64), (1, 3, 64, 64)),
        ({"crop": 0, "resize": "patches", "max_long_side": 80}, (70, 110), (1, 3, 56, 80)),
        ({"crop": 0, "resize": "patches"}, (1, 3), (1, 3, 8, 8)),
        ({}, (70, 110), (8, 3, 64, 64)),
        ({"crop": 50, "stride": 50}, (70, 110), (8, 3, 50, 50)),
        ({"crop": 50, "stride": 50, "pad": "patch"}, (70, 110), (8, 3, 56, 56)),
        ({"crop": 50, "stride": 50, "pad": 32}, (70, 110), (8, 3, 64, 64)),
    ],
)
def test_what_the_tower_sees(tiny_clip, seen, settings: dict[str, Any], size: tuple[int, int], shape: tuple) -> None:
    result = sclip(tiny_clip, **settings).segment(np.zeros((*size, 3), np.uint8), "cat,dog")
    assert seen == [shape]
    assert result.labels.shape == size


def test_bicubic_is_pillows_and_bilinear_is_opencvs(tiny_clip, images) -> None:
    segmenter, image = sclip(tiny_clip), images[1]
    mean, std = (torch.tensor(part)[:, None, None] for part in (segmenter.clip.pixel_mean, segmenter.clip.pixel_std))
    for size in ((40, 50), (96, 151)):
        resized = np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))
        expected = (torch.tensor(resized).permute(2, 0, 1) / 255 - mean) / std
        torch.testing.assert_close(segmenter.normalised(image, size, "bicubic"), expected)
        smooth = torch.nn.functional.interpolate(
            torch.tensor(image).permute(2, 0, 1)[None].float(), size, mode="bilinear"
        )
        levels = segmenter.normalised(image, size, "bilinear") * std * 255 + mean * 255
        assert (levels - smooth[0]).abs().max() <= 1.02  # OpenCV's own rounding; tests/ops has it level for level


@pytest.mark.parametrize("method", DENSE)
@pytest.mark.parametrize(
    "settings", [{}, {"crop": 0}, {"resize": "square", "interpolation": "bicubic"}, {"resize": "patches", "crop": 50}]
)
def test_every_method_follows_the_protocol(method, clip_for, vocabulary, images, settings: dict[str, Any]) -> None:
    segmenter = load(method, clip_for(method), max_long_side=150, **settings)
    text = segmenter.encode_vocabulary(vocabulary)
    for image, result in zip(images[1:5:3], segmenter.segment(images[1:5:3], text), strict=True):
        ranked = np.sort(class_probabilities(segmenter, image, text), axis=0)
        np.testing.assert_allclose(result.confidence, ranked[-1], atol=5e-4)
        np.testing.assert_allclose(result.margin, ranked[-1] - ranked[-2], atol=1e-3)


@pytest.mark.parametrize("method", DENSE)
@pytest.mark.parametrize("shape", [TowerShape(224, 16, 12), TowerShape(336, 14, 24), TowerShape(64, 8, 4)])
def test_settings_are_filled_in_once(method: str, shape: TowerShape) -> None:
    parsed: Any = get_method(method).parse_settings({})
    filled = parsed.resolve(shape)
    assert filled.resolve(shape) == filled
    assert None not in (filled.short_side, filled.crop, filled.stride)
    assert not filled.crop or filled.stride <= filled.crop
    assert type(parsed)(**filled.model_dump()) == filled


def test_a_stride_is_checked_against_the_window_that_follows_the_model(tiny_clip) -> None:
    with pytest.raises(SettingError, match="stride = 1000 is larger than crop = 64, the model's input; set both"):
        sclip(tiny_clip, stride=1000)
    assert sclip(tiny_clip, stride=1000, crop=0).settings.stride == 1000


def test_a_method_has_the_last_word_on_its_labels(tiny_clip, vocabulary, images) -> None:
    class Mirrored(get_method("sclip")):  # type: ignore[misc]
        def finish_labels(self, labels: torch.Tensor, vocabulary: Vocabulary) -> torch.Tensor:
            assert labels.max() < vocabulary.num_classes
            assert labels.dtype == torch.int32
            return labels.flip(1)

    plain = sclip(tiny_clip)
    text = plain.encode_vocabulary(vocabulary)
    mirrored = Mirrored.load(clip=tiny_clip, device="cpu", dtype="float32").segment(images[1], text)
    expected = plain.segment(images[1], text)
    assert np.array_equal(mirrored.labels, expected.labels[:, ::-1])
    assert mirrored.labels.dtype == np.uint8
    assert np.array_equal(mirrored.confidence, expected.confidence)


def test_segmenters_of_several_methods_share_a_model(tiny_clip, images) -> None:
    methods = ("sclip", "maskclip", "naclip")
    alone = [load(method, tiny_clip).segment(images[:3], "cat,dog") for method in methods]
    together = [load(method, tiny_clip) for method in methods]
    text = together[0].encode_vocabulary(load_vocabulary("cat,dog"))
    for _ in range(2):
        for segmenter, expected in zip(together, alone, strict=True):
            for a, b in zip(segmenter.segment(images[:3], text), expected, strict=True):
                assert np.array_equal(a.confidence, b.confidence)
