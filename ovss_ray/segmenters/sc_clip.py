"""SC-CLIP: anomalous tokens repaired, and middle features that steer smoothing and attention.

Bai et al., "Self-Calibrated CLIP for Training-Free Open-Vocabulary Segmentation" (IEEE TIP 2025), SuleBai/SC-CLIP. Some
tokens that enter the last block are outliers that draw attention from all others: they are replaced by the mean of
their neighbours. Features of a middle block, which still tell what belongs together, then smooth what enters the last
block and share its attention with key-key similarity; those of an early block smooth its output. A second pass through
the same attention adds the sum of several blocks. The last block sees patches only; its residual and MLP go, but part
of the class token that enters it is added to every patch.

Cost: one pass of CLIP, whose last attention runs twice, and some n x n matrices for the n patches of a window.

Deviations from the released code: it takes one window at a time, this any number, each by itself. It finds the row of a
patch with the number of rows instead of columns, which is right on square grids only; here it is right on all. Windows
with no more patches than `neighbours` stop it, and so do identical tokens; here they have no anomalies. One state of
the code takes the ten patches of largest norm instead of outliers; its authors found both to score the same.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ovss_ray.errors import SettingError
from ovss_ray.models.vision import TowerShape
from ovss_ray.ops.attention import attend, merge_heads, split_heads
from ovss_ray.ops.tokens import aggregate, cosine_similarities, find_anomalies, repair
from ovss_ray.segmenters.base import SegmenterSettings
from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.dense import DenseSegmenter, DenseSettings

_CORRELATION_SCALE = 3.0


class SCCLIPSettings(DenseSettings):
    """Settings of SC-CLIP; the switches are the parts of the method, for ablations.

    Blocks count from 0 and lie before the last one. Their defaults and that of `res_cls` were published for 12 blocks
    (ViT-B/16) and 24 (ViT-L/14, by the authors in their repository); other towers take those for 12, scaled down where
    they are shallower.
    """

    pre_adjust_idx: int | None = Field(
        default=None, ge=0, description="Block whose features smooth the last block's input and steer its attention."
    )
    post_adjust_idx: int | None = Field(
        default=None, ge=0, description="Block whose features smooth the last block's output."
    )
    multi_start_idx: int | None = Field(default=None, ge=0, description="First block of the multi-level sum.")
    multi_end_idx: int | None = Field(
        default=None, ge=1, description="First block after those of the multi-level sum; not in it."
    )
    res_cls: float | None = Field(
        default=None, ge=0, description="Share of the class token that is added to every patch: 0.3, or 0.1 for L/14."
    )
    beta: float = Field(default=0.4, ge=0, lt=1, description="Patches less similar than this do not smooth each other.")
    neighbours: int = Field(
        default=30, ge=1, description="Nearest patches that an anomaly is judged by; smaller windows have none."
    )
    contamination: float = Field(default=0.05, ge=0, lt=1, description="Share of patches that are anomalous.")
    anomaly_repair: bool = Field(default=True, description="Replace anomalous tokens by the mean of their neighbours.")
    pre_aggregation: bool = Field(default=True, description="Smooth what enters the last block.")
    attention_enhancement: bool = Field(
        default=True, description="Half of the last attention follows middle features; else it is all key-key."
    )
    post_aggregation: bool = Field(default=True, description="Smooth what leaves the last block.")
    multi_level: bool = Field(default=True, description="Add the multi-level sum's own pass through the last block.")

    def resolve(self, shape: TowerShape) -> Self:
        """Fills in the blocks and `res_cls` too; SettingError if a block is not before the last one."""
        published = _published(shape)
        given = {name: getattr(self, name) for name in published}
        filled = {name: published[name] if value is None else value for name, value in given.items()}
        for name in ("pre_adjust_idx", "post_adjust_idx"):
            if not 0 <= filled[name] < shape.depth - 1:
                raise SettingError(
                    f"{name} = {filled[name]}: must be before the last of the model's {shape.depth} blocks"
                )
        first, end = filled["multi_start_idx"], filled["multi_end_idx"]
        if not first < end < shape.depth:
            raise SettingError(
                f"multi_start_idx = {first}, multi_end_idx = {end}: the first must be smaller, and the second at most "
                f"{shape.depth - 1}, the last of the model's {shape.depth} blocks"
            )
        return super().resolve(shape).model_copy(update=filled)


def _published(shape: TowerShape) -> dict[str, int | float]:
    if shape.depth == 24:
        pre, post, first, last, res_cls = 16, 6, 8, 18, 0.1
    else:
        # Scaled to very few blocks, a middle one may round to the last, which the method does not record.
        pre, post, first, last = (min(shape.blocks_like([block])[0], shape.depth - 2) for block in (8, 3, 3, 9))
        res_cls = 0.3
    return {
        "pre_adjust_idx": pre,
        "post_adjust_idx": post,
        "multi_start_idx": first,
        "multi_end_idx": last + 1,
        "res_cls": res_cls,
    }


class SCCLIP(DenseSegmenter):
    """Calibrates what enters the last block, its attention, and what leaves it, by CLIP's own earlier features."""

    name = "sc_clip"
    Settings: ClassVar[type[SegmenterSettings]] = SCCLIPSettings
    settings: SCCLIPSettings
    card = MethodCard(
        title="SC-CLIP",
        paper="Self-Calibrated CLIP for Training-Free Open-Vocabulary Segmentation",
        venue="IEEE TIP 2025",
        repository="SuleBai/SC-CLIP",
        idea="Repairs anomalous tokens, and lets features of earlier blocks steer smoothing and attention.",
        models=("CLIP ViT",),
        passes_note="the last attention twice; similarities of all pairs of patches",
        published={
            "voc21": 64.6,
            "context60": 36.8,
            "coco_object": 37.7,
            "voc20": 84.3,
            "cityscapes": 41.0,
            "context59": 40.1,
            "ade20k": 20.1,
            "coco_stuff": 26.6,
        },
        published_source="the paper, as quoted by the survey of training-free methods, table 1",
    )

    def patch_embeddings(self, pixels: Tensor) -> Tensor:
        settings = self.settings
        pre, post = settings.pre_adjust_idx or 0, settings.post_adjust_idx or 0
        levels = range(settings.multi_start_idx or 0, settings.multi_end_idx or 0)
        trunk = self.tower.trunk(pixels, self.positional, hidden={pre, post, *levels})
        cls, patches = trunk.tokens[:, :1].float(), trunk.tokens[:, 1:].float()
        middle, early = trunk.hidden[pre][:, 1:], trunk.hidden[post][:, 1:]
        if settings.anomaly_repair:
            anomalous = find_anomalies(patches, settings.neighbours, settings.contamination)
            patches, middle = repair(patches, anomalous, trunk.grid), repair(middle, anomalous, trunk.grid)
        similarity = cosine_similarities(middle)
        if settings.pre_aggregation:
            patches = aggregate(patches, similarity, settings.beta)
        correlation = correlation_weights(similarity) if settings.attention_enhancement else None
        out = self._last_attention(patches, cls, correlation)
        if settings.multi_level:
            nothing = torch.zeros_like(trunk.tokens, dtype=torch.float32)
            fused = sum((trunk.hidden[level] for level in levels), start=nothing)
            out = out + self._last_attention(fused[:, 1:], fused[:, :1], correlation)
        if settings.post_aggregation:
            # The paper smooths both terms of the sum; aggregation is linear.
            out = aggregate(out, cosine_similarities(early), settings.beta)
        return self.tower.head(out.to(self.dtype)).reshape(len(pixels), *trunk.grid, -1)

    def _last_attention(self, patches: Tensor, cls: Tensor, correlation: Tensor | None) -> Tensor:
        """The last block's attention among patches only, with part of a class token on top: [B, n, D] float32."""
        _, k, v = self.tower.qkv(patches.to(self.dtype), -1)
        mixed = attend(k, k, v)
        if correlation is not None:
            # All heads share these weights, so their values are mixed side by side instead of repeating the weights.
            shared = correlation.to(v.dtype) @ merge_heads(v)
            mixed = 0.5 * (split_heads(shared, self.tower.heads) + mixed)
        return self.tower.project_heads(mixed, -1).float() + (self.settings.res_cls or 0.0) * cls


def correlation_weights(similarity: Tensor) -> Tensor:
    """Attention weights that follow the similarity of patches: softmax(3 (S - mean S)) over those above the mean.

    The mean is over all pairs of a window.

    Args:
        similarity: [B, n, n] float32 cosines, 1 on the diagonal.

    Returns:
        [B, n, n] float32; rows sum to 1.
    """
    logits = _CORRELATION_SCALE * (similarity - similarity.mean((1, 2), keepdim=True))
    # A patch is always similar to itself; rounding may say otherwise where all patches are alike.
    logits.diagonal(dim1=1, dim2=2).clamp_(min=0)
    return logits.masked_fill(logits < 0, -torch.inf).softmax(-1)
