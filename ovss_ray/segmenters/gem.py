"""GEM: beside the last blocks, a path that adds up normalised query-query, key-key and value-value attention.

Bousselham et al., "Grounding Everything: Emerging Localization Properties in Vision-Language Transformers" (CVPR 2024),
WalBouss/GEM. CLIP Surgery's path, with three attentions a block instead of one: queries, keys and values are
normalised, drawn to clusters by attending to themselves (`iterations`), and each then mixes the block's values; the
three results are averaged. The sharpness of the softmax follows the norm of the image's own tokens. The authors' code
counts a `depth` of 7 for the six blocks that have the path; here both methods call it `path_blocks`. Cost: one pass of
CLIP and, in six blocks, six attentions and an output projection more.

The whole image is squeezed into a square of twice the model's input (the authors take 448 for every model) and goes
through in one pass, with the single template "a photo of a {}.". Background, by the authors' recipe: name foreground
classes only; pixels whose best probability stays below a threshold get no label. Set `logit_scale=100` and tune
`prob_thd`, which depends on the number of classes (0.85 in their example). Their interface also scales the map of every
class to 0..1, for heat maps; a label map has no use for that and no threshold works on the softmax of such maps, so it
is left out.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ovss_ray.models.vision import TowerShape
from ovss_ray.ops.attention import attend
from ovss_ray.ops.positional import PositionalPolicy
from ovss_ray.segmenters.base import SegmenterSettings
from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.parallel_path import ParallelPathSegmenter, ParallelPathSettings


class GEMSettings(ParallelPathSettings):
    """Settings of GEM."""

    iterations: int = Field(
        default=1, ge=0, description="Times that queries, keys and values are drawn to their clusters."
    )
    temperature: float | None = Field(
        default=None,
        gt=0,
        description="Factor on the cosines before the softmax of the path's attention; follows each image.",
    )
    short_side: int | None = Field(
        default=None, ge=16, le=8192, description="Side, or short side, of the resized image; 2 x the model's input."
    )
    crop: int | None = Field(default=0, ge=0, le=8192, description="Size of the square windows; 0 is the whole image.")
    resize: Literal["short_side", "square", "patches"] = Field(
        default="square",
        description="What an image is resized to: square does not keep its shape, short_side does, patches only rounds "
        "its own size up to whole patches.",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bicubic", description="How images are resized: bilinear as OpenCV, bicubic as Pillow (antialiased)."
    )

    def own_positional(self) -> PositionalPolicy:
        return "bicubic_aa"

    def resolve(self, shape: TowerShape) -> Self:
        return super().resolve(shape).model_copy(update={"short_side": self.short_side or 2 * shape.image_size})


class GEM(ParallelPathSegmenter):
    """The mean of three normalised self-attentions in the second path."""

    name = "gem"
    Settings: ClassVar[type[SegmenterSettings]] = GEMSettings
    settings: GEMSettings
    card = MethodCard(
        title="GEM",
        paper="Grounding Everything: Emerging Localization Properties in Vision-Language Transformers",
        venue="CVPR 2024",
        repository="WalBouss/GEM",
        idea="Adds up normalised query, key and value self-attention of the last six blocks in a path of its own.",
        models=("CLIP ViT",),
        passes_note="six attentions more in six blocks",
        published={"voc21": 46.2, "context59": 32.6, "ade20k": 15.7},
        published_source="the paper, as quoted by the survey of training-free methods, table 1",
    )

    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor) -> Tensor:
        beta = self.settings.temperature or adaptive_beta(normed, q.shape[-1])
        mixed = [cluster_attention(part, v, beta, self.settings.iterations) for part in (q, k, v)]
        return torch.stack(mixed).mean(0)


def adaptive_beta(normed: Tensor, head_width: int) -> Tensor:
    """Mean norm of an image's tokens [B, N, D] over the square root of the head width: [B, 1, 1, 1] float32."""
    beta: Tensor = torch.linalg.vector_norm(normed.float(), dim=-1).mean(1) / math.sqrt(head_width)
    return beta[:, None, None, None]


def cluster_attention(part: Tensor, v: Tensor, beta: Tensor | float, iterations: int) -> Tensor:
    """Mixes values by the cosines between tokens, which before that are drawn to their clusters in the same way.

    Args:
        part: [B, H, N, d], the queries, keys or values.
        v: [B, H, N, d], the values as they are.
        beta: factor on the cosines before the softmax, one for each image or for all.
        iterations: times that every token becomes the mean of tokens like it.

    Returns:
        [B, H, N, d] in the precision of `v`.
    """
    unit = F.normalize(part.float(), dim=-1)
    for _ in range(iterations):
        unit = F.normalize(_attend_to_like(unit, unit.to(v.dtype), beta).float(), dim=-1)
    return _attend_to_like(unit, v, beta)


def _attend_to_like(unit: Tensor, v: Tensor, beta: Tensor | float) -> Tensor:
    return attend((beta * unit).to(v.dtype), unit.to(v.dtype), v, scale=1.0)
