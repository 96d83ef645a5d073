"""Methods with a second path beside CLIP's last blocks, which adds up attention outputs and nothing else."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from pydantic import Field
from torch import Tensor

from ovss_ray.ops.attention import attend
from ovss_ray.segmenters.base import SegmenterSettings
from ovss_ray.segmenters.dense import DenseSegmenter, DenseSettings


class ParallelPathSettings(DenseSettings):
    """Settings of methods with a second path."""

    path_blocks: int = Field(
        default=6, ge=0, description="Blocks, counted from the last one, that the second path runs beside."
    )


class ParallelPathSegmenter(DenseSegmenter):
    """A self-attention for the last blocks whose outputs are added up beside the original path.

    Every block projects queries, keys and values from the original path; the second path starts as a copy of what
    enters the first of these blocks, gets no MLP, and feeds back into nothing. A method states `self_attention`.
    """

    Settings: ClassVar[type[SegmenterSettings]] = ParallelPathSettings
    settings: ParallelPathSettings

    @abstractmethod
    def self_attention(self, q: Tensor, k: Tensor, v: Tensor, normed: Tensor) -> Tensor:
        """The second path's attention in one block.

        Args:
            q, k, v: of the block, each [B, H, N, d]; token 0 is the class token.
            normed: [B, N, D], what they were projected from.

        Returns:
            [B, H, N, d], the mixed values.
        """

    def patch_embeddings(self, pixels: Tensor) -> Tensor:
        path, _ = self.both_paths(pixels)
        return self.tower.patch_map(self.tower.head(path), self.tower.grid_of(*pixels.shape[-2:]))

    def both_paths(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens [B, N, D] of the second and of the original path after the last block."""
        tower = self.tower
        first = max(0, tower.depth - self.settings.path_blocks)
        tokens = path = tower.trunk(pixels, self.positional, until=first).tokens
        for index in range(first, tower.depth):
            q, k, v = tower.qkv(tokens, index)
            path = path + tower.project_heads(self.self_attention(q, k, v, tower.normed(tokens, index)), index)
            tokens = tower.readout(tokens, index, attend(q, k, v), residual=True, mlp=True)
        return path, tokens
