"""TagCLIP against all of it written out: open_clip's own modules, explicit maps, loops, and autograd by hooks."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import ndimage

from ovss_ray.errors import SettingError
from ovss_ray.models.vision import TowerShape
from ovss_ray.segmenters import TextEmbeddings, load_segmenter
from ovss_ray.segmenters.tagclip import TagCLIPSettings, cam_texts, refine, tight_box
from ovss_ray.vocabularies.clip_es import COCO_BACKGROUND, VOC_BACKGROUND
from ovss_ray.vocabulary import Vocabulary, load_vocabulary
from tests import tiny_models
from tests.segmenters.conftest import smooth_image

PATCH, SIDE, GRID, SCALE = 8, 64, 8, 12.0


def tagclip(clip, **settings: Any):  # type: ignore[no-untyped-def]
    return load_segmenter("tagclip", clip=clip, device="cpu", dtype="float32", **settings)


@pytest.fixture(scope="module")
def deep_clip() -> open_clip.CLIP:
    """Twelve blocks, so that the published block numbers hold, and weights that leave no softmax saturated.

    The offset of the positions, which the first LayerNorm takes away, makes their rounding to float16 visible.
    """
    model = tiny_models.build(seed=5, layers=12)
    with torch.no_grad():
        model.visual.positional_embedding.add_(100)
        for block in model.visual.transformer.resblocks:
            block.attn.out_proj.weight.mul_(0.5)
            block.mlp.c_proj.weight.mul_(0.5)
    return model


# --- the reference ---------------------------------------------------------------------------------------------------


@dataclass
class Expected:
    """What the reference found on its way."""

    scores: np.ndarray = field(default_factory=lambda: np.zeros(0))
    tags: list[int] = field(default_factory=list)
    crops: int = 0
    volume: np.ndarray = field(default_factory=lambda: np.zeros(0))
    ids: list[int] = field(default_factory=list)


def encode(clip: Any, queries: list[str], templates: list[str]) -> torch.Tensor:
    tokens = [open_clip.tokenize([t.replace("{}", query) for t in templates]) for query in queries]
    rows = [F.normalize(F.normalize(clip.encode_text(one), dim=-1).mean(0), dim=-1) for one in tokens]
    return torch.stack(rows)


def positions(clip: Any, h: int, w: int, always: bool) -> torch.Tensor:
    table = clip.visual.positional_embedding
    if (h, w) == (GRID, GRID) and not always:
        return table
    patches = F.interpolate(table[1:].T.view(1, -1, GRID, GRID), size=(h, w), mode="bilinear", align_corners=False)
    return torch.cat([table[:1], patches[0].flatten(1).T]).half().float()


def tokens_of(clip: Any, pixels: torch.Tensor, always: bool = False) -> torch.Tensor:
    visual = clip.visual
    patches = visual.conv1(pixels)[0]
    x = torch.cat([visual.class_embedding[None], patches.flatten(1).T])
    return visual.ln_pre(x + positions(clip, *patches.shape[1:], always))[None]


def run_blocks(clip: Any, x: torch.Tensor) -> tuple[torch.Tensor, list[np.ndarray]]:
    """The tokens that enter the last block, and every block's head-averaged map of patches."""
    maps = []
    for index, block in enumerate(clip.visual.transformer.resblocks):
        u = block.ln_1(x)
        maps.append(block.attn(u, u, u, need_weights=True)[1][0, 1:, 1:].numpy())
        if index < 11:
            x = block(x)
    return x, maps


def scale_to_one(scores: np.ndarray, eps: float = 0.0) -> np.ndarray:
    shifted = scores - scores.min()
    return shifted / (shifted.max() + eps)


def boxes(scores: np.ndarray, share: float) -> np.ndarray:
    levels = (scores * 255).astype(np.uint8)
    groups, _ = ndimage.label(levels > int(share * levels.max()), structure=np.ones((3, 3)))
    mask = np.zeros(scores.shape)
    for rows, columns in ndimage.find_objects(groups):
        bottom, right = min(rows.stop, len(scores) - 1), min(columns.stop, scores.shape[1] - 1)
        mask[rows.start : bottom, columns.start : right] = 1
    return mask


def class_scores(features: torch.Tensor, names: list[list[torch.Tensor]]) -> np.ndarray:
    """Softmax over all rows, then the largest of each class."""
    rows = torch.stack([row for group in names for row in group])
    p = (SCALE * F.normalize(features, dim=-1) @ rows.T).softmax(-1).numpy()
    starts = np.cumsum([0, *(len(group) for group in names)])
    return np.stack([p[..., a:b].max(-1) for a, b in pairwise(starts)], -1)


