"""Methods with a second path beside CLIP's last blocks, which adds up attention outputs and nothing else."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar

from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ovss_ray.errors import SettingError
from ovss_ray.models.vision import TowerShape
from ovss_ray.ops.attention import attend
from ovss_ray.segmenters.base import SegmenterSettings
from ovss_ray.segmenters.dense import DenseSegmenter, DenseSettings

_PUBLISHED_BLOCKS = range(6, 12)


class ParallelPathSettings(DenseSettings):
    """Settings of methods with a second path."""

    path_blocks: int | None = Field(
        default=None,
        ge=0,
        description="Blocks that have a second path beside them, counted from the last one; 6, fewer in a tower with "
        "less than 12 blocks.",
    )

    def resolve(self, shape: TowerShape) -> Self:
        resolved = super().resolve(shape)
        blocks = len(shape.blocks_like(_PUBLISHED_BLOCKS)) if self.path_blocks is None else self.path_blocks
        if blocks > shape.depth:
            raise SettingError(f"path_blocks = {blocks}: the model has only {shape.depth} blocks")
        return resolved.model_copy(update={"path_blocks": blocks})


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
        return self.patches_and_image(pixels)[0]

    def patches_and_image(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings of the patches [B, h, w, E], from the second path, and of the image [B, E], which is CLIP's own.

        The image is read off the class token of the original path, whose other tokens are not needed after the last
        block and are not computed there.
        """
        tower = self.tower
        first = tower.depth - (self.settings.path_blocks or 0)
        trunk = tower.trunk(pixels, self.positional, until=first)
        tokens = path = trunk.tokens
        for index in range(first, tower.depth):
            normed = tower.normed(tokens, index)
            q, k, v = tower.project_qkv(normed, index)
            path = path + tower.project_heads(self.self_attention(q, k, v, normed), index)
            if index == tower.depth - 1:
                tokens, q = tokens[:, :1], q[:, :, :1]
            tokens = tower.readout(tokens, index, attend(q, k, v), residual=True, mlp=True)
        return tower.patch_map(tower.head(path), trunk.grid), tower.head(tokens[:, 0])
