"""MaskCLIP: in the last attention layer every patch keeps its own value.

Zhou, Loy and Dai, "Extract Free Dense Labels from CLIP" (ECCV 2022), chongzhou96/MaskCLIP. The authors' code drops only
the query-key mixing of the last block and keeps its residual and MLP (`variant="official"`); most follow-ups read the
paper as the projected value alone (`variant="reduced"`). Cost: one pass of CLIP, a little less than one.

The authors' released configuration runs OpenAI's weights with plain GELU, another LayerNorm epsilon and ImageNet pixel
statistics, on whole images; their numbers (VOC20 49.5, Context59 21.7, COCO-Stuff 12.5) are far below the ones that
SCLIP's authors measured in their own protocol, which is the one used here, with CLIP's own activation and statistics.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ovss_ray.models.vision import Trunk
from ovss_ray.ops.positional import PositionalPolicy
from ovss_ray.segmenters.base import SegmenterSettings
from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.dense import DenseSettings, cosine_scores
from ovss_ray.segmenters.last_block import LastBlockSegmenter

_REFINEMENT_SCALE = 100.0
_STRUCK_OUT = -100.0


class MaskCLIPSettings(DenseSettings):
    """Settings of MaskCLIP; both refinements are off by default, as in the published numbers."""

    SEARCH: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **DenseSettings.SEARCH,
        "variant": ("official", "reduced"),
        "ks_thresh": (0.0, 0.5, 0.7),
    }

    variant: Literal["official", "reduced"] = Field(
        default="official", description="official keeps the last block's residual and MLP, reduced drops both."
    )
    pd_thresh: float = Field(
        default=0.0, ge=0, le=1, description="Prompt denoising: a class never this probable in a window is struck out."
    )
    ks_thresh: float = Field(
        default=0.0, ge=0, le=1, description="Key smoothing: less confident patches take the mean of similar ones."
    )
    ks_axis: Literal["channels", "tokens"] = Field(
        default="channels", description="Axis that normalises the keys; the authors' code takes tokens by accident."
    )

    def own_positional(self) -> PositionalPolicy:
        return "bicubic" if self.variant == "official" else "dino_offset"


class MaskCLIP(LastBlockSegmenter):
    """Identity attention in the last block."""

    name = "maskclip"
    Settings: ClassVar[type[SegmenterSettings]] = MaskCLIPSettings
    settings: MaskCLIPSettings
    card = MethodCard(
        title="MaskCLIP",
        paper="Extract Free Dense Labels from CLIP",
        venue="ECCV 2022",
        repository="chongzhou96/MaskCLIP",
        idea="Drops the query-key mixing of the last attention layer: each patch keeps its own value.",
        models=("CLIP ViT",),
        published={
            "voc21": 43.4,
            "context60": 23.2,
            "coco_object": 20.6,
            "voc20": 74.9,
            "cityscapes": 24.9,
            "context59": 26.4,
            "ade20k": 11.9,
            "coco_stuff": 16.7,
        },
        published_source="SCLIP paper, as quoted by the survey of training-free methods, table 1",
    )

    @property
    def residual(self) -> bool:
        return self.settings.variant == "official"

    mlp = residual

    def mix(self, q: Tensor, k: Tensor, v: Tensor, trunk: Trunk) -> Tensor:
        del q, k, trunk
        return v

    def patch_scores(self, pixels: Tensor, text: Tensor, query_class: Sequence[int]) -> Tensor:
        trunk = self.tower.trunk(pixels, self.positional)
        _, keys, values = self.tower.qkv(trunk.tokens, -1)
        scores = cosine_scores(self.read_last_block(trunk, values), text)
        if self.settings.pd_thresh:
            scores = denoise_prompts(scores, query_class, self.settings.pd_thresh)
        if self.settings.ks_thresh:
            projected = self.tower.project_heads(keys, -1)[:, 1:]
            scores = smooth_by_keys(scores, projected, self.settings.ks_thresh, self.settings.ks_axis)
        return scores


def denoise_prompts(scores: Tensor, query_class: Sequence[int], threshold: float) -> Tensor:
    """Strikes out, window by window, every class whose probability reaches the threshold at no patch.

    The paper has one query a class; with synonyms a class's probability is the sum of theirs.

    Args:
        scores: [B, Q, h, w] cosines.
        query_class: class id of every query.
        threshold: 0..1.

    Returns:
        [B, Q, h, w]; -100 for the queries of classes that are struck out.
    """
    classes = torch.as_tensor(query_class, device=scores.device)
    probability = (_REFINEMENT_SCALE * scores).softmax(1)
    summed = probability.new_zeros(len(scores), int(classes.max()) + 1, *scores.shape[2:])
    peak = summed.index_add(1, classes, probability).amax((2, 3))
    return scores.masked_fill((peak < threshold)[:, classes, None, None], _STRUCK_OUT)


def smooth_by_keys(scores: Tensor, keys: Tensor, threshold: float, axis: Literal["channels", "tokens"]) -> Tensor:
    """Replaces the probabilities of unsure patches by the sum over all patches, weighted by the likeness of their keys.

    Args:
        scores: [B, Q, h, w] cosines.
        keys: [B, h * w, D], the last block's keys after its output projection.
        threshold: patches whose best probability is below are replaced; with 1 practically all.
        axis: what the keys are normalised along; the paper means channels, its code takes tokens.

    Returns:
        [B, Q, h, w] probabilities (not cosines); replaced ones are not normalised again.
    """
    unit = F.normalize(keys.float(), dim=-1 if axis == "channels" else 1)
    probability = (_REFINEMENT_SCALE * scores).softmax(1).flatten(2)
    smoothed = probability @ (unit @ unit.transpose(1, 2))
    unsure = probability.amax(1, keepdim=True) < threshold
    return torch.where(unsure, smoothed, probability).view(scores.shape)
