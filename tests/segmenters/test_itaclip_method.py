"""ITACLIP against its definition with explicit attention maps, view by view and window by window; its texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from scipy import ndimage
from scipy.special import softmax
from typer.testing import CliRunner

from ovss_ray.cli import app
from ovss_ray.errors import SettingError
from ovss_ray.ops.resize import resize_levels
from ovss_ray.segmenters import load_segmenter
from ovss_ray.segmenters.itaclip import ITACLIP
from ovss_ray.vocabulary import Vocabulary, load_vocabulary
from tests import tiny_models

TEXTS = {"cat": "a small animal that purrs", "dog": "a hound", "grass": "a lawn"}
APPEARANCE = ("original", "grayscale", "blur")
FLIPS = ("vertical_flip", "horizontal_flip")
VIEWS = {
    "original": lambda pixels: pixels,
    "grayscale": lambda pixels: TF.rgb_to_grayscale(pixels, num_output_channels=3),
    "blur": lambda pixels: TF.gaussian_blur(pixels, [11, 11], [5.0, 5.0]),
    "vertical_flip": TF.vflip,
    "horizontal_flip": TF.hflip,
}


@pytest.fixture(scope="module")
def deep_clip() -> Any:
    """Twelve blocks, as the published models have: the middle blocks are the published ones."""
    return tiny_models.build(layers=12)


def itaclip(clip: Any, **settings: Any) -> Any:
    return load_segmenter("itaclip", clip=clip, device="cpu", dtype="float32", **settings)


def random_pixels(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def reference_features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Patch features [B, h, w, E] from open_clip's modules, with every attention map written out."""
    visual = model.visual
    patches = visual.conv1(pixels)
    batch, width, h, w = patches.shape
    table = visual.positional_embedding[1:].T.reshape(1, width, 8, 8)
    if (h, w) != (8, 8):
        table = F.interpolate(table, scale_factor=((h + 0.1) / 8, (w + 0.1) / 8), mode="bicubic")
    cls = (visual.class_embedding + visual.positional_embedding[0]).expand(batch, 1, width)
    x = visual.ln_pre(torch.cat([cls, (patches + table).flatten(2).mT], 1))
    maps = {}
    for index, block in enumerate(visual.transformer.resblocks):
        projected = block.ln_1(x) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
        q, k, v = projected.view(batch, -1, 3, 3, 16).permute(2, 0, 3, 1, 4)
        maps[index] = (q @ q.mT / 4).softmax(-1) + (k @ k.mT / 4).softmax(-1)
        if index == 11:
            weights = 0.5 * maps[11] + 0.5 * (maps[6] + maps[7] + maps[9]) / 3
            torch.testing.assert_close(weights.sum(-1), torch.full_like(weights[..., 0], 2.0))
            x = x + block.attn.out_proj((weights @ v).transpose(1, 2).reshape(x.shape))
        else:
            x = block(x)
    return (visual.ln_post(x) @ visual.proj)[:, 1:].view(batch, h, w, -1)


@pytest.mark.parametrize("size", [(64, 64), (64, 104), (120, 48), (71, 99), (8, 8)])
@torch.inference_mode()
def test_the_last_block_shares_its_attention_with_middle_blocks(deep_clip: Any, size: tuple[int, int]) -> None:
    pixels = random_pixels(2, 3, *size)
    expected = reference_features(deep_clip, pixels)
    torch.testing.assert_close(itaclip(deep_clip).patch_embeddings(pixels), expected, atol=2e-5, rtol=1e-4)


def test_middle_blocks_follow_the_depth_and_stay_before_the_last(deep_clip: Any, tiny_clip: Any) -> None:
    assert set(itaclip(deep_clip).recorded_blocks) == {6, 7, 9}
    assert set(itaclip(tiny_models.build(layers=24)).recorded_blocks) == {6, 7, 9}
    for clip, depth in ((tiny_clip, 4), (tiny_models.build(layers=2), 2)):
        assert set(itaclip(clip).recorded_blocks) <= set(range(depth - 1))
        assert itaclip(clip).patch_embeddings(random_pixels(1, 3, 64, 64)).isfinite().all()