def stages_a_and_b(clip: Any, pixels: torch.Tensor, names: list, blocks: list[int]) -> np.ndarray:
    h, w = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
    x, maps = run_blocks(clip, tokens_of(clip, pixels))
    visual = clip.visual
    alone = -100.0 * (1 - torch.eye(x.shape[1]))
    features = visual.ln_post(visual.transformer.resblocks[-1](x, attn_mask=alone))[0, 1:] @ visual.proj
    s0 = class_scores(features, names)
    votes = sum((a > a.mean()).astype(int) for a in maps)
    affinity = np.mean([maps[i] for i in blocks], axis=0) * (votes >= 4)
    s1 = affinity @ s0
    s2 = s1.copy()
    for c in range(s0.shape[1]):
        m = scale_to_one(s1[:, c]).reshape(h, w)
        s2[:, c] = (affinity * boxes(m, m.mean()).reshape(1, -1)) @ s0[:, c]
    return s2


def stage_c(clip: Any, pixels: torch.Tensor, s2: np.ndarray, names: list, count: int, t: float) -> tuple[list, int]:
    h, w = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
    y = s2.max(0)[:count].copy()
    limit = s2.min() + t * (s2.max() - s2.min())
    looked = 0
    for c in [c for c in range(count) if y[c] > limit]:
        m = scale_to_one(s2[:, c]).reshape(h, w) > 0.5
        rows, columns = np.where(m.any(1))[0], np.where(m.any(0))[0]
        y1, y2, x1, x2 = rows[0], min(rows[-1] + 1, h - 1), columns[0], min(columns[-1] + 1, w - 1)
        if y1 == y2 or x1 == x2:
            break
        crop = pixels[:, :, y1 * PATCH : y2 * PATCH, x1 * PATCH : x2 * PATCH]
        x = tokens_of(clip, F.interpolate(crop, size=(SIDE, SIDE), mode="bilinear", align_corners=False))
        mask = torch.zeros(1 + GRID * GRID, 1 + GRID * GRID)
        for j in range(GRID * GRID):
            source = (j // GRID * (y2 - y1) // GRID + y1, j % GRID * (x2 - x1) // GRID + x1)
            if not m[source]:
                mask[0, 1 + j] = -1000
        for block in clip.visual.transformer.resblocks:
            x = block(x, attn_mask=mask)
        p = class_scores(clip.visual.ln_post(x[:, 0]) @ clip.visual.proj, names)[0]
        y[c] = 0.5 * y[c] + 0.5 * p[c]
        looked += 1
    tags = [c for c in range(count) if y[c] > y.min() + t * (y.max() - y.min())]
    return tags or [int(y.argmax())], looked


def stage_d(clip: Any, pixels: torch.Tensor, text: torch.Tensor, count: int, blocks: list[int], thd: float) -> list:
    h, w = pixels.shape[2] // PATCH, pixels.shape[3] // PATCH
    with torch.no_grad():
        x, maps = run_blocks(clip, tokens_of(clip, pixels, always=True))
    visual = copy.deepcopy(clip.visual)
    seen: list[torch.Tensor] = []
    last = visual.transformer.resblocks[-1]
    last.ln_1.register_forward_hook(lambda *call: seen.append(call[2].retain_grad() or call[2]))
    a = np.mean([maps[i] for i in blocks], axis=0)
    for _ in range(3):
        a = a / a.sum(0, keepdims=True)
        a = a / a.sum(1, keepdims=True)
    a = (a + a.T) / 2
    a = a @ a
    cams = []
    for c in range(count):
        pooled = visual.ln_post(last(x.clone().requires_grad_()))[:, 1:].mean(1) @ visual.proj
        (SCALE * F.normalize(pooled, dim=-1) @ text.T).softmax(-1)[0, c].backward()
        z, g = seen[-1].detach()[0, 1:].numpy(), seen[-1].grad[0, 1:].mean(0).numpy()  # type: ignore[union-attr]
        cam = scale_to_one(scale_to_one(np.maximum(z @ g, 0), 1e-7), 1e-7).reshape(h, w)
        spread = (a * boxes(cam, thd).reshape(1, -1)) @ cam.ravel()
        cams.append(scale_to_one(spread, 1e-7).reshape(h, w))
    return cams


@torch.no_grad()
def reference(clip: Any, image: np.ndarray, vocabulary: Vocabulary, variant: str) -> Expected:
    smoothing = list(range(11)) if variant == "stuff" else [8, 9, 10]
    cam_blocks = list(range(4, 11 if variant == "voc" else 12))
    t, thd = (0.1 if variant == "stuff" else 0.5), (0.4 if variant == "voc" else 0.7)
    lists = {"voc": list(VOC_BACKGROUND), "coco": list(COCO_BACKGROUND), "stuff": []}
    background = lists[variant] if vocabulary.background is not None else []
    height, width = image.shape[:2]
    h, w = math.ceil(height / PATCH), math.ceil(width / PATCH)
    resized = np.asarray(Image.fromarray(image).resize((w * PATCH, h * PATCH), Image.Resampling.BICUBIC))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))
    pixels = ((torch.from_numpy(resized.copy()).permute(2, 0, 1) / 255 - mean) / std)[None]
    classes = [item for item in vocabulary.classes if item.id != vocabulary.background]
    templates = list(vocabulary.templates)
    names = [list(encode(clip, list(item.queries), templates)) for item in classes]
    names += [[row] for row in (encode(clip, background, templates) if background else [])]
    found = Expected(scores=stages_a_and_b(clip, pixels, names, smoothing))
    found.tags, found.crops = stage_c(clip, pixels, found.scores, names, len(classes), t)
    found.ids = [classes[c].id for c in found.tags]
    words = [cam_texts(vocabulary)[i] for i in found.ids] + (background or ["background"])
    text = encode(clip, words, ["a clean origami {}."])
    with torch.enable_grad():
        cams = stage_d(clip, pixels, text, len(found.tags), cam_blocks, thd)
    full = [F.interpolate(torch.tensor(cam)[None, None].float(), (height, width), mode="bilinear") for cam in cams]
    found.volume = np.stack([one[0, 0].numpy() for one in full])
    return found


