"""What every method must do. A new method file is found by itself and goes through all of this."""

from __future__ import annotations

import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ovss_ray.errors import SettingError
from ovss_ray.segmenters import DenseSegmenter, Segmenter, get_method, load_segmenter, method_names
from ovss_ray.vocabulary import Vocabulary, load_vocabulary

BENCHMARKS = {"voc21", "voc20", "context60", "context59", "coco_object", "coco_stuff", "cityscapes", "ade20k"}

UNFINISHED = {"itaclip": {"closing": False}}
"""Settings that leave a label map as thresholds made it, for methods that work on the finished map."""

pytestmark = pytest.mark.parametrize("method", method_names())


@pytest.fixture
def clip(method: str, clip_for: Callable[[str], torch.nn.Module]) -> torch.nn.Module:
    """The tiny model that the method runs on."""
    return clip_for(method)


def is_dense(method: str) -> bool:
    return issubclass(get_method(method), DenseSegmenter)


def dense_only(test: Callable[..., None]) -> Callable[..., None]:
    """For tests of `DenseSettings`, which methods without windows have not."""
    return pytest.mark.usefixtures("_dense_only")(test)


@pytest.fixture
def _dense_only(method: str) -> None:
    if not is_dense(method):
        pytest.skip(f"{method} is no dense method")


def load(method: str, clip: torch.nn.Module, **settings: object) -> Segmenter:
    """A cap on the long side keeps one-pixel-wide images cheap; everything else is the method's default."""
    cap = {"max_long_side": 200} if is_dense(method) else {}
    given: dict[str, Any] = {"dtype": "float32", **cap, **settings}
    return load_segmenter(method, clip=clip, device="cpu", **given)


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    return float((a == b).mean())


def test_the_card_states_facts(method: str) -> None:
    cls = get_method(method)
    assert cls.name == method
    assert cls.card.title
    assert cls.card.idea.endswith(".")
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", cls.card.repository)
    assert re.search(r"\b(19|20)\d\d\b", cls.card.venue)
    assert cls.card.passes >= 1
    assert cls.card.models
    assert set(cls.card.published) <= BENCHMARKS
    assert all(0 < value < 100 for value in cls.card.published.values())
    assert bool(cls.card.published) == bool(cls.card.published_source)
    assert (cls.__doc__ or "").strip()
    for name, field in cls.Settings.model_fields.items():
        assert field.description, f"the setting {name} has no description"


def test_every_image_gets_a_label_map_of_its_size(method, clip, vocabulary, images) -> None:
    segmenter = load(method, clip)
    results = segmenter.segment(images, segmenter.encode_vocabulary(vocabulary))
    assert len(results) == len(images)
    for image, result in zip(images, results, strict=True):
        assert result.labels.shape == result.confidence.shape == result.margin.shape == image.shape[:2]
        assert (result.labels.dtype, result.confidence.dtype, result.margin.dtype) == (np.uint8, np.float32, np.float32)
        assert set(np.unique(result.labels)) <= {0, 1, 2, 3}
        assert np.isfinite(result.confidence).all()
        assert result.confidence.min() > 0
        assert result.confidence.max() <= 1 + 1e-6
        assert result.margin.min() >= 0
        assert (result.margin <= result.confidence + 1e-6).all()
        assert result.vocabulary == vocabulary
    assert len(np.unique(results[1].labels)) > 1


def test_results_do_not_depend_on_the_other_images(method, clip, vocabulary, images) -> None:
    segmenter = load(method, clip)
    text = segmenter.encode_vocabulary(vocabulary)
    together = segmenter.segment(images, text)
    backwards = segmenter.segment(images[::-1], text)[::-1]
    for image, one, other in zip(images, together, backwards, strict=True):
        (alone,) = segmenter.segment([image], text)
        for result in (one, other):
            np.testing.assert_allclose(result.confidence, alone.confidence, atol=1e-4)
            steady = alone.margin > 1e-3
            assert np.array_equal(result.labels[steady], alone.labels[steady])


def test_words_and_one_image_are_enough(method, clip, images) -> None:
    segmenter = load(method, clip)
    text = segmenter.encode_vocabulary(load_vocabulary("cat,dog"))
    (expected,) = segmenter.segment([images[1]], text)
    for image in (images[1], Image.fromarray(images[1])):
        result = segmenter.segment(image, "cat,dog")
        assert np.array_equal(result.labels, expected.labels)
        assert result.vocabulary.names == ("cat", "dog")


