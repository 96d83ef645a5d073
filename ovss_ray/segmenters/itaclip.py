"""ITACLIP: image, text and architecture enhancements of SCLIP.

Aydın et al., "ITACLIP: Boosting Training-Free Semantic Segmentation with Image, Text, and Architectural Enhancements"
(CVPR Workshops 2025), m-arda-aydn/ITACLIP.

Architecture: half of the last block's weights are its own softmax(q q^T) + softmax(k k^T), half the mean of those of
three middle blocks; the residual stays, the MLP goes. Image: features are averaged over five views of each window.
Text: a definition or synonym of each class, by a language model, is mixed into the embeddings of its queries. Last, the
label map is closed morphologically. Cost: five passes of CLIP, one for each view.

The authors' texts do not come with this package: without `aux_texts` the method runs without its text enhancement. The
published numbers are with texts and with a window every 28 pixels (`stride=28`), which makes many times more windows
than the default, every 112; the repository turns PAMR on (`pamr=10`), the numbers below are without.

Deviations, none of which touches a published setting: the middle blocks, fixed in the authors' code, are scaled in
towers of fewer than 12 blocks; maps of flipped views are turned back before they are upsampled, which is the same;
where windows are padded, views are of the padded window; unlabelled pixels count as below every id in the closing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, field_validator
from torch import Tensor

from ovss_ray.errors import SettingError, nearest
from ovss_ray.models.vision import Trunk
from ovss_ray.ops.attention import correlative_attention
from ovss_ray.ops.morphology import close_labels
from ovss_ray.ops.views import FLIPPED_AXIS, View, take_view, undo_view
from ovss_ray.segmenters.base import SegmenterSettings
from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.dense import DenseSettings
from ovss_ray.segmenters.last_block import LastBlockSegmenter
from ovss_ray.segmenters.results import TextEmbeddings
from ovss_ray.vocabularies.texts import load_class_texts
from ovss_ray.vocabulary import Vocabulary

_MIDDLE_BLOCKS = (6, 7, 9)


class ITACLIPSettings(DenseSettings):
    """Settings of ITACLIP; the authors' code calls `alpha` def_coefficient, and the paper calls `img_eng` lambda."""

    views: tuple[View, ...] = Field(
        default=("original", "grayscale", "blur", "vertical_flip", "horizontal_flip"),
        min_length=1,
        description="Views of every window whose features are averaged; each costs one pass.",
    )
    img_eng: float = Field(
        default=0.75,
        ge=0,
        le=1,
        description="Share of original, grayscale and blur in the average; flips have the rest.",
    )
    aux_texts: dict[str, str] | None = Field(
        default=None,
        description="A definition or a synonym for each class: a mapping name: text, or a .yaml or .json file of it.",
    )
    alpha: float = Field(
        default=0.2, ge=0, le=1, description="Share of aux_texts in the text embeddings; the background has none."
    )
    closing: bool = Field(
        default=True, description="3 x 3 closing of the label map; it favours classes with larger ids."
    )

    @field_validator("views")
    @classmethod
    def _each_view_once(cls, value: tuple[View, ...]) -> tuple[View, ...]:
        if len(set(value)) < len(value):
            raise ValueError("must name each view once")
        return value

    @field_validator("aux_texts", mode="before")
    @classmethod
    def _read_aux_texts(cls, value: Any) -> dict[str, str] | None:
        # Read here, so that a run's fingerprint holds the texts, and workers need no file.
        return None if value is None else load_class_texts(value)

    def view_weights(self) -> dict[View, float]:
        """The weight of each view that has one; they sum to 1."""
        flips = [view for view in self.views if view in FLIPPED_AXIS]
        others = [view for view in self.views if view not in FLIPPED_AXIS]
        share = self.img_eng if flips and others else float(bool(others))
        weights = {view: share / len(others) for view in others} | {view: (1 - share) / len(flips) for view in flips}
        return {view: weight for view, weight in weights.items() if weight > 0}

    def aux_texts_of(self, vocabulary: Vocabulary) -> dict[int, str]:
        """The auxiliary text of every class but the background, by class id."""
        texts = self.aux_texts or {}
        described = (item for item in vocabulary.classes if item.id != vocabulary.background)
        return {item.id: texts[item.name] for item in described if item.name in texts}

    def with_all_texts(self, vocabulary: Vocabulary) -> Vocabulary:
        texts = self.aux_texts_of(vocabulary)
        classes = [
            replace(item, queries=(*item.queries, texts[item.id])) if item.id in texts else item
            for item in vocabulary.classes
        ]
        return replace(vocabulary, classes=tuple(classes))

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        super().check_vocabulary(vocabulary)
        if self.aux_texts is None:
            return
        described = (item for item in vocabulary.classes if item.id != vocabulary.background)
        missing = [item.name for item in described if item.name not in self.aux_texts]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise SettingError(
                f"aux_texts has no text for '{missing[0]}'{more} of the vocabulary '{vocabulary.name}'; add one for "
                f"every class but the background, or leave aux_texts out{nearest(missing[0], self.aux_texts)}"
            )


