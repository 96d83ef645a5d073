"""ConvCLIP: patch embeddings read off the ConvNeXt of a convolutional CLIP. Our own baseline, not a published method.

"A Survey on Training-free Open-Vocabulary Semantic Segmentation" (Kombol, Martinovic and Segvic, 2025) proposes in
section 4.5 to segment with open_clip's ConvNeXt models and knows of nobody who did. This is the plainest way, the
counterpart of CLIPBase: every position of the last feature map goes through CLIP's own head (norm, projection) as if it
were the pooled image. Training-free; nothing of it is tuned, and there are no published numbers to compare with.

A convolutional trunk has no positional table and no native grid. So the image goes through in one piece by default
(`crop = 0`), padded to whole patches, and the windows of the other methods are an option. A patch is 32 pixels; with
`output_stride = 16` the last stage is dilated, which doubles the resolution of the map with the same weights.

Cost: one pass of the trunk; with `output_stride = 16` its last stage costs four times as much.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ovss_ray.models.clip import ClipModel
from ovss_ray.models.conv import ConvTower
from ovss_ray.segmenters.base import SegmenterSettings
from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.dense import DenseSegmenter, WindowSettings


class ConvCLIPSettings(WindowSettings):
    """Settings of ConvCLIP: the whole image in one pass, padded to whole patches."""

    crop: int | None = Field(default=0, ge=0, le=8192, description="Size of the square windows; 0 is the whole image.")
    pad: int | Literal["patch"] = Field(
        default="patch",
        description="Windows are padded to a multiple of this, or of the patch size; 0 drops the remainder.",
    )
    output_stride: Literal[32, 16] = Field(
        default=32, description="Pixels between neighbouring patches; 16 dilates the last stage of the network."
    )


class ConvCLIP(DenseSegmenter[ConvTower]):
    """Every position of ConvNeXt's last feature map, through CLIP's own head."""

    name = "convclip"
    Settings: ClassVar[type[SegmenterSettings]] = ConvCLIPSettings
    Tower = ConvTower
    settings: ConvCLIPSettings
    card = MethodCard(
        title="ConvCLIP (ours)",
        paper="none; proposed in A Survey on Training-free Open-Vocabulary Semantic Segmentation, section 4.5",
        venue="proposed 2025, unpublished",
        repository="mlfoundations/open_clip",
        idea="Treats every position of a ConvNeXt CLIP's last feature map like the pooled image.",
        models=("CLIP ConvNeXt",),
        passes_note="the last stage four times with output_stride 16",
        status="our own baseline; nothing was published to compare with, no benchmark was run yet",
    )

    def __init__(self, clip: ClipModel[ConvTower], settings: ConvCLIPSettings) -> None:
        super().__init__(clip, settings)
        self.tower = clip.vision.at_stride(self.settings.output_stride)

    def patch_embeddings(self, pixels: Tensor) -> Tensor:
        return self.tower.head(self.tower.features(pixels))
