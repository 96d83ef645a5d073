"""The ConvNeXt of CLIP, read densely: every position of its last feature map goes through the head on its own.

open_clip's ConvNeXt models are a trunk of timm (four stages, global average pooling, LayerNorm) and a projection to the
joint space. A feature map of one position is thus encoded exactly as `encode_image` encodes it. Pooling comes before
the norm, so the mean of the embeddings of a larger map is near that of the image, but not equal to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.timm_model import TimmModel
from timm.models import is_model_in_modules
from timm.models.convnext import ConvNeXt
from torch import Tensor, nn
from typing_extensions import Self

from ovss_ray.errors import SettingError
from ovss_ray.models.tower import DenseTower, TowerShape

_STAGES = 4
_STRIDE = 32


class ConvTower(DenseTower):
    """One frozen ConvNeXt of CLIP; inputs may have any size of at least one patch.

    Raises:
        WeightsError: the tower is no ConvNeXt, or it pools by attention.
    """

    NEEDED = "this method needs a ConvNeXt CLIP, such as convnext_base_w/laion2b_s13b_b82k"

    def __init__(self, visual: nn.Module, name: str) -> None:
        super().__init__(visual, name)
        self._trunk = self._visual.trunk
        self.patch_size = self._stride = int(self._trunk.feature_info[-1]["reduction"])
        self.image_size = int(self._visual.image_size[0])
        self.depth = len(self._trunk.stages)
        self.width = int(self._trunk.num_features)
        with torch.inference_mode():
            self.embed_dim = self.head(self._first_weight.new_zeros(1, self.width, 1, 1)).shape[-1]

    @staticmethod
    def unfit_config(config: Mapping[str, Any]) -> str | None:
        vision = config["vision_cfg"]
        name = vision.get("timm_model_name")
        if name is None:
            return "its vision tower is no ConvNeXt"
        if not is_model_in_modules(name, "convnext"):
            return f"its vision tower is the timm model {name}"
        if "attn" in vision.get("timm_pool", ""):
            return "its vision tower pools by attention"
        return None

    @staticmethod
    def unfit_module(visual: Any) -> str | None:
        if not isinstance(visual, TimmModel):
            return f"its vision tower is a {type(visual).__name__}"
        if not isinstance(visual.trunk, ConvNeXt):
            return f"its vision tower is a {type(visual.trunk).__name__}"
        if visual.trunk.head.global_pool.is_identity():
            return "its vision tower pools by attention"
        if visual.image_size[0] != visual.image_size[1]:
            return "its images are not square"
        return None

    @staticmethod
    def shape_of(config: Mapping[str, Any]) -> TowerShape:
        size = config["vision_cfg"].get("image_size", 224)
        return TowerShape(int(size if isinstance(size, int) else size[0]), _STRIDE, _STAGES)

    @property
    def _first_weight(self) -> Tensor:
        weight: Tensor = self._trunk.stem[0].weight
        return weight

    def at_stride(self, stride: int) -> Self:
        """The same weights read at their own stride (32) or at half of it, where a patch is half as large.

        Raises:
            SettingError: another stride.
        """
        if stride not in (self._stride, self._stride // 2):
            raise SettingError(f"output_stride = {stride}: this model has {self._stride} or {self._stride // 2}")
        other = copy(self)
        other.patch_size = stride
        return other

    def features(self, pixels: Tensor) -> Tensor:
        """The last feature map: [B, 3, H, W], normalised, to [B, C, h, w] with (h, w) = `grid_of(H, W)`.

        At half the stride, the last stage sees its input at all four offsets of one position, which is what dilating
        its convolutions would compute. A field of 32 pixels then stands for the 16 in its middle, so the image is
        framed by 8 pixels that repeat its edge.
        """
        trunk = self._trunk
        if self.patch_size == self._stride:
            whole: Tensor = trunk.forward_features(pixels.to(self.dtype))
            return whole
        framed = F.pad(pixels, [self.patch_size // 2] * 4, mode="replicate").to(self.dtype)
        *early, last = trunk.stages
        x = nn.Sequential(trunk.stem, *early)(framed)
        height, width = x.shape[-2] - 1, x.shape[-1] - 1
        out = x.new_empty(len(x), self.width, height, width)
        for top, left in product(range(min(2, height)), range(min(2, width))):
            out[:, :, top::2, left::2] = last(x[:, :, top:, left:])
        dense: Tensor = trunk.norm_pre(out)
        return dense

    def head(self, features: Tensor) -> Tensor:
        """Norm and projection of every position on its own: [B, C, h, w] to [B, h, w, E]."""
        batch, _, height, width = features.shape
        alone = features.permute(0, 2, 3, 1).reshape(-1, self.width, 1, 1)
        out: Tensor = self._visual.head(self._trunk.forward_head(alone))
        return out.view(batch, height, width, -1)