class ITACLIP(LastBlockSegmenter):
    """SCLIP's attention shared with middle blocks, on five views of every window, with described classes."""

    name = "itaclip"
    Settings: ClassVar[type[SegmenterSettings]] = ITACLIPSettings
    settings: ITACLIPSettings
    card = MethodCard(
        title="ITACLIP",
        paper="ITACLIP: Boosting Training-Free Semantic Segmentation with Image, Text, and Architectural Enhancements",
        venue="CVPR Workshops 2025",
        repository="m-arda-aydn/ITACLIP",
        idea="Blends SCLIP's attention with that of middle blocks, averages five views, and describes the classes.",
        models=("CLIP ViT",),
        passes=5,
        published={
            "voc21": 65.6,
            "context60": 36.0,
            "coco_object": 36.4,
            "cityscapes": 39.2,
            "coco_stuff": 26.3,
        },
        published_source="the paper without PAMR, as quoted by the survey of training-free methods, table 1",
    )
    residual = True

    @property
    def recorded_blocks(self) -> Collection[int]:
        shape = self.tower.shape
        return {min(block, shape.depth - 2) for block in shape.blocks_like(_MIDDLE_BLOCKS)}

    def mix(self, q: Tensor, k: Tensor, v: Tensor, trunk: Trunk) -> Tensor:
        middle = [correlative_attention(*pair, v) for pair in trunk.queries_keys.values()]
        return 0.5 * correlative_attention(q, k, v) + 0.5 * torch.stack(middle).mean(0)

    def patch_scores(self, pixels: Tensor, text: Tensor, query_class: Sequence[int]) -> Tensor:
        del query_class
        # The mean of unit vectors is not normalised again; scores are linear in it, so one product does for all views.
        features = pixels.new_zeros(())
        for view, weight in self.settings.view_weights().items():
            features = features + weight * self._unit_features(pixels, view)
        return torch.einsum("behw,qe->bqhw", features, text)

    def _unit_features(self, pixels: Tensor, view: View) -> Tensor:
        """Patch features [B, E, h, w] of a view, float32, of length 1, laid out as in the image."""
        embeddings = self.patch_embeddings(take_view(pixels, view)).float()
        return undo_view(F.normalize(embeddings, dim=-1).movedim(-1, 1), view)

    @torch.inference_mode()
    def encode_vocabulary(self, vocabulary: Vocabulary) -> TextEmbeddings:
        """As for other methods; with `aux_texts` the rows are mixtures of two unit vectors, not normalised again."""
        text = super().encode_vocabulary(vocabulary)
        aux_texts = self.settings.aux_texts_of(vocabulary)
        if not aux_texts:
            return text
        described = list(aux_texts)
        aux = np.zeros((vocabulary.num_classes, text.embeddings.shape[1]), np.float32)
        aux[described] = self.clip.text.encode(list(aux_texts.values()), vocabulary.templates).cpu().numpy()
        share = np.zeros((vocabulary.num_classes, 1), np.float32)
        share[described] = self.settings.alpha
        rows = text.query_class
        return replace(text, embeddings=(1 - share[rows]) * text.embeddings + share[rows] * aux[rows])

    def finish_labels(self, labels: Tensor, vocabulary: Vocabulary) -> Tensor:
        return close_labels(labels, vocabulary.ignore_index) if self.settings.closing else labels