def window_map(segmenter: Any, window: torch.Tensor, text: np.ndarray) -> torch.Tensor:
    """Scores [Q, H, W] of one window [1, 3, H, W] by the published steps: cosines are upsampled, then turned back."""
    settings = segmenter.settings

    def upsampled(features: torch.Tensor) -> torch.Tensor:
        cosines = (features @ torch.from_numpy(text).T).permute(0, 3, 1, 2)
        return F.interpolate(cosines, window.shape[-2:], mode="bilinear", align_corners=False)[0]

    def unit(view: str) -> torch.Tensor:
        return F.normalize(segmenter.patch_embeddings(VIEWS[view](window)), dim=-1)

    first = [unit(view) for view in APPEARANCE if view in settings.views]
    second = [VIEWS[view](upsampled(unit(view))) for view in FLIPS if view in settings.views]
    if not second:
        return upsampled(sum(first) / len(first))
    flipped = sum(second) / len(second)
    if not first:
        return flipped
    return settings.img_eng * upsampled(sum(first) / len(first)) + (1 - settings.img_eng) * flipped


def probabilities(segmenter: Any, image: np.ndarray, text: Any) -> np.ndarray:
    """Class probabilities [C, H, W]: windows one by one, their scores averaged, resized and put through the softmax."""
    settings = segmenter.settings
    height, width = image.shape[:2]
    scale = min(settings.max_long_side / max(height, width), settings.short_side / min(height, width))
    size = (int(height * scale + 0.5), int(width * scale + 0.5))
    mean, std = (torch.tensor(part).view(1, 3, 1, 1) for part in (segmenter.clip.pixel_mean, segmenter.clip.pixel_std))
    pixels = (resize_levels(torch.from_numpy(image), size)[None] / 255 - mean) / std
    total, visits = torch.zeros(1, len(text.embeddings), *size), torch.zeros(size)
    crop, stride = settings.crop or max(size), settings.stride
    for row in range(max(size[0] - crop + stride - 1, 0) // stride + 1):
        for column in range(max(size[1] - crop + stride - 1, 0) // stride + 1):
            y2, x2 = min(row * stride + crop, size[0]), min(column * stride + crop, size[1])
            window = np.s_[..., max(y2 - crop, 0) : y2, max(x2 - crop, 0) : x2]
            total[window] += window_map(segmenter, pixels[window], text.embeddings)
            visits[window] += 1
    full = F.interpolate(total / visits, (height, width), mode="bilinear", align_corners=False)[0]
    probability = softmax(settings.logit_scale * full.double().numpy(), axis=0)
    return np.stack([probability[text.query_class == c].max(0) for c in range(text.vocabulary.num_classes)])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"short_side": 100, "crop": 51, "stride": 33, "img_eng": 0.4, "prob_thd": 0.35, "aux_texts": TEXTS},
        {"crop": 0, "short_side": 77, "views": ("blur", "horizontal_flip", "vertical_flip"), "closing": False},
        {"views": ("original", "grayscale")},
        {"views": ("vertical_flip",)},
    ],
)
@torch.inference_mode()
def test_segmentation_follows_the_published_steps(
    deep_clip: Any, vocabulary: Vocabulary, images: list[np.ndarray], settings: dict[str, Any]
) -> None:
    segmenter = itaclip(deep_clip, **settings)
    text = segmenter.encode_vocabulary(vocabulary)
    chosen = images[:4]
    for image, result in zip(chosen, segmenter.segment(chosen, text), strict=True):
        expected = probabilities(segmenter, image, text)
        ranked = np.sort(expected, axis=0)
        np.testing.assert_allclose(result.confidence, ranked[-1], atol=2e-4)
        labels = expected.argmax(0)
        labels[ranked[-1] < segmenter.settings.prob_thd] = vocabulary.background
        steady = ranked[-1] - ranked[-2] > 1e-3
        steady &= np.abs(ranked[-1] - segmenter.settings.prob_thd) > 1e-3
        if segmenter.settings.closing:
            labels = ndimage.grey_closing(labels, size=(3, 3), mode="nearest")
            steady = ndimage.minimum_filter(steady, size=5)
        assert steady.mean() > 0.8
        assert np.array_equal(result.labels[steady], labels[steady])


@torch.inference_mode()
def test_all_weight_on_the_original_view_is_a_single_pass(tiny_clip: Any) -> None:
    pixels, text = random_pixels(2, 3, 64, 72), F.normalize(random_pixels(5, 24), dim=-1)
    single = itaclip(tiny_clip, views=("original",), img_eng=1.0)
    features = F.normalize(single.patch_embeddings(pixels), dim=-1)
    expected = torch.einsum("bhwe,qe->bqhw", features, text)
    torch.testing.assert_close(single.patch_scores(pixels, text, range(5)), expected, atol=1e-6, rtol=0)
    for settings in ({"views": ("original",), "img_eng": 0.3}, {"views": ("original", *FLIPS), "img_eng": 1.0}):
        scores = itaclip(tiny_clip, **settings).patch_scores(pixels, text, range(5))
        assert torch.equal(scores, single.patch_scores(pixels, text, range(5)))