def expected_labels(found: Expected, background: int | None) -> tuple[np.ndarray, np.ndarray]:
    volume, ids = found.volume, found.ids
    if background is not None:
        volume, ids = np.concatenate([1 - volume.max(0, keepdims=True), volume]), [background, *ids]
    return np.array(ids)[volume.argmax(0)], volume.max(0) / volume.sum(0)


# --- the tests -------------------------------------------------------------------------------------------------------


def classes(background: bool) -> Vocabulary:
    """Synonyms, an altered name, and, if asked for, a background among the classes."""
    named = {"grass": ["lawn", "green field"], "bird": [], "rest": ["anything"], "car": [], "dog": [], "river": []}
    templates = ["a photo of a {}.", "one {} on the left", "{}"]
    return load_vocabulary(named, templates=templates, background="rest" if background else None)


@pytest.mark.parametrize(
    ("variant", "background", "size"),
    [
        ("voc", True, (64, 64)),
        ("voc", True, (52, 90)),
        ("coco", True, (100, 41)),
        ("stuff", False, (64, 64)),
        ("stuff", False, (61, 120)),
    ],
)
def test_all_stages_are_what_the_paper_says(deep_clip, rng, variant: str, background: bool, size) -> None:
    vocabulary = classes(background)
    segmenter = tagclip(deep_clip, variant=variant, logit_scale=SCALE)
    text = segmenter.encode_vocabulary(vocabulary)
    images = [smooth_image(rng, *size) for _ in range(3)]
    tags = crops = 0
    for image, result in zip(images, segmenter.segment(images, text), strict=True):
        found = reference(deep_clip, image, vocabulary, variant)
        labels, confidence = expected_labels(found, vocabulary.background)
        np.testing.assert_allclose(result.confidence, confidence, atol=3e-4)
        steady = result.margin > 1e-3
        assert np.array_equal(result.labels[steady], labels[steady])
        assert steady.mean() > 0.9
        tags, crops = tags + len(found.tags), crops + found.crops
    assert tags >= 4
    assert crops >= 3


