"""Loading weight files: formats, identity, and every mismatch that must not pass silently."""

from __future__ import annotations

import importlib.util
import json
import logging
from pathlib import Path

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ovss_ray.errors import SettingError, WeightsError
from ovss_ray.models.clip import load_clip, resolve_device, resolve_dtype
from ovss_ray.models.sources import resolve_weights
from ovss_ray.models.text import check_query_lengths
from ovss_ray.segmenters import load_segmenter
from ovss_ray.vocabulary import load_vocabulary
from tests import tiny_models
from tests.weight_archives import save_archive

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path, tiny_architectures: tuple[str, str]) -> Path:
    del tiny_architectures
    return tmp_path


def save(path: Path, model: nn.Module) -> Path:
    state = model.state_dict()
    if path.suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save(state, path)
    return path


def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def class_embedding(clip: str, *, trust_weights: bool = False) -> torch.Tensor:
    """What the loaded tower says of two images: the class token of a full pass."""
    tower = load_clip(clip, CPU, torch.float32, trust_weights=trust_weights).vision
    return tower.head(tower.trunk(pixels(), "dino_offset", until=tower.depth).tokens)[:, 0]


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.bin"])
def test_a_file_loads_in_every_format(folder: Path, name: str) -> None:
    model = tiny_models.build(quick_gelu=False)
    path = save(folder / name, model)
    got = class_embedding(f"tiny-ViT//{path}")
    torch.testing.assert_close(got, model.encode_image(pixels()), atol=1e-5, rtol=1e-4)


def test_a_training_checkpoint_with_prefixed_names_loads(folder: Path) -> None:
    model = tiny_models.build(quick_gelu=False)
    path = folder / "epoch_1.pt"
    torch.save({"epoch": 1, "state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, path)
    torch.testing.assert_close(class_embedding(f"tiny-ViT//{path}"), model.encode_image(pixels()), atol=1e-5, rtol=1e-4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_openai_archive_loads_with_quickgelu_only(folder: Path) -> None:
    model = tiny_models.build(quick_gelu=True)
    path = save_archive(folder / "ViT.pt", model)
    got = class_embedding(f"tiny-ViT-quickgelu//{path}", trust_weights=True)
    torch.testing.assert_close(got, model.encode_image(pixels()), atol=1e-5, rtol=1e-4)
    with pytest.raises(
        WeightsError,
        match="were trained with QuickGELU, but tiny-ViT has plain GELU; use the architecture 'tiny-ViT-quickgelu'",
    ):
        load_clip(f"tiny-ViT//{path}", CPU, torch.float32, trust_weights=True)


@pytest.mark.parametrize("quick_gelu", [True, False])
def test_a_config_beside_the_file_decides_the_activation(folder: Path, quick_gelu: bool) -> None:
    path = save(folder / "open_clip_model.safetensors", tiny_models.build())
    described = {"model_cfg": tiny_models.config(quick_gelu), "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(described))
    right, wrong = ("tiny-ViT-quickgelu", "tiny-ViT") if quick_gelu else ("tiny-ViT", "tiny-ViT-quickgelu")
    loaded = load_clip(f"{right}//{path}", CPU, torch.float32)
    assert (loaded.pixel_mean, loaded.pixel_std) == ((0.5,) * 3, (0.25,) * 3)
    with pytest.raises(WeightsError, match=f"use the architecture '{right}'"):
        load_clip(f"{wrong}//{path}", CPU, torch.float32)


def test_a_folder_of_the_hubs_cache_gives_the_activation_away(folder: Path) -> None:
    place = folder / "models--timm--vit_base_patch16_clip_224.openai" / "snapshots" / "0"
    place.mkdir(parents=True)
    path = save(place / "open_clip_model.safetensors", tiny_models.build())
    with pytest.raises(WeightsError, match="were trained with QuickGELU"):
        load_clip(f"tiny-ViT//{path}", CPU, torch.float32)
    load_clip(f"tiny-ViT-quickgelu//{path}", CPU, torch.float32)


def test_a_file_that_says_nothing_is_loaded_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(folder / "w.safetensors", tiny_models.build())
    with caplog.at_level(logging.WARNING):
        load_clip(f"tiny-ViT-quickgelu//{path}", CPU, torch.float32)
    assert "does not say which activation it was trained with; tiny-ViT-quickgelu has QuickGELU" in caplog.text


def test_the_digest_of_a_loaded_model_is_that_of_its_file(folder: Path) -> None:
    path = save(folder / "w.safetensors", tiny_models.build())
    clip = f"tiny-ViT-quickgelu//{path}"
    assert load_clip(clip, CPU, torch.float32).weights == resolve_weights(clip)


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"image_size": 96}, r"'visual.positional_embedding' is \[145, 48\] instead of \[65, 48\]"),
        ({"layers": 3}, "it lacks 'visual.transformer.resblocks.3"),
        ({"layers": 5}, "it also has 'visual.transformer.resblocks.4"),
        ({"width": 64}, "is not a tiny-ViT"),
    ],
)
def test_weights_of_another_architecture(folder: Path, vision: dict[str, int], message: str) -> None:
    path = save(folder / "w.safetensors", tiny_models.build(**vision))
    with pytest.raises(WeightsError, match=message):
        load_clip(f"tiny-ViT//{path}", CPU, torch.float32)