@pytest.mark.parametrize(("view", "axis"), [("horizontal_flip", -1), ("vertical_flip", -2)])
@pytest.mark.parametrize("size", [(64, 64), (40, 88), (67, 75)])
@torch.inference_mode()
def test_flipping_the_input_flips_the_output_exactly(
    tiny_clip: Any, view: str, axis: int, size: tuple[int, int]
) -> None:
    segmenter = itaclip(tiny_clip, views=("original", view), img_eng=0.5)
    pixels, text = random_pixels(1, 3, *size), F.normalize(random_pixels(5, 24), dim=-1)
    scores = segmenter.patch_scores(pixels, text, range(5))
    assert torch.equal(segmenter.patch_scores(pixels.flip(axis), text, range(5)), scores.flip(axis))
    assert not torch.allclose(scores, scores.flip(axis), atol=1e-3)


class PatchMeans(ITACLIP):
    """Has the mean colour of a patch as its features, so that a flipped view can only differ by where its map lies."""

    def patch_embeddings(self, pixels: torch.Tensor) -> torch.Tensor:
        return F.pad(F.avg_pool2d(pixels, 8).movedim(1, -1), (0, 24 - 3))


@pytest.mark.parametrize("view", FLIPS)
@pytest.mark.parametrize(
    ("size", "pad"),
    [((64, 96), 0), ((61, 95), "patch"), ((62, 94), "patch"), ((50, 81), 24), ((3, 96), 0), ((96, 2), 0)],
)
def test_maps_of_flipped_views_lie_right_however_windows_are_padded(
    tiny_clip: Any, vocabulary: Vocabulary, images: list[np.ndarray], view: str, size: tuple[int, int], pad: int | str
) -> None:
    image = np.resize(images[1], (*size, 3))
    settings = {"crop": 0, "short_side": 16, "max_long_side": 96, "pad": pad, "closing": False}
    if min(size) >= 16:
        settings["short_side"] = min(size)
    results = []
    for views in (("original",), (view,)):
        segmenter = PatchMeans.load(clip=tiny_clip, device="cpu", dtype="float32", views=views, **settings)
        results.append(segmenter.segment(image, segmenter.encode_vocabulary(vocabulary)))
    np.testing.assert_allclose(results[0].confidence, results[1].confidence, atol=1e-5)
    assert np.ptp(results[0].confidence) > 0.01


def test_defaults_are_the_published_ones_of_the_class(tiny_clip: Any) -> None:
    settings = itaclip(tiny_clip).settings
    assert (settings.img_eng, settings.alpha, settings.logit_scale) == (0.75, 0.2, 40.0)
    assert (settings.crop, settings.stride, settings.positional) == (64, 32, "dino_offset")
    assert (settings.views, settings.closing, settings.aux_texts) == ((*APPEARANCE, *FLIPS), True, None)
    assert settings.view_weights() == pytest.approx({**dict.fromkeys(APPEARANCE, 0.25), **dict.fromkeys(FLIPS, 0.125)})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": ()}, "views = .*at least 1 item"),
        ({"views": ("blur", "blur")}, "views = .*: must name each view once"),
        ({"views": ("sepia",)}, "views = 'sepia'.*'horizontal_flip'"),
        ({"img_eng": 1.5}, "img_eng = 1.5"),
        ({"alpha": -0.1}, "alpha = -0.1"),
        ({"aux_texts": "nowhere.yaml"}, "aux_texts = 'nowhere.yaml': the file of class texts nowhere.yaml does not"),
        (
            {"aux_texts": {**dict.fromkeys(map(str, range(99)), "x"), "cat": ""}},
            "aux_texts = .*the text of 'cat' is empty",
        ),
        ({"aux_texts": 3}, "aux_texts = 3: must be a mapping 'class name: text' or a file, not a int"),
    ],
)
def test_wrong_settings_are_refused(tiny_clip: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=f"settings of itaclip: {message}") as caught:
        itaclip(tiny_clip, **settings)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


