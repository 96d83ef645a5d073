"""The dense ConvNeXt tower against open_clip's own forward pass, explicit dilation, and models that it cannot read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from ovss_ray.errors import SettingError, WeightsError
from ovss_ray.models.clip import load_clip
from ovss_ray.models.conv import ConvTower
from ovss_ray.models.sources import parse_clip, resolve_weights, tower_shape
from ovss_ray.models.vision import VisionTower
from tests import tiny_models

CPU = torch.device("cpu")
ADVICE = "this method needs a ConvNeXt CLIP, such as convnext_base_w/laion2b_s13b_b82k"
CONVNEXTS = [name for name in open_clip.list_models() if name.startswith("convnext")]


@pytest.fixture(autouse=True)
def _no_gradients():  # type: ignore[no-untyped-def]
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def model() -> open_clip.CLIP:
    return tiny_models.build_conv()


@pytest.fixture
def tower(model: open_clip.CLIP) -> ConvTower:
    return ConvTower(model.visual, "tiny")


def pixels(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(1))


def test_sizes(tower: ConvTower) -> None:
    assert (tower.patch_size, tower.image_size, tower.depth) == (32, 64, 4)
    assert (tower.width, tower.embed_dim) == (64, 24)
    assert tower.grid_of(70, 39) == (2, 1)


@pytest.mark.parametrize(
    "vision",
    [
        {"timm_proj": "linear"},
        {"timm_proj": "mlp"},
        {"timm_proj": "", "timm_pool": "avg"},
        {"timm_proj": "linear", "timm_pool": "max"},
        {"timm_proj": "linear", "timm_model_name": "convnextv2_atto"},
    ],
)
def test_a_map_of_one_position_is_encode_image(vision: dict[str, str]) -> None:
    model = tiny_models.build_conv(**vision)
    tower = ConvTower(model.visual, "tiny")
    image = pixels(32, 32)
    dense = tower.head(tower.features(image))
    assert dense.shape == (2, 1, 1, 24)
    assert torch.equal(dense[:, 0, 0], model.encode_image(image))


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (70, 39)])
def test_the_pooled_map_is_encode_image_of_any_size(model, tower: ConvTower, size: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    features = tower.features(pixels(*size))
    assert features.shape == (2, 64, *tower.grid_of(*size))
    pooled = tower.head(features.mean((2, 3), keepdim=True))[:, 0, 0]
    torch.testing.assert_close(pooled, model.encode_image(pixels(*size)), atol=1e-5, rtol=1e-4)


def test_every_position_is_normed_and_projected_by_itself(model, tower: ConvTower) -> None:  # type: ignore[no-untyped-def]
    features = tower.features(pixels(64, 96))
    norm, projection = model.visual.trunk.head.norm, model.visual.head.proj.weight
    got = tower.head(features)
    assert got.shape == (2, 2, 3, 24)
    for image, row, column in np.ndindex(2, 2, 3):
        x = features[image, :, row, column]
        x = (x - x.mean()) / (x.var(unbiased=False) + norm.eps).sqrt() * norm.weight + norm.bias
        torch.testing.assert_close(got[image, row, column], projection @ x, atol=1e-5, rtol=1e-4)


def dilated(visual: Any, image: Tensor) -> Tensor:
    """The last feature map at stride 16: the raw weights of the last stage, its convolutions dilated by two."""
    trunk = visual.trunk
    x = torch.from_numpy(np.pad(image.numpy(), ((0, 0), (0, 0), (8, 8), (8, 8)), mode="edge"))
    x = trunk.stages[2](trunk.stages[1](trunk.stages[0](trunk.stem(x))))
    last = trunk.stages[3]
    norm, down = last.downsample
    x = F.conv2d(norm(x), down.weight, down.bias)
    for block in last.blocks:
        y = F.conv2d(x, block.conv_dw.weight, block.conv_dw.bias, padding=6, dilation=2, groups=x.shape[1])
        y = block.mlp(block.norm(y.permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
        x = x + block.gamma[:, None, None] * y
    return x


@pytest.mark.parametrize("size", [(64, 64), (96, 160), (48, 80), (32, 32), (16, 40), (16, 16), (70, 39)])
def test_half_the_stride_is_the_last_stage_dilated(model, tower: ConvTower, size: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    denser = tower.at_stride(16)
    got = denser.features(pixels(*size))
    assert got.shape[-2:] == denser.grid_of(*size)
    torch.testing.assert_close(got, dilated(model.visual, pixels(*size)), atol=1e-5, rtol=1e-4)


def test_another_stride_leaves_tower_and_model_alone(model, tower: ConvTower) -> None:  # type: ignore[no-untyped-def]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plain = tower.features(pixels(64, 64))
    tower.at_stride(16).features(pixels(64, 64))
    assert tower.patch_size == 32
    assert torch.equal(tower.at_stride(32).features(pixels(64, 64)), plain)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    with pytest.raises(SettingError, match="output_stride = 8: this model has 32 or 16"):
        tower.at_stride(8)


@pytest.mark.parametrize("architecture", CONVNEXTS)
def test_the_convnexts_of_open_clip_are_read(architecture: str) -> None:
    config = open_clip.get_model_config(architecture)
    assert parse_clip(f"{architecture}/random", ConvTower).architecture == architecture
    small_text = {**config["text_cfg"], "layers": 1, "vocab_size": 8}
    with torch.device("meta"):
        visual = open_clip.CLIP(**{**config, "text_cfg": small_text}).visual.eval()
        tower = ConvTower(visual, architecture)
        assert tower.head(tower.features(torch.zeros(1, 3, 64, 96))).shape == (1, 2, 3, config["embed_dim"])
    assert tower.shape == tower_shape(architecture, ConvTower)


def test_there_are_convnexts() -> None:
    assert len(CONVNEXTS) >= 10


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        ("demo", "demo cannot be used: its vision tower is no ConvNeXt; "),
        ("ViT-B/16", "ViT-B-16-quickgelu cannot be used: its vision tower is no ConvNeXt; "),
        ("ViT-B-16-quickgelu/openai", "ViT-B-16-quickgelu cannot be used: its vision tower is no ConvNeXt; "),
        ("RN50-quickgelu/openai", "RN50-quickgelu cannot be used: its vision tower is no ConvNeXt; "),
        ("ViT-B-16-SigLIP/webli", "its vision tower is the timm model vit_base_patch16_siglip_224; "),
        ("convnext_base/laion2b", "convnext_base has no weights 'laion2b', only laion400m_s13b_b51k"),
    ],
)
def test_other_architectures_are_refused_before_anything_is_downloaded(
    clip: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from open_clip import pretrained

    monkeypatch.setattr(pretrained, "download_pretrained", lambda *_, **__: pytest.fail("downloads"))
    for door in (lambda: resolve_weights(clip, ConvTower), lambda: load_clip(clip, CPU, torch.float32, ConvTower)):
        with pytest.raises(WeightsError, match="^[^\n]*$") as caught:
            door()
        assert message in str(caught.value)
        assert ADVICE in str(caught.value) or "has no weights" in message
    with pytest.raises(WeightsError, match="timm model convnext_base; dense methods need a CLIP vision transformer"):
        resolve_weights("convnext_base_w/laion2b_s13b_b82k")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (tiny_models.build, "is a VisionTransformer"),
        (lambda: tiny_models.build_conv(timm_model_name="test_efficientnet"), "is a EfficientNet"),
        (lambda: tiny_models.build_conv(timm_pool="rot_attn", timm_proj=""), "pools by attention"),
        (lambda: tiny_models.build_conv(image_size=(64, 96)), "its images are not square"),
        (lambda: nn.Linear(2, 2), "no vision tower 'visual'"),
    ],
)
def test_other_models_are_refused(build: Any, message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        load_clip(build(), CPU, torch.float32, ConvTower)
    with pytest.raises(WeightsError, match="is a TimmModel; dense methods need a CLIP vision transformer"):
        load_clip(tiny_models.build_conv(), CPU, torch.float32, VisionTower)


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny_models.register_conv(tmp_path_factory.mktemp("architectures"))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_weight_file_loads(model, architecture: str, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / name
    if path.suffix == ".pt":
        torch.save({"state_dict": {f"module.{key}": value for key, value in model.state_dict().items()}}, path)
    else:
        save_file(model.state_dict(), path)
    loaded = load_clip(f"{architecture}//{path}", CPU, torch.float32, ConvTower)
    assert loaded.weights == resolve_weights(f"{architecture}//{path}", ConvTower)
    one = pixels(32, 32)
    torch.testing.assert_close(loaded.vision.head(loaded.vision.features(one))[:, 0, 0], model.encode_image(one))
    tokens = open_clip.SimpleTokenizer()(["a cat."])
    torch.testing.assert_close(loaded.text.encode(["cat"], ["a {}."]), model.encode_text(tokens, normalize=True))


def test_weights_of_another_head_are_refused(architecture: str, tmp_path: Path) -> None:
    save_file(tiny_models.build_conv(timm_proj="mlp").state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=f"is not a {architecture}: it lacks 'visual.head.proj.weight'"):
        load_clip(f"{architecture}//{tmp_path}/w.safetensors", CPU, torch.float32, ConvTower)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["test_convnext", "convnextv2_atto"])
def test_low_precision_keeps_norms_in_float32(dtype: torch.dtype, name: str) -> None:
    model = tiny_models.build_conv(timm_model_name=name, timm_proj="mlp")
    exact, low = (load_clip(model, CPU, kind, ConvTower).vision for kind in (torch.float32, dtype))
    assert (exact.dtype, low.dtype) == (torch.float32, dtype)
    kept = {
        key
        for norm, module in low._visual.named_modules()
        if isinstance(module, nn.LayerNorm)
        for key in (f"{norm}.weight", f"{norm}.bias")
    }
    assert len(kept) > 20
    for key, parameter in low._visual.named_parameters():
        assert parameter.dtype == (torch.float32 if key in kept else dtype), key
    for stride in (32, 16):
        a, b = (each.at_stride(stride) for each in (exact, low))
        wanted, got = (each.head(each.features(pixels(64, 96))).float() for each in (a, b))
        assert F.cosine_similarity(wanted, got, dim=-1).min() > 0.995
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
