"""Small random CLIP models for tests: the real classes of open_clip, a fraction of a second to build."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import open_clip
import torch

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 64, "patch_size": 8, "layers": 4, "width": 48, "head_width": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def config(quick_gelu: bool = True, **vision: Any) -> dict[str, Any]:
    """The tiny configuration, with changes to its vision tower."""
    copied: dict[str, Any] = json.loads(json.dumps(CONFIG))
    copied["quick_gelu"] = quick_gelu
    copied["vision_cfg"].update(vision)
    return copied


def build(seed: int = 0, quick_gelu: bool = True, **vision: Any) -> open_clip.CLIP:
    """A random model whose weights are large enough that patches, heads and positions really differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**config(quick_gelu, **vision))
        for name, parameter in model.named_parameters():
            if name.startswith("visual.") and parameter.ndim > 1:
                parameter.data.normal_(std=1.6 / parameter.shape[-1] ** 0.5)
            elif name.startswith("visual.") and ("bias" in name or "ln_" in name):
                parameter.data.add_(0.2 * torch.randn_like(parameter))
            elif "embedding" in name:
                parameter.data.normal_(std=0.3)
    return model.eval()


CONV_CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {
        "image_size": 64,
        "timm_model_name": "test_convnext",
        "timm_pool": "",
        "timm_proj": "linear",
        "timm_drop_path": 0.1,
    },
    "text_cfg": CONFIG["text_cfg"],
}


def build_conv(seed: int = 0, **vision: Any) -> open_clip.CLIP:
    """A random ConvNeXt CLIP of open_clip's kind (stride 32) whose weights are large enough that positions differ."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = open_clip.CLIP(**{**CONV_CONFIG, "vision_cfg": {**CONV_CONFIG["vision_cfg"], **vision}})
        for name, parameter in model.visual.named_parameters():
            if parameter.ndim > 1:
                parameter.data.normal_(std=1.3 / parameter[0].numel() ** 0.5)
            elif name.endswith("gamma"):
                parameter.data.normal_(0.5, 0.2)
            else:
                parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model.eval()


@cache
def register_conv(folder: Path) -> str:
    """Makes the tiny ConvNeXt CLIP known to open_clip; returns its name."""
    (folder / "tiny-convnext.json").write_text(json.dumps(CONV_CONFIG))
    open_clip.add_model_config(folder / "tiny-convnext.json")
    return "tiny-convnext"


@cache
def register(folder: Path) -> tuple[str, str]:
    """Makes two architectures known to open_clip, with plain GELU and with QuickGELU; returns their names."""
    for name, quick_gelu in (("tiny-ViT", False), ("tiny-ViT-quickgelu", True)):
        (folder / f"{name}.json").write_text(json.dumps(config(quick_gelu)))
        open_clip.add_model_config(folder / f"{name}.json")
    return "tiny-ViT", "tiny-ViT-quickgelu"
