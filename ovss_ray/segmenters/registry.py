"""Finding methods by name. A method is a module of this package; it is imported only when it is used."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ovss_ray.errors import SettingError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ovss_ray.segmenters.base import Segmenter

_SHARED_MODULES = {
    "base", "cards", "clip_segmenter", "dense", "given", "last_block", "parallel_path", "protocols", "registry",
    "results",
}  # fmt: skip

METHODS: tuple[str, ...] = tuple(
    sorted(item.name for item in pkgutil.iter_modules([str(Path(__file__).parent)]) if item.name not in _SHARED_MODULES)
)


def method_names() -> tuple[str, ...]:
    """The names of all methods; imports none of them."""
    return METHODS


def check_method_name(name: str) -> None:
    """Raise `SettingError` for what is neither one of `method_names()` nor looks like "package.module:Class"."""
    if ":" not in name and name not in METHODS:
        raise SettingError(
            f"there is no method '{name}', only {', '.join(METHODS)} and 'module:Class'{nearest(name, METHODS)}"
        )


def get_method(name: str) -> type[Segmenter]:
    """The class of a method, with its `Settings` and its `card`.

    Args:
        name: one of `method_names()`, or "package.module:Class" for a method of one's own.

    Raises:
        SettingError: there is no such method.
    """
    check_method_name(name)
    from ovss_ray.segmenters.base import Segmenter

    if ":" in name:
        return _imported(name)
    module = import_module(f"ovss_ray.segmenters.{name}")
    for value in vars(module).values():
        if isinstance(value, type) and issubclass(value, Segmenter) and vars(value).get("name") == name:
            return value
    raise TypeError(f"{module.__name__} defines no Segmenter whose name is '{name}'")


def _imported(name: str) -> type[Segmenter]:
    from ovss_ray.segmenters.base import Segmenter

    module_name, _, attribute = name.partition(":")
    try:
        method = getattr(import_module(module_name), attribute)
    except ImportError as error:
        raise SettingError(f"method '{name}': {error}; install the module wherever workers run") from error
    except AttributeError:
        raise SettingError(f"method '{name}': the module {module_name} has no {attribute}") from None
    if not (isinstance(method, type) and issubclass(method, Segmenter)):
        raise SettingError(f"method '{name}' is not a Segmenter; see docs/adding_a_method.md")
    return method


def load_segmenter(
    method: str,
    *,
    clip: str | nn.Module = "ViT-B-16-quickgelu/openai",
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    trust_weights: bool = False,
    **settings: Any,
) -> Segmenter:
    """Loads a method with its frozen models, ready to segment.

    Args:
        method: one of `method_names()`, or "package.module:Class".
        clip: "architecture/pretrained-tag", "architecture//path/to/weights", "demo" (the package's own tiny model),
            "architecture/random" (seeded random weights, for timing), "ViT-B/16" and its like for OpenAI's models, or
            an open_clip model instance, which is never changed.
        device: "auto", "cpu", "cuda" or a torch device.
        dtype: "auto" (float16 on CUDA, float32 on a CPU), "float32", "float16" or "bfloat16".
        trust_weights: whether a TorchScript file of weights may be opened, which runs code that is in it; OpenAI's own
            files, told by their SHA-256, need no trust, and other formats run nothing.
        settings: fields of the method's `Settings`.

    Raises:
        SettingError: an unknown method or setting, or a value out of range.
        WeightsError: the weights cannot be found, read or used, or could run code.
    """
    trust = {"trust_weights": True} if trust_weights else {}  # methods of one's own may not know it
    return get_method(method).load(clip=clip, device=device, dtype=dtype, **trust, **settings)