@pytest.mark.parametrize("variant", ["voc", "coco"])
def test_dense_labels_by_the_smoothed_scores(deep_clip, rng, variant: str) -> None:
    vocabulary = classes(True)
    image = smooth_image(rng, 52, 90)
    segmenter = tagclip(deep_clip, variant=variant, logit_scale=SCALE, dense=True)
    result = segmenter.segment(image, vocabulary)
    found = reference(deep_clip, image, vocabulary, variant)
    maps = np.concatenate([found.scores[:, found.tags], found.scores[:, 5:].max(1, keepdims=True)], 1)
    full = F.interpolate(torch.tensor(maps.T.reshape(1, -1, 7, 12)), (52, 90), mode="bilinear")[0].numpy()
    np.testing.assert_allclose(result.confidence, full.max(0) / full.sum(0), atol=1e-5)
    steady = result.margin > 1e-3
    assert np.array_equal(result.labels[steady], np.array([*found.ids, 2])[full.argmax(0)][steady])


@torch.inference_mode()
def test_on_the_native_grid_the_tower_is_maskclips(deep_clip) -> None:
    pixels = torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    maskclip = load_segmenter("maskclip", clip=deep_clip, device="cpu", dtype="float32", variant="official")
    torch.testing.assert_close(tagclip(deep_clip).patch_embeddings(pixels), maskclip.patch_embeddings(pixels))


@pytest.mark.parametrize("low_memory", [False, True])
def test_batches_of_crops_and_low_memory_change_nothing(deep_clip, rng, low_memory: bool) -> None:
    image = smooth_image(rng, 61, 120)
    usual = tagclip(deep_clip, variant="stuff", logit_scale=SCALE)
    narrow = tagclip(deep_clip, variant="stuff", logit_scale=SCALE, window_batch=1)
    assert usual.settings.label_settings() == narrow.settings.label_settings()
    text = usual.encode_vocabulary(classes(False))
    a, b = usual.segment(image, text), narrow.segment(image, text, low_memory=low_memory)
    np.testing.assert_allclose(a.confidence, b.confidence, atol=1e-4)
    assert np.array_equal(a.labels[a.margin > 1e-3], b.labels[a.margin > 1e-3])


def test_a_column_that_scores_nowhere_keeps_its_zeros() -> None:
    affinity, scores = torch.ones(6, 6) + torch.eye(6), torch.ones(6, 3)
    scores[0] = 3
    scores[:, 1] = 0
    refined = refine(scores, affinity, (2, 3))
    assert not refined[:, 1].any()
    assert refined[:, 0].any()
    assert torch.equal(refine(scores[:1], torch.zeros(1, 1), (1, 1)), scores[:1])


def test_tight_boxes_stop_before_the_last_row_and_column() -> None:
    mask = torch.zeros(5, 7, dtype=torch.bool)
    assert tight_box(mask) is None
    mask[1, 2] = mask[3, 4] = True
    assert tight_box(mask) == (1, 4, 2, 5)
    mask[4, 6] = True
    assert tight_box(mask) == (1, 4, 2, 6)
    corner = torch.zeros(5, 7, dtype=torch.bool)
    corner[4, 1] = True
    assert tight_box(corner) is None
    assert tight_box(torch.ones(1, 3, dtype=torch.bool)) == (0, 1, 0, 2)


def test_gradients_stay_out_of_the_model(deep_clip, rng) -> None:
    tagclip(deep_clip).segment(smooth_image(rng, 40, 40), classes(True))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in deep_clip.parameters())


@pytest.mark.parametrize("size", [(1, 1), (3, 200), (200, 3), (9, 8)])
@pytest.mark.parametrize("background", [False, True])
@pytest.mark.parametrize("dense", [False, True])
def test_tiny_images_get_labels(tiny_clip, rng, size: tuple[int, int], background: bool, dense: bool) -> None:
    vocabulary = classes(background)
    result = tagclip(tiny_clip, dense=dense).segment(rng.integers(0, 256, (*size, 3), dtype=np.uint8), vocabulary)
    assert result.labels.shape == size
    assert result.labels.max() < vocabulary.num_classes
    assert ((result.confidence > 0) & (result.confidence <= 1)).all()


def test_the_background_is_never_a_tag_and_single_classes_work(tiny_clip, rng) -> None:
    image = smooth_image(rng, 40, 56)
    one = tagclip(tiny_clip).segment(image, load_vocabulary(["dog"], templates="single"))
    assert not one.labels.any()
    np.testing.assert_array_equal(one.confidence, 1)
    two = tagclip(tiny_clip).segment(image, load_vocabulary(["rest", "dog"], templates="single", background="rest"))
    assert set(np.unique(two.labels)) == {0, 1}
    with pytest.raises(SettingError, match="has a background and nothing else"):
        tagclip(tiny_clip).encode_vocabulary(load_vocabulary(["rest"], background="rest"))