def test_twelve_blocks_work_as_well(method, deep_clip_for, vocabulary, images) -> None:
    segmenter = load(method, deep_clip_for(method))
    text = segmenter.encode_vocabulary(vocabulary)
    for image, result in zip(images[1:3], segmenter.segment(images[1:3], text), strict=True):
        np.testing.assert_allclose(result.confidence, segmenter.segment(image, text).confidence, atol=1e-4)
        assert np.isfinite(result.confidence).all()


def test_the_same_call_gives_the_same_bits(method, clip, vocabulary, images) -> None:
    first, second = load(method, clip), load(method, clip)
    text = first.encode_vocabulary(vocabulary)
    for a, b, c in zip(
        first.segment(images, text), second.segment(images, text), first.segment(images, text), strict=True
    ):
        for other in (b, c):
            assert np.array_equal(a.labels, other.labels)
            assert np.array_equal(a.confidence, other.confidence)
            assert np.array_equal(a.margin, other.margin)


def test_the_model_is_not_changed_and_can_be_shared(method, clip, vocabulary, images) -> None:
    before = {key: value.clone() for key, value in clip.state_dict().items()}
    other = {"short_side": 150, "crop": 90, "stride": 50} if is_dense(method) else {}
    small, large = load(method, clip), load(method, clip, **other)
    text = small.encode_vocabulary(vocabulary)
    alone = small.segment(images[:3], text)
    large.segment(images[:3], text)
    again = small.segment(images[:3], text)
    assert all(np.array_equal(a.confidence, b.confidence) for a, b in zip(alone, again, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in clip.state_dict().items())
    assert all(parameter.requires_grad for parameter in clip.parameters())


@dense_only
def test_speed_settings_do_not_change_labels(method, clip, vocabulary, images) -> None:
    usual = load(method, clip)
    narrow = load(method, clip, window_batch=1)
    text = usual.encode_vocabulary(vocabulary)
    expected = usual.segment(images[:5], text)
    for results in (narrow.segment(images[:5], text), usual.segment(images[:5], text, low_memory=True)):
        for a, b in zip(expected, results, strict=True):
            np.testing.assert_allclose(a.confidence, b.confidence, atol=1e-4)
            assert np.array_equal(a.labels[a.margin > 1e-3], b.labels[a.margin > 1e-3])
    assert usual.settings.label_settings() == narrow.settings.label_settings()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_is_close_to_float32(method, clip, vocabulary, images, dtype) -> None:
    exact, low = load(method, clip), load(method, clip, dtype=dtype)
    assert low.dtype == getattr(torch, dtype)
    text = exact.encode_vocabulary(vocabulary)
    np.testing.assert_allclose(low.encode_vocabulary(vocabulary).embeddings, text.embeddings, atol=1e-6)
    for a, b in zip(exact.segment(images[:3], text), low.segment(images[:3], text), strict=True):
        assert agreement(a.labels, b.labels) > 0.9
        assert np.abs(a.confidence - b.confidence).mean() < 0.05


@dense_only
@pytest.mark.parametrize("crop", [0, 64, 40])
@pytest.mark.parametrize("pad", [0, "patch", 24])
def test_windows_and_padding_of_any_kind(method, clip, vocabulary, images, crop, pad) -> None:
    segmenter = load(method, clip, crop=crop, stride=37, pad=pad, short_side=75)
    results = segmenter.segment(images, segmenter.encode_vocabulary(vocabulary))
    assert [result.labels.shape for result in results] == [image.shape[:2] for image in images]


@pytest.mark.parametrize(("count", "dtype"), [(1, np.uint8), (200, np.uint8), (300, np.uint16)])
def test_few_and_many_classes(method, clip, images, count, dtype) -> None:
    vocabulary = load_vocabulary([f"thing {i}" for i in range(count)], templates="identity")
    segmenter = load(method, clip)
    result = segmenter.segment(images[1:2], segmenter.encode_vocabulary(vocabulary))[0]
    assert result.labels.dtype == dtype
    assert result.labels.max() < count
    if count == 1:
        np.testing.assert_allclose(result.confidence, 1, atol=1e-6)


def test_text_embeddings_are_unit_rows_that_cross_processes(method, clip, vocabulary: Vocabulary) -> None:
    text = load(method, clip).encode_vocabulary(vocabulary)
    assert text.embeddings.shape == (5, 24)
    assert text.embeddings.dtype == np.float32
    assert text.query_class.tolist() == [0, 0, 1, 2, 3]
    np.testing.assert_allclose(np.linalg.norm(text.embeddings, axis=1), 1, atol=1e-5)
    copy = pickle.loads(pickle.dumps(text))
    assert np.array_equal(copy.embeddings, text.embeddings)
    assert copy.vocabulary == vocabulary


@dense_only
def test_uncertain_pixels_fall_to_the_background_or_stay_unlabelled(method, clip, vocabulary, images) -> None:
    plain = UNFINISHED.get(method, {})
    free, strict = load(method, clip, **plain), load(method, clip, prob_thd=0.5, **plain)
    text = free.encode_vocabulary(vocabulary)
    without = load_vocabulary(list(vocabulary.names[1:]), templates="single")
    expected, got = free.segment(images[1:2], text)[0], strict.segment(images[1:2], text)[0]
    weak = expected.confidence < 0.5
    assert weak.any()
    if get_method(method).finish_labels is DenseSegmenter.finish_labels:
        assert (got.labels[weak] == 3).all()
        assert np.array_equal(got.labels[~weak], expected.labels[~weak])
    else:
        assert agreement(got.labels, np.where(weak, 3, expected.labels)) > 0.8
    strictest = load(method, clip, prob_thd=1.0, **plain)
    assert (strictest.segment(images[1:2], strict.encode_vocabulary(without))[0].labels == 255).mean() > 0.5


@dense_only
def test_the_area_rule_needs_a_background(method, clip, vocabulary, images) -> None:
    segmenter = load(method, clip, area_thd=0.3)
    result = segmenter.segment(images[1:2], segmenter.encode_vocabulary(vocabulary))[0]
    assert result.labels.shape == images[1].shape[:2]
    with pytest.raises(SettingError, match=r"area_thd = 0\.3: the area rule needs a background class"):
        segmenter.encode_vocabulary(load_vocabulary("cat,dog"))


@dense_only
def test_refinement_by_pamr_keeps_the_interface(method, clip, vocabulary, images) -> None:
    plain, refined = load(method, clip), load(method, clip, pamr=4)
    text = plain.encode_vocabulary(vocabulary)
    before, after = plain.segment(images[1:3], text), refined.segment(images[1:3], text)
    assert [r.labels.shape for r in after] == [r.labels.shape for r in before]
    assert any(agreement(a.labels, b.labels) < 1 for a, b in zip(before, after, strict=True))


def test_arrays_of_any_memory_layout_are_fine(method, clip, vocabulary, images) -> None:
    segmenter = load(method, clip)
    text = segmenter.encode_vocabulary(vocabulary)
    image = images[1]
    fortran = np.asfortranarray(image)
    frozen = image.copy()
    frozen.flags.writeable = False
    mirrored = np.ascontiguousarray(image[:, ::-1])[:, ::-1]
    expected = segmenter.segment([image], text)[0]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = segmenter.segment([fortran, frozen, mirrored], text)
    for result in results:
        np.testing.assert_allclose(result.confidence, expected.confidence, atol=1e-5)


def test_text_of_another_model_is_refused(method, clip, vocabulary, images) -> None:
    other = load_segmenter("clipbase", clip="ovss-demo/random", device="cpu", dtype="float32")
    with pytest.raises(SettingError, match="the text embeddings have 64 dimensions, but this model has 24"):
        load(method, clip).segment(images[:1], other.encode_vocabulary(vocabulary))


def test_overlong_queries_are_refused_before_anything_is_encoded(method, clip) -> None:
    with pytest.raises(SettingError, match="tokens"):
        load(method, clip).encode_vocabulary(load_vocabulary(["o " * 90]))


@dense_only
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shortside": 10}, "unknown setting 'shortside'; did you mean 'short_side'?"),
        ({"prob_thd": 2}, "prob_thd = 2"),
        ({"interpolation": "cubic"}, "interpolation = 'cubic'"),
        ({"crop": 10, "stride": 11}, "stride 11 is larger than crop 10"),
        ({"crop": 64, "stride": 1000}, "stride 1000 is larger than crop 64"),
        ({"pad": -1}, "pad must be 0, a positive number"),
        ({"pamr_dilations": ()}, "pamr_dilations"),
        ({"logit_scale": "high"}, "logit_scale = 'high'"),
    ],
)
def test_wrong_settings_are_refused_in_one_sentence(method, clip, settings, message) -> None:
    with pytest.raises(SettingError, match="^[^\n]*$") as caught:
        load(method, clip, **settings)
    assert message in str(caught.value)


@dense_only
def test_patch_embeddings_are_local_to_their_window(method, clip) -> None:
    segmenter = load(method, clip)
    assert isinstance(segmenter, DenseSegmenter)
    pixels = torch.randn(3, 3, 48, 80, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        together = segmenter.patch_embeddings(pixels)
        alone = torch.cat([segmenter.patch_embeddings(one[None]) for one in pixels])
    assert together.shape == (3, *segmenter.tower.grid_of(48, 80), 24)
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)
