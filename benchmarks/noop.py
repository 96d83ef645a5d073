"""A segmenter that does nothing, so that what is left of a run is the engine: `--method noop:NoOp`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from typing_extensions import Self

from ovss_ray.segmenters.base import Image, Segmenter, SegmenterSettings
from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.results import Segmentation, TextEmbeddings
from ovss_ray.vocabulary import Vocabulary


class NoOp(Segmenter):
    """Finds the first class everywhere, without looking."""

    name = "noop"
    card = MethodCard(title="No operation", paper="none", venue="none", repository="none", idea="Measures the rest.",
                      models=())  # fmt: skip
    Settings = SegmenterSettings

    @classmethod
    def load(
        cls, *, clip: str | nn.Module, device: str | torch.device, dtype: str | torch.dtype, **settings: Any
    ) -> Self:
        del clip, dtype
        segmenter = cls()
        segmenter.settings = cls.parse_settings(settings)
        segmenter.device, segmenter.dtype = torch.device("cpu" if device == "auto" else device), torch.float32
        return segmenter

    def encode_vocabulary(self, vocabulary: Vocabulary) -> TextEmbeddings:
        queries = [item.id for item in vocabulary.classes for _ in item.queries]
        return TextEmbeddings(np.eye(len(queries), dtype=np.float32), np.array(queries, np.int64), vocabulary)

    def segment_batch(self, images: Sequence[Image], text: TextEmbeddings, *, low_memory: bool) -> list[Segmentation]:
        del low_memory
        return [_first_class(image.shape[:2], text.vocabulary) for image in images]


def _first_class(shape: tuple[int, ...], vocabulary: Vocabulary) -> Segmentation:
    return Segmentation(np.zeros(shape, np.uint8), np.ones(shape, np.float32), np.ones(shape, np.float32), vocabulary)