def test_texts_are_mixed_into_the_queries_and_not_normalised(tiny_clip: Any, vocabulary: Vocabulary) -> None:
    plain, mixed = itaclip(tiny_clip), itaclip(tiny_clip, aux_texts=TEXTS, alpha=0.3)
    original, got = plain.encode_vocabulary(vocabulary), mixed.encode_vocabulary(vocabulary)
    aux = plain.encode_vocabulary(load_vocabulary(list(TEXTS.values()), templates=vocabulary.templates)).embeddings
    expected = [
        row if c == vocabulary.background else 0.7 * row + 0.3 * aux[c]
        for row, c in zip(original.embeddings, original.query_class, strict=True)
    ]
    np.testing.assert_allclose(got.embeddings, expected, atol=1e-6)
    assert got.embeddings.dtype == np.float32
    assert np.array_equal(got.embeddings[4], original.embeddings[4])
    assert (np.linalg.norm(got.embeddings[:4], axis=1) < 0.999).all()
    assert np.array_equal(got.query_class, original.query_class)
    assert got.vocabulary == vocabulary
    without = itaclip(tiny_clip, aux_texts=TEXTS, alpha=0.0).encode_vocabulary(vocabulary)
    np.testing.assert_allclose(without.embeddings, original.embeddings, atol=1e-7)


def test_without_a_background_every_class_has_a_text(tiny_clip: Any) -> None:
    segmenter = itaclip(tiny_clip, aux_texts={**TEXTS, "unused": "anything"})
    text = segmenter.encode_vocabulary(load_vocabulary("grass,cat", templates="single"))
    assert (np.linalg.norm(text.embeddings, axis=1) < 0.999).all()
    message = "aux_texts has no text for 'dogs' and 1 more of the vocabulary 'custom'; add one .*; did you mean 'dog'?"
    with pytest.raises(SettingError, match=message):
        segmenter.encode_vocabulary(load_vocabulary("cat,dogs,moon", templates="single"))


def test_texts_that_the_tower_would_cut_off_are_refused(tiny_clip: Any, vocabulary: Vocabulary) -> None:
    segmenter = itaclip(tiny_clip, aux_texts={**TEXTS, "dog": "woof " * 80})
    with pytest.raises(SettingError, match="of class 'dog' in the template .* tokens, .* reads 77; shorten it"):
        segmenter.encode_vocabulary(vocabulary)


def test_a_file_of_texts_is_part_of_what_identifies_the_settings(tiny_clip: Any, tmp_path: Path) -> None:
    path = tmp_path / "texts.json"
    path.write_text(json.dumps(TEXTS))
    settings = itaclip(tiny_clip, aux_texts=path).settings
    assert settings.label_settings() == itaclip(tiny_clip, aux_texts=TEXTS).settings.label_settings()
    assert settings.label_settings()["aux_texts"] == TEXTS
    assert ITACLIP.parse_settings(settings.model_dump(mode="json")) == settings


def test_a_run_keeps_the_texts_and_refuses_others(tmp_path: Path, images: list[np.ndarray]) -> None:
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.fromarray(images[0]).save(tmp_path / "photos" / "a.png")
    texts = tmp_path / "texts.yaml"
    run = str(tmp_path / "run")
    flags = ["--classes", "cat,dog", "--clip", "ovss-demo/random", "--engine", "local", "--templates", "single"]
    flags += ["--method", "itaclip", "--set", f"aux_texts={texts}"]

    def label() -> Any:
        return CliRunner().invoke(app, ["label", str(tmp_path / "photos"), run, *flags])

    texts.write_text("cat: a kitten\n")
    assert "aux_texts has no text for 'dog' of the vocabulary" in str(label().exception)
    texts.write_text("cat: a kitten\ndog: " + "woof " * 80)
    assert "of class 'dog' in the template" in str(label().exception)
    assert not Path(run).exists()
    texts.write_text("cat: a kitten\ndog: a hound\n")
    assert label().exit_code == 0
    record = json.loads((Path(run) / "run.json").read_text())
    assert record["identity"]["settings"]["aux_texts"] == {"cat": "a kitten", "dog": "a hound"}
    texts.write_text("cat: a kitten\ndog: a puppy\n")
    assert 'settings.aux_texts.dog: the run has "a hound", asked for "a puppy"' in str(label().exception)


def test_closing_is_the_last_step_and_optional(
    tiny_clip: Any, vocabulary: Vocabulary, images: list[np.ndarray]
) -> None:
    closed, plain = itaclip(tiny_clip, prob_thd=0.45), itaclip(tiny_clip, prob_thd=0.45, closing=False)
    open_ended = load_vocabulary(list(vocabulary.names), templates="single")
    text = plain.encode_vocabulary(open_ended)
    after, before = closed.segment(images[1], text), plain.segment(images[1], text)
    lowest = np.where(before.labels == 255, -1, before.labels.astype(int))
    expected = ndimage.grey_closing(lowest, size=(3, 3), mode="nearest")
    assert (before.labels == 255).any()
    assert (after.labels != before.labels).any()
    assert np.array_equal(after.labels, np.where(expected < 0, 255, expected))
    assert np.array_equal(after.confidence, before.confidence)
