"""Reading weight files into a model, with the checks that open_clip leaves to a warning or does not make."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.model import convert_to_custom_text_state_dict
from torch import Tensor, nn

from ovss_ray.errors import WeightsError
from ovss_ray.models.sources import (
    QUICK_GELU_SUFFIX,
    ClipSource,
    architecture_config,
    file_digest,
    has_quick_gelu,
    tag_config,
    tag_has_quick_gelu,
    wrong_activation,
)
from ovss_ray.models.weight_files import read_state

_log = logging.getLogger(__name__)
_PROBLEMS_SHOWN = 3


def load_weights(model: nn.Module, source: ClipSource, path: Path, *, trusted: bool = False) -> None:
    """Loads a weight file into a model built for `source.architecture`, strictly.

    Raises:
        WeightsError: as `fitted_weights`.
    """
    model.load_state_dict(fitted_weights(model, source, path, trusted=trusted), strict=True)


def fitted_weights(model: nn.Module, source: ClipSource, path: Path, *, trusted: bool = False) -> dict[str, Tensor]:
    """The tensors of a weight file under the names of the model, which may be without values (on the device "meta").

    Args:
        trusted: see `read_state`.

    Raises:
        WeightsError: the file cannot be read, could run code, belongs to another architecture, was trained with another
            activation, or holds values that are no numbers.
    """
    state, is_archive = read_state(path, trusted=trusted)
    if source.tag is None:
        _check_activation(source, path, is_archive)
    state = _fit_names(model, state)
    _check_fit(model, state, source, path)
    return state


def _check_activation(source: ClipSource, path: Path, is_openai_archive: bool) -> None:
    """Refuses a file whose activation is not the architecture's: it costs accuracy without any error.

    What a file was trained with is known for OpenAI's own archives, from an `open_clip_config.json` beside the file,
    and for published files that their digest or their folder in the hub's cache gives away.
    """
    built = has_quick_gelu(source.architecture)
    trained = _trained_with_quick_gelu(source, path, is_openai_archive)
    if trained is None:
        _log.warning(
            "%s does not say which activation it was trained with; %s has %s",
            path,
            source.architecture,
            "QuickGELU" if built else "plain GELU",
        )
    elif trained != built:
        raise wrong_activation(source.architecture, str(path), quick=trained)


def pixel_statistics(source: ClipSource | None) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the pixels (0..1, RGB) that the weights were trained on."""
    config: Mapping[str, Any] = {}
    if source is not None and source.tag is not None:
        config = tag_config(source.architecture, source.tag)
    elif source is not None and source.path is not None:
        config = _config_beside(source.path).get("preprocess_cfg", {})
    mean = config.get("mean") or open_clip.OPENAI_DATASET_MEAN
    std = config.get("std") or open_clip.OPENAI_DATASET_STD
    return tuple(float(value) for value in mean), tuple(float(value) for value in std)


def _trained_with_quick_gelu(source: ClipSource, path: Path, is_openai_archive: bool) -> bool | None:
    if is_openai_archive:
        return True
    if source.name == "demo":
        return has_quick_gelu(source.architecture)
    config = _config_beside(path).get("model_cfg", {})
    return bool(config.get("quick_gelu", False)) if config else _known_file(path)


def _config_beside(path: Path) -> dict[str, Any]:
    file = path.with_name("open_clip_config.json")
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} cannot be read: {error}; repair it or remove it") from None
    return config if isinstance(config, dict) else {}


def _known_file(path: Path) -> bool | None:
    """Recognises a published file by its digest (open_clip's URLs carry it) or by its folder in the hub's cache."""
    folders = {part.removeprefix("models--").replace("--", "/") for part in path.parts}
    digest = ""
    for model, tag in open_clip.list_pretrained():
        config = tag_config(model, tag)
        hub = str(config.get("hf_hub", "")).rstrip("/")
        if hub and hub in folders:
            return tag_has_quick_gelu(model, tag)
        fingerprint = _digest_in_url(str(config.get("url", "")))
        if fingerprint:
            digest = digest or file_digest(path)
            if digest.startswith(fingerprint):
                return tag_has_quick_gelu(model, tag)
    return None


