"""CLIPBase: patch tokens read off unmodified CLIP, the baseline of the survey.

Every patch token of the last block is treated like the class token: final LayerNorm, projection, cosine with the text.
Numbers are those of the SCLIP paper (Wang et al., ECCV 2024), whose protocol is used: short side 336, windows of 224
with stride 112 on ViT-B/16, 80 templates.
"""

from __future__ import annotations

from torch import Tensor

from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.dense import DenseSegmenter


class CLIPBase(DenseSegmenter):
    """Plain CLIP, all blocks untouched."""

    name = "clipbase"
    card = MethodCard(
        title="CLIP (no change)",
        paper="Learning Transferable Visual Models From Natural Language Supervision",
        venue="ICML 2021",
        repository="openai/CLIP",
        idea="Treats every patch token of plain CLIP like the class token.",
        models=("CLIP ViT",),
        published={
            "voc21": 18.8,
            "context60": 9.9,
            "coco_object": 8.1,
            "voc20": 49.4,
            "cityscapes": 6.5,
            "context59": 11.1,
            "ade20k": 3.1,
            "coco_stuff": 5.7,
        },
        published_source="SCLIP paper, as quoted by the survey of training-free methods, table 1",
    )

    def patch_embeddings(self, pixels: Tensor) -> Tensor:
        trunk = self.tower.trunk(pixels, self.positional, until=self.tower.depth)
        return self.tower.patch_map(self.tower.head(trunk.tokens), trunk.grid)
