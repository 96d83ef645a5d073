"""ClearCLIP: the attention output of the last block alone, with query-query attention.

Lan et al., "ClearCLIP: Decomposing CLIP Representations for Dense Vision-Language Inference" (ECCV 2024),
mc-lan/ClearCLIP. The residual stream of the last block is the noise, so neither it nor the MLP is read. Windows are
padded to whole patches, and twice as large as the model's input: 448 pixels for all of CLIP's usual models. Cost: one
pass of CLIP, a little less than one. The published protocol takes one query a class (vocabulary variants named
`clearclip`). The code can also add up the outputs of several last blocks, which the paper does not use.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ovss_ray.models.vision import TowerShape, Trunk
from ovss_ray.ops.attention import attend
from ovss_ray.segmenters.base import SegmenterSettings
from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.last_block import ReducedSegmenter, ReducedSettings


class ClearCLIPSettings(ReducedSettings):
    """Settings of ClearCLIP; other attentions, and `arch`, are the paper's ablations."""

    attention: Literal["qq", "kk", "vv", "qk", "identity"] = Field(
        default="qq", description="What is compared in the last attention; identity leaves every patch its own value."
    )
    short_side: int | None = Field(
        default=None, ge=16, le=8192, description="Short side, or side, of the resized image; 2 x the model's input."
    )
    crop: int | None = Field(
        default=None,
        ge=0,
        le=8192,
        description="Size of the square windows; 0 is the whole image; 2 x the model's input.",
    )
    logit_scale: float = Field(default=50.0, gt=0, description="Factor on the cosines before the softmax.")
    pad: int | Literal["patch"] = Field(
        default="patch", description="Windows are padded to a multiple of this, or of the patch size; 0 drops the rest."
    )

    def resolve(self, shape: TowerShape) -> Self:
        doubled = 2 * shape.image_size
        crop = doubled if self.crop is None else self.crop
        filled = self.model_copy(update={"short_side": self.short_side or doubled, "crop": crop})
        return super(ClearCLIPSettings, filled).resolve(shape)


class ClearCLIP(ReducedSegmenter):
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
        del trunk
        if self.settings.attention == "identity":
            return v
        compared = {"q": q, "k": k, "v": v}
        a, b = (compared[part] for part in self.settings.attention)
        return attend(a, b, v)
