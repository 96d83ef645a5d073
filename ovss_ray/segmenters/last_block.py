"""Methods that change the attention of CLIP's last block and leave all before it alone."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from ovss_ray.models.vision import Trunk
from ovss_ray.segmenters.base import SegmenterSettings
from ovss_ray.segmenters.dense import DenseSegmenter, DenseSettings


class LastBlockSegmenter(DenseSegmenter):
    """A rule for mixing the values of the last block, and whether its residual and its MLP stay.

    A method states `mix`. `residual` and `mlp` are False unless it says so; `recorded_blocks` are those whose queries
    and keys `mix` looks at beside the last one's.
    """

    @property
    def residual(self) -> bool:
        """Whether the tokens that enter the last block are added to its attention output."""
        return False

    @property
    def mlp(self) -> bool:
        """Whether the last block's MLP runs."""
        return False

    @property
    def recorded_blocks(self) -> Collection[int]:
        """Blocks whose queries and keys `mix` finds in `trunk.queries_keys`."""
        return ()

    @abstractmethod
    def mix(self, q: Tensor, k: Tensor, v: Tensor, trunk: Trunk) -> Tensor:
        """The attention of the last block.

        Args:
            q, k, v: of the last block, each [B, H, N, d]; token 0 is the class token.
            trunk: the pass up to the last block.

        Returns:
            [B, H, N, d], the mixed values; `v` itself is identity attention.
        """

    def patch_embeddings(self, pixels: Tensor) -> Tensor:
        trunk = self.tower.trunk(pixels, self.positional, queries_keys=self.recorded_blocks)
        return self.read_last_block(trunk, self.mix(*self.tower.qkv(trunk.tokens, -1), trunk))

    def read_last_block(self, trunk: Trunk, mixed: Tensor) -> Tensor:
        """The rest of the tower after the attention of the last block: [B, h, w, E]."""
        tokens = self.tower.readout(trunk.tokens, -1, mixed, residual=self.residual, mlp=self.mlp)
        return self.tower.patch_map(self.tower.head(tokens), trunk.grid)


class ReducedSettings(DenseSettings):
    """Settings of methods that read the attention output of the last block alone."""

    arch: Literal["reduced", "vanilla"] = Field(
        default="reduced", description="reduced drops the last block's residual and MLP, vanilla keeps both."
    )


class ReducedSegmenter(LastBlockSegmenter):
    """A last block without residual and MLP, unless an ablation asks for both."""

    Settings: ClassVar[type[SegmenterSettings]] = ReducedSettings
    settings: ReducedSettings

    @property
    def residual(self) -> bool:
        return self.settings.arch == "vanilla"

    mlp = residual