def _digest_in_url(url: str) -> str:
    if "openaipublic" in url:
        return url.split("/")[-2]
    if "mlfoundations" in url:
        return Path(url).stem.rsplit("-", 1)[-1]
    return ""


def _fit_names(model: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    state = dict(convert_state_dict(model, state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = dict(convert_to_custom_text_state_dict(state))
    own = model.state_dict()
    for key in ("logit_scale", "logit_bias"):
        if key in state and key in own and state[key].numel() == own[key].numel():
            state[key] = state[key].reshape(own[key].shape)
    state.pop("text.transformer.embeddings.position_ids", None)
    return state


def _check_fit(model: nn.Module, state: Mapping[str, Tensor], source: ClipSource, path: Path) -> None:
    """Strict on purpose: open_clip would resample positions of another image size without a word."""
    own = model.state_dict()
    problems = {
        "": [problem for key in own if key in state and (problem := _problem(key, own[key], state[key]))],
        "it lacks ": [f"'{key}'" for key in own if key not in state],
        "it also has ": [f"'{key}'" for key in sorted(set(state) - set(own))],
    }
    found = "; ".join(what + _first_of(items) for what, items in problems.items() if items)
    if found:
        raise WeightsError(
            f"the weight file {path} is not a {source.architecture}: {found}{_hint(state, source.architecture)}"
        )
    for key, value in state.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise WeightsError(
                f"the weight file {path} is damaged: '{key}' holds values that are no numbers; download it again"
            )


def _first_of(items: Sequence[str]) -> str:
    more = f" and {len(items) - _PROBLEMS_SHOWN:,} more" if len(items) > _PROBLEMS_SHOWN else ""
    return ", ".join(items[:_PROBLEMS_SHOWN]) + more


def _problem(key: str, own: Tensor, given: Tensor) -> str | None:
    if given.shape != own.shape:
        return f"'{key}' is {list(given.shape)} instead of {list(own.shape)}"
    plain = given.layout == torch.strided and not given.is_meta and not given.is_quantized
    if not plain or given.is_floating_point() != own.is_floating_point():
        kind = str(given.dtype if plain else "no plain tensor").removeprefix("torch.")
        return f"'{key}' is {kind} instead of {str(own.dtype).removeprefix('torch.')}"
    return None


def _hint(state: Mapping[str, Tensor], architecture: str) -> str:
    """What else the weights may be."""
    if any(key.startswith(("vision_model.", "text_model.")) for key in state):
        return (
            "; these are weights for the transformers library: take open_clip_model.safetensors or "
            "open_clip_pytorch_model.bin of the same model"
        )
    fits = [name for name in _architectures_of(state, architecture) if name != architecture]
    return f"; it looks like {' or '.join(fits)}" if fits else ""


def _architectures_of(state: Mapping[str, Tensor], architecture: str) -> list[str]:
    """Architectures whose vision tower has the sizes of these weights, with the activation of the one asked for."""
    patches, positions = state.get("visual.conv1.weight"), state.get("visual.positional_embedding")
    projection = state.get("visual.proj")
    if patches is None or positions is None or projection is None or patches.ndim != 4 or projection.ndim != 2:
        return []
    layers = sum(key.startswith("visual.transformer.resblocks.") and key.endswith(".ln_1.weight") for key in state)
    found = []
    for name in open_clip.list_models():
        config = architecture_config(name)
        vision = config["vision_cfg"]
        size, patch = vision.get("image_size", 224), vision.get("patch_size", 16)
        if isinstance(size, int) and isinstance(patch, int) and not config.get("custom_text"):
            sizes = (vision.get("layers", 12), vision.get("width", 768), patch, (size // patch) ** 2 + 1)
            measured = (layers, patches.shape[0], patches.shape[-1], positions.shape[0])
            if sizes == measured and config["embed_dim"] == projection.shape[1]:
                found.append(name)
    same = [name for name in found if name.endswith(QUICK_GELU_SUFFIX) == architecture.endswith(QUICK_GELU_SUFFIX)]
    return (same or found)[:2]


def tensor_digest(model: nn.Module) -> str:
    """SHA-256 over all tensors of a model, by name; identifies a model that was handed over as an object."""
    digest = hashlib.sha256()
    for key, value in sorted(model.state_dict().items()):
        digest.update(f"{key}{tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()