def test_texts_follow_the_vocabulary_and_the_settings(tiny_clip) -> None:
    with_background, without = classes(True), classes(False)
    assert cam_texts(without) == ("grass", "bird avian", "rest", "car", "dog", "river")
    assert len(VOC_BACKGROUND) == 25
    assert set(VOC_BACKGROUND) - set(COCO_BACKGROUND) == {"keyboard", "sign"}
    for settings, vocabulary, names in (
        ({}, with_background, 25),
        ({"variant": "coco"}, with_background, 23),
        ({"variant": "stuff"}, with_background, 0),
        ({}, without, 0),
        ({"background_names": ("sky", "sea")}, without, 2),
        ({"background_names": ()}, with_background, 0),
    ):
        extra = tagclip(tiny_clip, **settings).encode_vocabulary(vocabulary).extra
        assert len(extra.get("background", ())) == names
        assert len(extra["cam_background"]) == max(1, names)
        assert extra["cam_classes"].shape == (6, 24)
    word = extra["cam_background"]
    np.testing.assert_allclose(word, encode(tiny_clip, ["background"], ["a clean origami {}."]).detach(), atol=1e-5)


def test_texts_of_other_methods_and_overlong_names_are_refused(tiny_clip, images) -> None:
    text = tagclip(tiny_clip).encode_vocabulary(classes(True))
    plain = TextEmbeddings(text.embeddings, text.query_class, text.vocabulary)
    with pytest.raises(SettingError, match="encode the vocabulary with this one"):
        tagclip(tiny_clip).segment(images[0], plain)
    with pytest.raises(SettingError, match=r"the query 'sea sea.*tokens"):
        tagclip(tiny_clip, background_names=("sea " * 90,)).encode_vocabulary(classes(True))


@pytest.mark.parametrize(
    ("variant", "depth", "smoothing", "cam", "votes"),
    [
        ("voc", 12, range(8, 11), range(4, 11), 4),
        ("coco", 12, range(8, 11), range(4, 12), 4),
        ("stuff", 12, range(11), range(4, 12), 4),
        ("voc", 24, range(8, 11), range(4, 11), 8),
        ("voc", 4, (2,), (1, 2), 1),
        ("coco", 6, (4,), (2, 3, 4, 5), 2),
        ("stuff", 1, (0,), (0,), 1),
    ],
)
def test_published_values_follow_variant_and_model(variant, depth: int, smoothing, cam, votes: int) -> None:
    shape = TowerShape(224, 16, depth)
    settings = TagCLIPSettings(variant=variant).resolve(shape)
    assert settings.smoothing_blocks == tuple(smoothing)
    assert settings.cam_blocks == tuple(cam)
    assert settings.votes == votes
    assert (settings.tag_thd, settings.cam_box_thd) == (
        0.1 if variant == "stuff" else 0.5,
        0.4 if variant == "voc" else 0.7,
    )
    assert settings.resolve(shape) == settings
    own = TagCLIPSettings(votes=0, tag_thd=0, cam_box_thd=0, cam_blocks=(0,)).resolve(shape)
    assert (own.votes, own.tag_thd, own.cam_box_thd, own.cam_blocks) == (0, 0, 0, (0,))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cam_blocks": (3, 4)}, r"cam_blocks = \[3, 4\]: the model has blocks 0 to 3"),
        ({"smoothing_blocks": (-1,)}, r"smoothing_blocks = \[-1\]: the model has blocks 0 to 3"),
        ({"votes": 5}, "votes = 5: the model has 4 blocks"),
        ({"tag_thd": 1}, "tag_thd = 1"),
        ({"variant": "ade"}, "variant = 'ade'"),
        ({"short_side": 300}, "unknown setting 'short_side'"),
    ],
)
def test_wrong_settings_are_refused(tiny_clip, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        tagclip(tiny_clip, **settings)


def test_images_above_the_cap_are_shrunk_and_others_are_not(deep_clip, rng) -> None:
    image = smooth_image(rng, 60, 120)
    vocabulary = classes(True)
    free, capped = tagclip(deep_clip, max_long_side=120), tagclip(deep_clip, max_long_side=64)
    assert free.size_in_patches(60, 120, 120) == (64, 120)
    assert capped.size_in_patches(60, 120, 64) == (32, 64)
    same = tagclip(deep_clip).segment(image, vocabulary)
    assert np.array_equal(free.segment(image, vocabulary).confidence, same.confidence)
    assert capped.segment(image, vocabulary).labels.shape == (60, 120)
