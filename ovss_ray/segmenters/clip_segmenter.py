"""What every method that runs CLIP shares: loading it, encoding a vocabulary, and bringing images to its tower."""

from __future__ import annotations

import warnings
from typing import Any, Generic, Literal, cast

import numpy as np
import torch
from PIL import Image as PillowImage
from torch import Tensor, nn
from typing_extensions import Self

from ovss_ray.errors import MeaninglessLabelsWarning
from ovss_ray.models.cautions import caution
from ovss_ray.models.clip import ClipModel, load_clip, resolve_device, resolve_dtype
from ovss_ray.models.vision import TowerT
from ovss_ray.ops.labelling import LabelledPixels
from ovss_ray.ops.resize import fitted_size, resize_levels
from ovss_ray.ops.windows import padded_size
from ovss_ray.segmenters.base import Image, Segmenter, SegmenterSettings, check_text
from ovss_ray.segmenters.results import Segmentation, TextEmbeddings
from ovss_ray.vocabulary import Vocabulary

_CPU_STRIP_SCORES = 1 << 21
_CUDA_STRIP_SCORES = 1 << 26
_CPU_WINDOW_BATCH = 16
_CUDA_WINDOW_BATCH = 128
LOW_MEMORY_DIVISOR = 8
"""How much smaller the steps of `low_memory` are."""


class ClipSegmenter(Segmenter, Generic[TowerT]):
    """A method that runs one CLIP model; one that does not read a vision transformer names its kind of tower twice,
    in the brackets and as `Tower`."""

    def __init__(self, clip: ClipModel[TowerT], settings: SegmenterSettings) -> None:
        self.clip = clip
        self.tower = clip.vision
        self.settings = settings.resolve(clip.vision.shape)
        self.device = clip.vision.device
        self.dtype = clip.vision.dtype
        self._mean = 255 * torch.tensor(clip.pixel_mean, device=self.device)[:, None, None]
        self._std = 255 * torch.tensor(clip.pixel_std, device=self.device)[:, None, None]
        self._last_text: tuple[TextEmbeddings, Tensor] | None = None

    @classmethod
    def load(
        cls,
        *,
        clip: str | nn.Module,
        device: str | torch.device,
        dtype: str | torch.dtype,
        trust_weights: bool = False,
        **settings: Any,
    ) -> Self:
        parsed = cls.parse_settings(settings)
        where = resolve_device(device)
        tower = cast("type[TowerT]", cls.Tower)
        precision = resolve_dtype(dtype, where)
        return cls(load_clip(clip, where, precision, tower, trust_weights=trust_weights), parsed)

    @property
    def texts_encoded(self) -> int:
        return self.clip.text.texts_encoded

    @torch.inference_mode()
    def encode_vocabulary(self, vocabulary: Vocabulary) -> TextEmbeddings:
        self.settings.check_vocabulary(vocabulary)
        doubt = caution(self.clip.weights, vocabulary)
        if doubt is not None:
            warnings.warn(doubt, MeaninglessLabelsWarning, stacklevel=3)  # behind the decorator
        self.clip.text.check_lengths(self.settings.with_all_texts(vocabulary))
        embeddings = self.clip.text.encode(vocabulary.queries, vocabulary.templates)
        return TextEmbeddings(
            embeddings=embeddings.cpu().numpy().astype(np.float32),
            query_class=np.array(vocabulary.query_class, dtype=np.int64),
            vocabulary=vocabulary,
        )

    def normalised(self, image: Image, size: tuple[int, int], interpolation: Literal["bilinear", "bicubic"]) -> Tensor:
        """An image as the tower takes it: [3, h, w] float32, resized as OpenCV (bilinear) or Pillow (bicubic) does."""
        if interpolation == "bicubic":
            image = np.asarray(PillowImage.fromarray(image).resize(size[::-1], PillowImage.Resampling.BICUBIC))
        writable = np.require(image, requirements=("C", "W"))  # torch warns about arrays that are read-only
        levels = resize_levels(torch.from_numpy(writable).to(self.device), size)
        return (levels - self._mean) / self._std

    def size_in_patches(self, height: int, width: int, max_long_side: int) -> tuple[int, int]:
        """An image's own size, or what fits below the cap, with both sides rounded up to whole patches."""
        patch = self.tower.patch_size
        longest = max(height, width)
        height, width = fitted_size(height, width, min(height, width), min(max_long_side, longest))
        return padded_size(height, patch, patch), padded_size(width, patch, patch)

    def text_on_device(self, text: TextEmbeddings) -> Tensor:
        """The queries' embeddings [Q, E] float32; raises `SettingError` for those of another model."""
        if self._last_text is None or self._last_text[0] is not text:
            check_text(text, self.tower.embed_dim)
            self._last_text = (text, torch.from_numpy(text.embeddings).to(self.device, torch.float32))
        return self._last_text[1]

    def window_batch(self, asked: int | None, low_memory: bool) -> int:
        """How many windows go through the tower together."""
        batch = asked or (_CUDA_WINDOW_BATCH if self.device.type == "cuda" else _CPU_WINDOW_BATCH)
        return max(1, batch // LOW_MEMORY_DIVISOR) if low_memory else batch

    def strip_scores(self, low_memory: bool) -> int:
        """How many scores at full resolution are held at one time."""
        scores = _CUDA_STRIP_SCORES if self.device.type == "cuda" else _CPU_STRIP_SCORES
        return scores // LOW_MEMORY_DIVISOR if low_memory else scores

    def segmentation(self, pixels: LabelledPixels, vocabulary: Vocabulary) -> Segmentation:
        """Labelled pixels as what `segment` gives."""
        return Segmentation(
            labels=pixels.labels.cpu().numpy().astype(vocabulary.label_dtype),
            confidence=pixels.confidence.cpu().numpy(),
            margin=pixels.margin.cpu().numpy(),
            vocabulary=vocabulary,
        )
