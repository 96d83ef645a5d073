"""ConvCLIP: raw modules of open_clip and plain loops against the segmenter, its settings, and a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from ovss_ray import open_run
from ovss_ray.errors import SettingError, WeightsError
from ovss_ray.models.conv import ConvTower
from ovss_ray.models.sources import tower_shape
from ovss_ray.run.driver import run_job
from ovss_ray.segmenters import DenseSegmenter, get_method, load_segmenter
from ovss_ray.segmenters.convclip import ConvCLIP, ConvCLIPSettings
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import Vocabulary, load_vocabulary
from tests import tiny_models


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    return tiny_models.build_conv()


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.register_conv(tmp_path_factory.mktemp("architectures"))


def convclip(model: Any, **settings: Any) -> DenseSegmenter[ConvTower]:
    segmenter = load_segmenter("convclip", clip=model, device="cpu", dtype="float32", **settings)
    assert isinstance(segmenter, ConvCLIP)
    return segmenter


def pixels(height: int, width: int) -> torch.Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize("proj", ["linear", "mlp"])
@pytest.mark.parametrize("size", [(64, 64), (32, 32), (96, 160), (70, 39)])
@torch.inference_mode()
def test_every_position_is_encoded_like_the_pooled_image(proj: str, size: tuple[int, int]) -> None:
    model = tiny_models.build_conv(timm_proj=proj)
    visual: Any = model.visual
    features = visual.trunk.forward_features(pixels(*size))
    got = convclip(model).patch_embeddings(pixels(*size))
    assert got.shape == (2, size[0] // 32, size[1] // 32, 24)
    for image, row, column in np.ndindex(got.shape[:3]):
        x = features[image, :, row, column]
        x = F.layer_norm(x, x.shape, visual.trunk.head.norm.weight, visual.trunk.head.norm.bias, 1e-5)
        torch.testing.assert_close(got[image, row, column], visual.head(x[None])[0], atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_an_image_of_one_patch_gets_the_embedding_of_the_whole_image(model: open_clip.CLIP) -> None:
    assert torch.equal(convclip(model).patch_embeddings(pixels(32, 32))[:, 0, 0], model.encode_image(pixels(32, 32)))


@torch.inference_mode()
def test_half_the_stride_gives_four_times_the_patches(model: open_clip.CLIP) -> None:
    """The dilated maps themselves are compared in tests/models/test_conv_tower.py."""
    segmenter = convclip(model, output_stride=16)
    got = segmenter.patch_embeddings(pixels(64, 96))
    assert got.shape == (2, 4, 6, 24)
    tower = segmenter.tower
    torch.testing.assert_close(got, tower.head(tower.features(pixels(64, 96))))
    alone = torch.cat([segmenter.patch_embeddings(one[None]) for one in pixels(64, 96)])
    torch.testing.assert_close(got, alone, atol=1e-5, rtol=1e-4)


def test_the_strides_differ_and_both_segment(model: open_clip.CLIP, vocabulary, images) -> None:  # type: ignore[no-untyped-def]
    plain, denser = convclip(model, max_long_side=200), convclip(model, max_long_side=200, output_stride=16)
    text = plain.encode_vocabulary(vocabulary)
    together = denser.segment(images, text)
    for image, one, other in zip(images, together, plain.segment(images, text), strict=True):
        assert one.labels.shape == image.shape[:2]
        np.testing.assert_allclose(one.confidence, denser.segment(image, text).confidence, atol=1e-4)
        if min(image.shape[:2]) > 20:
            assert not np.allclose(one.confidence, other.confidence, atol=1e-3)


def test_the_whole_image_goes_through_in_one_piece_padded_to_whole_patches(
    model: open_clip.CLIP, vocabulary: Vocabulary, monkeypatch: pytest.MonkeyPatch
) -> None:
    segmenter, seen = convclip(model), []
    monkeypatch.setattr(segmenter.tower, "features", lambda x: seen.append(x) or torch.ones(len(x), 64, 3, 5))
    segmenter.segment(np.full((70, 110, 3), 9, np.uint8), segmenter.encode_vocabulary(vocabulary))
    (whole,) = seen  # 70 x 110 is resized to 96 x 151, which takes 5 patches
    assert whole.shape == (1, 3, 96, 160)
    assert (whole[..., :4] == 0).all()
    assert (whole[..., 4:155] != 0).all()
    assert (whole[..., 155:] == 0).all()


def test_settings_follow_the_model_and_know_no_positions(model: open_clip.CLIP) -> None:
    settings = convclip(model).settings
    assert isinstance(settings, ConvCLIPSettings)
    assert (settings.short_side, settings.crop, settings.pad, settings.output_stride) == (96, 0, "patch", 32)
    assert settings.resolve(convclip(model).tower.shape) == settings
    resolved = ConvCLIPSettings().resolve(tower_shape("convnext_base_w_320", ConvTower))
    assert (resolved.short_side, resolved.crop) == (480, 0)
    assert convclip(model, crop=None).settings.crop == 64
    with pytest.raises(SettingError, match="unknown setting 'positional'"):
        convclip(model, positional="bicubic")
    with pytest.raises(SettingError, match="output_stride = 8"):
        convclip(model, output_stride=8)


def test_methods_of_transformers_know_positions(tiny_clip: open_clip.CLIP) -> None:
    with pytest.raises(SettingError, match="positional = 'cubic'"):
        load_segmenter("clipbase", clip=tiny_clip, device="cpu", positional="cubic")


def test_models_of_the_other_kind_are_refused_in_both_directions(model: open_clip.CLIP, tiny_clip) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(WeightsError, match="its vision tower is no ConvNeXt; this method needs a ConvNeXt CLIP"):
        load_segmenter("convclip")
    with pytest.raises(WeightsError, match="is a VisionTransformer; this method needs a ConvNeXt CLIP"):
        load_segmenter("convclip", clip=tiny_clip)
    with pytest.raises(WeightsError, match="timm model convnext_base; dense methods need a CLIP vision transformer"):
        load_segmenter("maskclip", clip="convnext_base_w/laion2b_s13b_b82k")
    with pytest.raises(WeightsError, match="is a TimmModel; dense methods need a CLIP vision transformer"):
        load_segmenter("maskclip", clip=model)


def test_the_card_says_that_the_method_is_ours() -> None:
    card = get_method("convclip").card
    assert "ours" in card.title
    assert card.published == {}
    assert "unpublished" in card.venue


def test_a_run_labels_as_the_segmenter_does(model: open_clip.CLIP, architecture: str, images, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "in").mkdir()
    for index, image in enumerate(images[:5]):
        Image.fromarray(image).save(tmp_path / "in" / f"{index}.png")
    clip, settings = f"{architecture}//{tmp_path}/w.safetensors", {"output_stride": 16, "max_long_side": 128}
    job = {"classes": "cat,dog,grass", "templates": "single", "method": "convclip", "clip": clip, "settings": settings}
    place = {"input": str(tmp_path / "in"), "run": str(tmp_path / "run"), "engine": "local"}
    assert run_job(JobSpec.build({**place, **job}, source="test")).labelled == 5
    segmenter = convclip(model, **settings)
    text = segmenter.encode_vocabulary(load_vocabulary("cat,dog,grass", templates="single"))
    with open_run(str(tmp_path / "run")) as run:
        uris = dict(run.sql("SELECT image_id, uri FROM images").fetchall())
        for image_id, labels in run.label_maps():
            alone = segmenter.segment(images[int(Path(uris[image_id]).stem)], text)
            steady = alone.margin > 1e-3
            np.testing.assert_array_equal(labels[steady], alone.labels[steady])
