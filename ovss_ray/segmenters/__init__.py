"""The published training-free open-vocabulary segmentation methods: one method, one file."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ovss_ray.segmenters.protocols import Protocol, load_protocol, protocol_names
from ovss_ray.segmenters.registry import METHODS, get_method, load_segmenter, method_names

if TYPE_CHECKING:
    from ovss_ray.models.clip import resolve_dtype
    from ovss_ray.models.sources import WeightsInfo, resolve_weights
    from ovss_ray.segmenters.base import Segmenter
    from ovss_ray.segmenters.cards import MethodCard
    from ovss_ray.segmenters.dense import DenseSegmenter, DenseSettings
    from ovss_ray.segmenters.results import Segmentation, TextEmbeddings

__all__ = [
    "METHODS",
    "DenseSegmenter",
    "DenseSettings",
    "MethodCard",
    "Protocol",
    "Segmentation",
    "Segmenter",
    "TextEmbeddings",
    "WeightsInfo",
    "get_method",
    "load_protocol",
    "load_segmenter",
    "method_names",
    "protocol_names",
    "resolve_dtype",
    "resolve_weights",
]

_HOMES = {
    "DenseSegmenter": "ovss_ray.segmenters.dense",
    "DenseSettings": "ovss_ray.segmenters.dense",
    "MethodCard": "ovss_ray.segmenters.cards",
    "Segmentation": "ovss_ray.segmenters.results",
    "Segmenter": "ovss_ray.segmenters.base",
    "TextEmbeddings": "ovss_ray.segmenters.results",
    "WeightsInfo": "ovss_ray.models.sources",
    "resolve_dtype": "ovss_ray.models.clip",
    "resolve_weights": "ovss_ray.models.sources",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ovss_ray.segmenters' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
