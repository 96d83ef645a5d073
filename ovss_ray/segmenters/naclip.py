"""NACLIP: key-key attention with a Gaussian bump around every patch.

Hajimiri, Ben Ayed and Dolz, "Pay Attention to Your Neighbours: Training-Free Open-Vocabulary Semantic Segmentation"
(WACV 2025), sinahmr/NACLIP. The bump is added to the logits of the last block's attention, after their scaling and
before the softmax; residual and MLP go. Cost: one pass of CLIP, a little less than one. Published with whole images
(`crop=0`) on VOC; the repository turns PAMR on (`pamr=10`), the numbers below are without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from ovss_ray.models.vision import Trunk
from ovss_ray.ops.attention import attend, gaussian_prior
from ovss_ray.segmenters.base import SegmenterSettings
from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.last_block import ReducedSegmenter, ReducedSettings


class NACLIPSettings(ReducedSettings):
    """Settings of NACLIP; the alternatives are the paper's ablations."""

    SEARCH: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **ReducedSettings.SEARCH,
        "sigma": (1.0, 2.0, 3.0, 5.0, 7.0, 10.0),
    }

    sigma: float = Field(default=5.0, gt=0, description="Width of the Gaussian bump, in patches.")
    attention: Literal["naclip", "kk", "nonly"] = Field(
        default="naclip",
        description="naclip is key-key similarity plus the bump, kk has no bump, nonly nothing but the bump.",
    )


class NACLIP(ReducedSegmenter):
    """Patches attend to patches with similar keys, and to their neighbours."""

    name = "naclip"
    Settings: ClassVar[type[SegmenterSettings]] = NACLIPSettings
    settings: NACLIPSettings
    card = MethodCard(
        title="NACLIP",
        paper="Pay Attention to Your Neighbours: Training-Free Open-Vocabulary Semantic Segmentation",
        venue="WACV 2025",
        repository="sinahmr/NACLIP",
        idea="Adds a Gaussian bump around every patch to key-key attention, without residual and MLP.",
        models=("CLIP ViT",),
        published={
            "voc21": 58.9,
            "context60": 32.2,
            "coco_object": 33.2,
            "voc20": 79.7,
            "cityscapes": 35.5,
            "context59": 35.2,
            "ade20k": 17.4,
            "coco_stuff": 23.3,
        },
        published_source="the paper without PAMR, as quoted by the survey of training-free methods, table 1",
    )

    def mix(self, q: Tensor, k: Tensor, v: Tensor, trunk: Trunk) -> Tensor:
        bump = gaussian_prior(trunk.grid, self.settings.sigma, k.device)
        if self.settings.attention == "kk":
            return attend(k, k, v)
        if self.settings.attention == "naclip":
            return attend(k, k, v, bias=bump)
        strength = mean_logit_bound(q, k)[:, None, None, None]
        return (bump * strength).softmax(-1).to(v.dtype) @ v


def mean_logit_bound(q: Tensor, k: Tensor) -> Tensor:
    """The mean over heads and token pairs of |q_i| |k_j| / sqrt(d), for each image: [B, H, N, d] to [B] float32."""
    q_norm, k_norm = (torch.linalg.vector_norm(part.float(), dim=-1).mean(-1) for part in (q, k))
    bound: Tensor = (q_norm * k_norm).mean(1) / math.sqrt(q.shape[-1])
    return bound
