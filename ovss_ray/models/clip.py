"""Frozen CLIP models of open_clip: one vision tower, one text tower, pixel statistics and an identity."""

from __future__ import annotations

import copy
import logging
from dataclasses import dataclass
from typing import Any, Generic

import open_clip
import torch
from open_clip.model import convert_weights_to_lp
from open_clip.timm_model import TimmModel
from open_clip.transformer import LayerNormFp32
from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from ovss_ray.errors import SettingError, WeightsError
from ovss_ray.models.quiet import silenced
from ovss_ray.models.sources import ClipSource, WeightsInfo, file_digest, parse_clip, weight_file
from ovss_ray.models.text import TextTower, simple_tokenizer, tokenizer_of
from ovss_ray.models.tower import DenseTower
from ovss_ray.models.vision import TowerT, VisionTower
from ovss_ray.models.weights import fitted_weights, load_weights, pixel_statistics, tensor_digest

_log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ClipModel(Generic[TowerT]):
    """A frozen CLIP model, ready for use on one device.

    pixel_mean, pixel_std: of RGB in 0..1. weights: what identifies the model in a fingerprint.
    """

    vision: TowerT
    text: TextTower
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    weights: WeightsInfo


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is the first CUDA device where there is one, else the CPU."""
    if str(device) == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise SettingError(f"device = {str(device)!r}: must be 'auto', 'cpu' or 'cuda'") from None
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise SettingError("device = 'cuda', but this machine has no usable CUDA device; use 'cpu' or 'auto'")
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    """ "auto" is float16 on CUDA and float32 elsewhere."""
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        # A named device need not be here: the driver of a run decides for workers on other machines.
        where = resolve_device(device) if str(device) == "auto" else torch.device(device)
        return torch.float16 if where.type == "cuda" else torch.float32
    if dtype not in DTYPES:
        raise SettingError(f"dtype = {dtype!r}: must be 'auto', {', '.join(map(repr, DTYPES))}")
    return DTYPES[dtype]


def load_clip(
    clip: str | nn.Module,
    device: torch.device,
    dtype: torch.dtype,
    tower: type[TowerT] = VisionTower,  # type: ignore[assignment] # mypy wants a default that fits every TowerT
    *,
    trust_weights: bool = False,
) -> ClipModel[TowerT]:
    """Loads a CLIP model; its vision tower gets `dtype`, LayerNorm and the text tower stay float32.

    Args:
        clip: see `parse_clip`, or an open_clip model, which is used as it is where device, precision and mode fit
            and copied otherwise; it is never changed.
        device: where it goes.
        dtype: precision of the vision tower.
        tower: the kind of vision tower that is needed.
        trust_weights: whether a TorchScript file may run its code; those of OpenAI are known and need no trust.

    Raises:
        WeightsError: unknown architecture or tag, missing or unreadable file, one that could run code, weights of
            another architecture or activation, or another vision tower than is needed.
    """
    if isinstance(clip, nn.Module):
        return _from_instance(clip, device, dtype, tower)
    source = parse_clip(clip, tower)
    path = weight_file(source)
    model = _build(source)
    tower(model.visual, source.name)  # refuses what the configuration does not tell before a large file is read
    if path is None:
        digest = f"random:{source.seed}"
    else:
        load_weights(model, source, path, trusted=trust_weights)
        digest = file_digest(path)
    weights = WeightsInfo(source.name, source.architecture, None if path is None else str(path), digest)
    mean, std = pixel_statistics(source)
    return _wrap(model, device, dtype, tower, tokenizer_of(source.architecture), mean, std, weights)


def check_weights(clip: str, tower: type[DenseTower] = VisionTower, *, trust_weights: bool = False) -> None:
    """Makes sure that `load_clip` will take the weights of a model, in a second and without the memory it needs.

    Raises:
        WeightsError: as `load_clip`.
    """
    source = parse_clip(clip, tower)
    path = weight_file(source)
    if path is None:
        return
    with torch.device("meta"):
        model = _build(source, "meta")
    with silenced():  # whoever loads the file says what is worth saying
        fitted_weights(model, source, path, trusted=trust_weights)


def _build(source: ClipSource, device: str = "cpu") -> Any:
    """The bare model in float32, initialised from the seed (0 where weights will follow)."""
    with silenced(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed or 0)
        try:
            return open_clip.create_model(source.architecture, pretrained=None, pretrained_hf=False, device=device)
        except (ImportError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "pip install" not in str(error):
                raise
            raise WeightsError(f"{source.architecture} needs a package that is not installed: {error}") from None


def _from_instance(
    model: nn.Module, device: torch.device, dtype: torch.dtype, tower: type[TowerT]
) -> ClipModel[TowerT]:
    name = f"the {type(model).__name__} instance"
    if not hasattr(model, "visual"):
        raise WeightsError(f"{name} is not an open_clip model; it has no vision tower 'visual'")
    visual: Any
    visual = model.visual
    given = tower(visual, name)
    mean = tuple(getattr(visual, "image_mean", None) or open_clip.OPENAI_DATASET_MEAN)
    std = tuple(getattr(visual, "image_std", None) or open_clip.OPENAI_DATASET_STD)
    weights = WeightsInfo("instance", "instance", None, tensor_digest(model))
    context = int(getattr(model, "context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH))
    tokenizer = simple_tokenizer(context)
    ready = not model.training and given.dtype == dtype == torch.float32 and given.device == device
    chosen = model if ready else copy.deepcopy(model).float()
    return _wrap(chosen, device, dtype, tower, tokenizer, mean, std, weights, owned=not ready)


def _wrap(
    model: Any,
    device: torch.device,
    dtype: torch.dtype,
    tower: type[TowerT],
    tokenizer: Any,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    weights: WeightsInfo,
    owned: bool = True,
) -> ClipModel[TowerT]:
    if owned:
        model = model.eval().requires_grad_(False)
        if dtype != torch.float32:
            _lower_precision(model.visual, dtype)
        model = model.to(device)
    return ClipModel(
        vision=tower(model.visual, weights.clip),
        text=TextTower(model, tokenizer, weights.clip),
        pixel_mean=mean,
        pixel_std=std,
        weights=weights,
    )


def _lower_precision(visual: nn.Module, dtype: torch.dtype) -> None:
    """Lowers the precision of all weights but those of LayerNorm."""
    _norms_in_float32(visual)
    if not isinstance(visual, TimmModel):
        convert_weights_to_lp(visual, dtype)
        return
    # timm keeps scales as bare parameters, which open_clip's conversion does not know.
    for module in visual.modules():
        if not isinstance(module, nn.LayerNorm):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(dtype)


class _ChannelNormFp32(LayerNormFp32):  # type: ignore[misc] # open_clip has no types
    """LayerNorm over the channels of [B, C, H, W]."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return out


def _norms_in_float32(module: nn.Module) -> None:
    """Replaces every LayerNorm by one that computes in float32 whatever the precision of its input."""
    for name, child in list(module.named_children()):
        if isinstance(child, nn.LayerNorm):
            kind = _ChannelNormFp32 if isinstance(child, LayerNorm2d) else LayerNormFp32
            norm = kind(child.normalized_shape, eps=child.eps, elementwise_affine=child.elementwise_affine)
            norm.load_state_dict(child.state_dict())
            setattr(module, name, norm.requires_grad_(False).eval())
        else:
            _norms_in_float32(child)