def test_the_architecture_that_fits_is_named(folder: Path) -> None:
    """Only the tensors that say the sizes are needed, so ViT-B/32 can be a few bytes here."""
    path = folder / "w.safetensors"
    state = {f"visual.transformer.resblocks.{i}.ln_1.weight": torch.ones(1) for i in range(12)}
    state["visual.conv1.weight"] = torch.zeros(1).expand(768, 3, 32, 32)
    state["visual.positional_embedding"] = torch.zeros(1).expand(50, 768)
    state["visual.proj"] = torch.zeros(1).expand(768, 512)
    torch.save(state, path.with_suffix(".pt"))
    with pytest.raises(WeightsError, match="it looks like ViT-B-32-quickgelu"):
        load_clip(f"tiny-ViT-quickgelu//{path.with_suffix('.pt')}", CPU, torch.float32)


@pytest.mark.parametrize(("name", "content"), [("w.safetensors", b"nothing"), ("w.pt", b"nothing"), ("w.pt", b"")])
def test_a_file_that_holds_no_weights(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(WeightsError, match=f"{name}.*"):
        load_clip(f"tiny-ViT//{folder / name}", CPU, torch.float32)


def test_a_pickle_with_code_in_it_is_not_opened(folder: Path) -> None:
    torch.save({"weights": Path("/tmp")}, folder / "w.pt")
    with pytest.raises(WeightsError, match=r"holds more than tensors \(.*Path.*\) and is not opened for safety"):
        load_clip(f"tiny-ViT//{folder / 'w.pt'}", CPU, torch.float32)


def test_random_weights_repeat_with_their_seed_and_leave_the_generator_alone(
    tiny_architectures: tuple[str, str],
) -> None:
    name, _ = tiny_architectures
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = class_embedding(f"{name}/random:1")
    assert torch.equal(torch.rand(1), expected)
    assert torch.equal(first, class_embedding(f"{name}/random:1"))
    assert not torch.equal(first, class_embedding(f"{name}/random:2"))


def with_another_block(model: open_clip.CLIP) -> open_clip.CLIP:
    model.visual.transformer.resblocks[1] = open_clip.transformer.CustomResidualAttentionBlock(48, 3)
    return model


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: tiny_models.build(attentional_pool=True), "pools by attention"),
        (lambda: tiny_models.build(pool_type="avg"), "does not read the image off a class token"),
        (lambda: with_another_block(tiny_models.build()), "its blocks are not the standard ones"),
        (lambda: tiny_models.build(layers=(1, 1, 1, 1), width=16, head_width=8), "is a ModifiedResNet"),
        (lambda: nn.Linear(2, 2), "no vision tower 'visual'"),
    ],
)
def test_towers_without_patch_tokens_are_refused(model, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(WeightsError, match=message):
        load_clip(model(), CPU, torch.float32)


def test_an_instance_is_used_as_it_is_where_it_fits_and_copied_where_not() -> None:
    model = tiny_models.build()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    kept = load_clip(model, CPU, torch.float32).vision
    assert kept._visual is model.visual
    model.train()
    for dtype in (torch.float32, torch.bfloat16):
        assert load_clip(model, CPU, dtype).vision._visual is not model.visual
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_instances_are_identified_by_their_tensors() -> None:
    digests = {load_clip(tiny_models.build(seed), CPU, torch.float32).weights.digest for seed in (0, 0, 1)}
    assert len(digests) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_keeps_layer_norm_and_text_in_float32(dtype: torch.dtype) -> None:
    loaded = load_clip(tiny_models.build(), CPU, dtype)
    visual = loaded.vision._visual
    assert visual.conv1.weight.dtype == visual.transformer.resblocks[0].mlp.c_fc.weight.dtype == dtype
    norms = [module for module in visual.modules() if isinstance(module, nn.LayerNorm)]
    assert len(norms) == 10
    assert all(isinstance(norm, open_clip.transformer.LayerNormFp32) for norm in norms)
    assert all(norm.weight.dtype == torch.float32 for norm in norms)
    exact = load_clip(tiny_models.build(), CPU, torch.float32).text.encode(["cat"], ["a {}."])
    assert torch.equal(loaded.text.encode(["cat"], ["a {}."]), exact)


def test_devices_and_precisions() -> None:
    assert resolve_dtype("auto", "cpu") == torch.float32
    assert resolve_dtype("bfloat16", "cpu") == resolve_dtype(torch.bfloat16, "cpu") == torch.bfloat16
    with pytest.raises(SettingError, match="dtype = 'float8': must be 'auto', 'float32'"):
        resolve_dtype("float8", "cpu")
    with pytest.raises(SettingError, match="device = 'gpu': must be 'auto', 'cpu' or 'cuda'"):
        resolve_device("gpu")
    if not torch.cuda.is_available():
        assert resolve_device("auto") == torch.device("cpu")
        with pytest.raises(SettingError, match="no usable CUDA device"):
            resolve_device("cuda")


def test_the_precision_of_a_gpu_elsewhere_can_be_told_without_one() -> None:
    assert resolve_dtype("auto", "cuda") == torch.float16
    assert resolve_dtype("auto", "cpu") == torch.float32


@pytest.mark.skipif(importlib.util.find_spec("transformers") is not None, reason="the package is there")
def test_a_model_that_needs_another_package_says_which() -> None:
    with pytest.raises(WeightsError, match="^roberta-ViT-B-32 needs a package that is not installed: .*transformers"):
        load_segmenter("maskclip", clip="roberta-ViT-B-32/random")
    with pytest.raises(WeightsError, match="transformers"):
        check_query_lengths(load_vocabulary("cat"), "roberta-ViT-B-32")
