"""CLIP Surgery: beside the last blocks, a path that adds up value-value attention.

Li et al., "A Closer Look at the Explainability of Contrastive Language-Image Pre-training" (Pattern Recognition 2025;
on arXiv "CLIP Surgery for Better Explainability with Enhancement in Open-Vocabulary Tasks"), xmed-lab/CLIP_Surgery.
Architecture surgery: the new path runs beside the last six blocks (`path_blocks`, which the authors fix), takes
queries, keys and values from the original path, and has no MLP. Cost: one pass of CLIP and, in six blocks, an attention
and its output projection more.

Feature surgery (`feature_surgery=True`) also takes out of the scores what all classes share. The authors advise it for
explanation maps, not for segmentation: what it subtracts is the same for all classes of a patch, and only its weights
can change a label. For a single text the authors subtract the score of an empty one instead; as a single class is its
own label map, that is left out.

The evaluation behind the published numbers was not released. Here windows are as in SCLIP, on inputs of any shape,
while the authors' demo squeezes the whole image into a square: `resize="square", short_side=512, crop=0,
interpolation="bicubic"` (it resizes maps to the image at once, this by way of the square). It takes the templates
`maskclip_85` and names foreground classes only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from ovss_ray.ops.attention import attend
from ovss_ray.ops.labelling import best_query
from ovss_ray.ops.positional import PositionalPolicy
from ovss_ray.segmenters.base import SegmenterSettings
from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.dense import cosine_scores
from ovss_ray.segmenters.parallel_path import ParallelPathSegmenter, ParallelPathSettings

_FEATURE_SURGERY_SCALE = 2.0


class CLIPSurgerySettings(ParallelPathSettings):
    """Settings of CLIP Surgery."""

    feature_surgery: bool = Field(
        default=False, description="Takes out of the scores what all classes share; meant for explanation maps."
    )

    def own_positional(self) -> PositionalPolicy:
        return "bilinear"


class CLIPSurgery(ParallelPathSegmenter):
    """Value-value attention in the second path."""

    name = "clip_surgery"
    Settings: ClassVar[type[SegmenterSettings]] = CLIPSurgerySettings
    settings: CLIPSurgerySettings
    card = MethodCard(
        title="CLIP Surgery",
        paper="A Closer Look at the Explainability of Contrastive Language-Image Pre-training",
        venue="Pattern Recognition 2025",
        repository="xmed-lab/CLIP_Surgery",
        idea="Adds up value-value attention of the last six blocks in a path of its own, without MLPs.",
        models=("CLIP ViT",),
        passes_note="a second attention in six blocks",
        published={"cityscapes": 31.4, "context59": 29.3, "coco_stuff": 21.9},
        published_source="the paper, as quoted by the survey of training-free methods, table 1",
    )

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor) -> Tensor:
        del q, k, normed
        return attend(v, v, v)

    def patch_scores(self, pixels: Tensor, text: Tensor, query_class: Sequence[int]) -> Tensor:
        patches, image = self.patches_and_image(pixels)
        scores = cosine_scores(patches, text)
        if not self.settings.feature_surgery:
            return scores
        return feature_surgery(scores, F.normalize(image.float(), dim=-1) @ text.T, query_class)


def feature_surgery(scores: Tensor, image_scores: Tensor, query_class: Sequence[int]) -> Tensor:
    """Feature surgery: weights every class by how well it fits the whole image, then subtracts the mean of all classes.

    The paper has one query a class; with synonyms the best one stands for its class, so that naming a class twice
    makes neither its weight nor its part of the mean larger.

    Args:
        scores: [B, Q, h, w] cosines of the patches.
        image_scores: [B, Q] cosines of the whole window.
        query_class: class id of every query, never decreasing.

    Returns:
        [B, Q, h, w]; with one query a class, the mean over the queries is 0 at every patch.
    """
    logits = _FEATURE_SURGERY_SCALE * best_query(image_scores.T, query_class)
    weight = logits.softmax(0) * len(logits)
    weighted = weight[list(query_class)].T[:, :, None, None] * scores
    shared = best_query(weighted.transpose(0, 1), query_class).mean(0)
    return weighted - shared[:, None]
