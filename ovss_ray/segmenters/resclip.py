"""ResCLIP: the last block's attention corrected by what middle blocks attend to, and by a first segmentation.

Yang et al., "ResCLIP: Residual Attention for Training-free Dense Vision-language Inference" (CVPR 2025),
yvhangyang/ResCLIP. It comes on top of another method, NACLIP in the published numbers:

* RCS (residual cross-correlation self-attention) blends the query-key attention of blocks 6 to 9 (counted from 1) into
  the attention of the last block.
* SFR (semantic feedback refinement) labels each window with that, refined by PAMR, and then lets patches of one label
  attend more to each other; see `ops.semantic_feedback`.

Cost: one pass of CLIP whose last block runs twice, and PAMR over all queries in every window, which is what takes time
with a large vocabulary. Published with whole images (`crop=0`) on VOC, and with `temp_thd`, `tau_r`, `l_r`, `tau_s` and
`l_s` of each data set; the defaults here are those of the authors' demo, for any vocabulary.

As in the authors' code, pixels that are unsure in the first pass get the first query, whether or not it is the
background: it only shapes the feedback, which is rounded to float16. Other than there, both stages can be switched off.
The authors give no middle blocks for ViT-L/14; their code takes the same ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ovss_ray.errors import SettingError
from ovss_ray.models.vision import TowerShape, Trunk
from ovss_ray.ops.attention import attend, gaussian_prior
from ovss_ray.ops.pamr import pamr
from ovss_ray.ops.semantic_feedback import majority_labels, semantic_feedback
from ovss_ray.segmenters.base import SegmenterSettings
from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.dense import DenseSettings, cosine_scores
from ovss_ray.segmenters.last_block import LastBlockSegmenter

_MIDDLE_BLOCKS = (5, 6, 7, 8)
_FEEDBACK_ELEMENTS = 1 << 25


class ResCLIPSettings(DenseSettings):
    """Settings of ResCLIP."""

    base: Literal["naclip", "sclip", "clearclip"] = Field(
        default="naclip", description="The method whose last block is corrected: its attention, residual and MLP."
    )
    rcs: bool = Field(default=True, description="Blend in the attention of middle blocks.")
    sfr: bool = Field(default=True, description="Refine by the feedback of a first segmentation.")
    tau_r: float = Field(default=2.0, gt=0, description="Temperature of RCS: factor on the blended attention.")
    l_r: float = Field(default=0.6, ge=0, le=1, description="Weight of the middle blocks in RCS.")
    tau_s: float = Field(default=2.1, gt=0, description="Temperature of SFR: factor on the refined logits.")
    l_s: float = Field(default=0.6, ge=0, le=1, description="Weight of the feedback in SFR.")
    middle_blocks: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="Blocks that RCS looks at, from 0; 5 to 8 of 12 or more blocks."
    )
    sigma: float = Field(default=5.0, gt=0, description="Width of NACLIP's bump and of SFR's blur, in patches.")
    temp_thd: float = Field(
        default=0.1, ge=0, le=1, description="In the first pass, pixels less probable than this get the first query."
    )
    delete_same_entity: bool = Field(
        default=True, description="SFR decays between patches of one label whose straight path leaves it."
    )
    full_path: bool = Field(
        default=False, description="SFR tests the whole path as the paper says, not its first part as the code does."
    )

    def resolve(self, shape: TowerShape) -> Self:
        """Fills in the middle blocks, too; `SettingError` if one is not before the last block."""
        last = shape.depth - 1
        like = (block for block in shape.blocks_like(_MIDDLE_BLOCKS) if block < last)
        blocks = tuple(sorted(set(self.middle_blocks or like)))
        if self.rcs and not (blocks and blocks[0] >= 0 and blocks[-1] < last):
            raise SettingError(
                f"middle_blocks = {list(blocks)}: RCS needs blocks before the last one of {shape.depth}, counted from 0"
            )
        return super().resolve(shape).model_copy(update={"middle_blocks": blocks})


class ResCLIP(LastBlockSegmenter):
    """Self-attention that is corrected by middle blocks and by the labels of a first pass."""

    name = "resclip"
    Settings: ClassVar[type[SegmenterSettings]] = ResCLIPSettings
    settings: ResCLIPSettings
    card = MethodCard(
        title="ResCLIP",
        paper="ResCLIP: Residual Attention for Training-free Dense Vision-language Inference",
        venue="CVPR 2025",
        repository="yvhangyang/ResCLIP",
        idea="Corrects NACLIP's last block by the attention of middle blocks and by a first segmentation.",
        models=("CLIP ViT",),
        passes_note="the last block twice; PAMR over all queries in every window",
        published={
            "voc21": 61.1,
            "context60": 33.5,
            "coco_object": 35.0,
            "voc20": 86.0,
            "cityscapes": 35.9,
            "context59": 36.8,
            "ade20k": 18.0,
            "coco_stuff": 24.7,
        },
        published_source="the paper, on NACLIP, as quoted by the survey of training-free methods, table 1",
    )

    @property
    def residual(self) -> bool:
        return self.settings.base == "sclip"

    mlp = residual

    @property
    def recorded_blocks(self) -> Collection[int]:
        return self.settings.middle_blocks or () if self.settings.rcs else ()

    def mix(self, q: Tensor, k: Tensor, v: Tensor, trunk: Trunk) -> Tensor:
        """The first pass: RCS alone, because SFR needs the text."""
        return self.blend(self.self_attention(q, k, v, trunk.grid), self.middle_attention(v, trunk))

    def patch_scores(self, pixels: Tensor, text: Tensor, query_class: Sequence[int]) -> Tensor:
        """Both passes; they share everything before the last block, and the attention of the middle blocks."""
        del query_class
        trunk = self.tower.trunk(pixels, self.positional, queries_keys=self.recorded_blocks)
        q, k, v = self.tower.qkv(trunk.tokens, -1)
        middle = self.middle_attention(v, trunk)
        first = self.blend(self.self_attention(q, k, v, trunk.grid), middle)
        scores = cosine_scores(self.read_last_block(trunk, first), text)
        if not self.settings.sfr:
            return scores
        refined = self.refined_attention(q, k, v, self.patch_labels(pixels, scores))
        return cosine_scores(self.read_last_block(trunk, self.blend(refined, middle)), text)

    def self_attention(
        self, q: Tensor, k: Tensor, v: Tensor, grid: tuple[int, int], *, scale: float = 1.0, bias: Tensor | None = None
    ) -> Tensor:
        """The attention of the base method, its logits scaled and biased by SFR: [B, H, N, d]."""
        terms = {"naclip": (k,), "sclip": (q, k), "clearclip": (q,)}[self.settings.base]
        if self.settings.base == "naclip":
            bump = gaussian_prior(grid, self.settings.sigma, k.device)
            bias = bump if bias is None else bias + bump
        scale /= math.sqrt(q.shape[-1])
        return torch.stack([attend(term, term, v, bias=bias, scale=scale) for term in terms]).sum(0)

    def middle_attention(self, v: Tensor, trunk: Trunk) -> Tensor | None:
        """The last block's values, mixed by the mean attention of the middle blocks: [B, H, N, d]."""
        if not self.settings.rcs:
            return None
        return torch.stack([attend(q, k, v) for q, k in trunk.queries_keys.values()]).mean(0)

    def blend(self, mixed: Tensor, middle: Tensor | None) -> Tensor:
        """RCS; the weights of the blend sum to `tau_r`, not to 1."""
        if middle is None:
            return mixed
        return self.settings.tau_r * torch.lerp(mixed, middle, self.settings.l_r)

    def patch_labels(self, pixels: Tensor, scores: Tensor) -> Tensor:
        """The queries that patches get in the first pass, window by window: cosines [B, Q, h, w] to [B, h, w]."""
        labels = []
        for window, cosines in zip(pixels.float(), scores, strict=True):
            maps = F.interpolate(cosines[None], window.shape[-2:], mode="bilinear", align_corners=False)[0]
            refined = pamr(window, maps, iterations=10, dilations=(8, 16))
            probability, query = (self.settings.logit_scale * refined).softmax(0).max(0)
            query = query.masked_fill(probability < self.settings.temp_thd, 0)
            labels.append(majority_labels(query, self.tower.patch_size))
        return torch.stack(labels)

    def refined_attention(self, q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        """SFR: the base method's attention under the feedback of patch labels [B, h, w], a few windows at a time."""
        group = max(1, _FEEDBACK_ELEMENTS // q.shape[2] ** 2)
        groups = zip(*(torch.split(part, group) for part in (q, k, v, labels)), strict=True)
        return torch.cat([self._refined(*members) for members in groups])

    def _refined(self, q: Tensor, k: Tensor, v: Tensor, labels: Tensor) -> Tensor:
        settings = self.settings
        feedback = semantic_feedback(
            labels, sigma=settings.sigma, decay_by_path=settings.delete_same_entity, full_path=settings.full_path
        )
        feedback /= feedback.amax((1, 2), keepdim=True)
        feedback = feedback.half().float() * (settings.tau_s * settings.l_s)  # rounded as in the authors' code
        bias = F.pad(feedback, (1, 0, 1, 0))[:, None]
        grid = (labels.shape[1], labels.shape[2])
        return self.self_attention(q, k, v, grid, scale=settings.tau_s * (1 - settings.l_s), bias=bias)
