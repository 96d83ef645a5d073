"""SCLIP: correlative self-attention in the last block.

Wang, Mei and Yuille, "SCLIP: Rethinking Self-Attention for Dense Vision-Language Inference" (ECCV 2024),
wangf3014/SCLIP. The last block's weights are softmax(q q^T) + softmax(k k^T): a plain sum whose rows add up to 2, which
matters because the residual stays, and so does the MLP. Cost: one pass of CLIP.
"""

from __future__ import annotations

from torch import Tensor

from ovss_ray.models.vision import Trunk
from ovss_ray.ops.attention import correlative_attention
from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.last_block import LastBlockSegmenter


class SCLIP(LastBlockSegmenter):
    """Patches attend to patches with similar queries and similar keys."""

    name = "sclip"
    card = MethodCard(
        title="SCLIP",
        paper="SCLIP: Rethinking Self-Attention for Dense Vision-Language Inference",
        venue="ECCV 2024",
        repository="wangf3014/SCLIP",
        idea="Attends by query-query plus key-key similarity in the last block.",
        models=("CLIP ViT",),
        published={
            "voc21": 59.1,
            "context60": 30.4,
            "coco_object": 30.5,
            "voc20": 80.4,
            "cityscapes": 32.2,
            "context59": 34.2,
            "ade20k": 16.1,
            "coco_stuff": 22.4,
        },
        published_source="the paper, as quoted by the survey of training-free methods, table 1",
    )
    residual = True
    mlp = True

    def mix(self, q: Tensor, k: Tensor, v: Tensor, trunk: Trunk) -> Tensor:
        del trunk
        return correlative_attention(q, k, v)
