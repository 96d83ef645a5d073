"""ClearCLIP: the attention output of the last block alone, with query-query attention.

Lan et al., "ClearCLIP: Decomposing CLIP Representations for Dense Vision-Language Inference" (ECCV 2024),
mc-lan/ClearCLIP. The residual stream of the last block is the noise, so neither it nor the MLP is read. Windows are
padded to whole patches. Cost: one pass of CLIP, a little less than one. The published protocol takes one query a class
(vocabulary variants named `clearclip`), windows of 448 with stride 224 and a logit scale of 50.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ovss_ray.models.vision import Trunk
from ovss_ray.ops.attention import attend
from ovss_ray.segmenters.base import MethodCard, SegmenterSettings
from ovss_ray.segmenters.dense import DenseSettings
from ovss_ray.segmenters.last_block import LastBlockSegmenter


class ClearCLIPSettings(DenseSettings):
    """Settings of ClearCLIP."""

    logit_scale: float = Field(default=50.0, gt=0, description="Factor on the cosines before the softmax.")
    pad: int | Literal["patch"] = Field(
        default="patch", description="Windows are padded to a multiple of this, or of the patch size; 0 drops the rest."
    )


class ClearCLIP(LastBlockSegmenter):
    """Query-query attention without residual and MLP."""

    name = "clearclip"
    Settings: ClassVar[type[SegmenterSettings]] = ClearCLIPSettings
    settings: ClearCLIPSettings
    card = MethodCard(
        title="ClearCLIP",
        paper="ClearCLIP: Decomposing CLIP Representations for Dense Vision-Language Inference",
        venue="ECCV 2024",
        repository="mc-lan/ClearCLIP",
        idea="Takes the last block's query-query attention output alone, without residual and MLP.",
        models=("CLIP ViT",),
        published={
            "voc21": 51.8,
            "context60": 32.6,
            "coco_object": 33.0,
            "voc20": 80.9,
            "cityscapes": 30.0,
            "context59": 35.9,
            "ade20k": 16.7,
            "coco_stuff": 23.9,
        },
        published_source="the paper, as quoted by the survey of training-free methods, table 1",
    )

    def mix(self, q: Tensor, k: Tensor, v: Tensor, trunk: Trunk) -> Tensor:
        del k, trunk
        return attend(q, q, v)
