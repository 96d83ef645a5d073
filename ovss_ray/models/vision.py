"""The vision transformer of CLIP, taken apart into the pieces that dense methods put together differently.

Tokens are [B, N, D] with N = 1 + h * w: row 0 is the class token (CLS), then the patches row-major. Blocks count from 0
and may be named from the end (-1 is the last). Everything is frozen: no method changes the model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn
from typing_extensions import TypeVar

from ovss_ray.models.tower import DenseTower
from ovss_ray.models.tower import TowerShape as TowerShape  # methods take it from here, beside Trunk
from ovss_ray.ops.attention import attend, merge_heads, split_heads
from ovss_ray.ops.positional import PositionalPolicy, resample_positions

_MAX_CACHED_GRIDS = 64


@dataclass(frozen=True)
class Trunk:
    """What a pass through the blocks leaves behind.

    tokens: [B, N, D] after the last block that ran; grid: (h, w) patches; hidden: tokens after the recorded blocks;
    queries_keys: (q, k), each [B, H, N, d], of the recorded blocks.
    """

    tokens: Tensor
    grid: tuple[int, int]
    hidden: Mapping[int, Tensor]
    queries_keys: Mapping[int, tuple[Tensor, Tensor]]


class VisionTower(DenseTower):
    """The pieces of one frozen CLIP vision transformer.

    Raises:
        WeightsError: the tower has no class token, pools by attention, or is no plain vision transformer.
    """

    NEEDED = "dense methods need a CLIP vision transformer with a class token, such as ViT-B-16-quickgelu/openai"

    def __init__(self, visual: nn.Module, name: str) -> None:
        super().__init__(visual, name)
        self._blocks = list(self._visual.transformer.resblocks)
        self.patch_size = int(self._visual.patch_size[0])
        self.image_size = int(self._visual.image_size[0])
        self.native_grid = (int(self._visual.grid_size[0]), int(self._visual.grid_size[1]))
        self.depth = len(self._blocks)
        self.heads = int(self._blocks[0].attn.num_heads)
        self.width = int(self._visual.conv1.out_channels)
        self.embed_dim = int(self._visual.proj.shape[1])
        self._positions: dict[tuple[tuple[int, int], PositionalPolicy], Tensor] = {}

    @staticmethod
    def unfit_config(config: Mapping[str, Any]) -> str | None:
        vision = config["vision_cfg"]
        if "timm_model_name" in vision:
            return f"its vision tower is the timm model {vision['timm_model_name']}"
        if isinstance(vision.get("layers"), list | tuple):
            return "its vision tower is a ResNet"
        if vision.get("attentional_pool"):
            return "its vision tower pools by attention"
        if vision.get("pool_type", "tok") != "tok":
            return "its vision tower does not read the image off a class token"
        return None

    @staticmethod
    def unfit_module(visual: Any) -> str | None:
        if not isinstance(visual, VisionTransformer):
            return f"its vision tower is a {type(visual).__name__}"
        if visual.attn_pool is not None:
            return "its vision tower pools by attention"
        if visual.pool_type != "tok" or visual.proj is None:
            return "its vision tower does not read the image off a class token"
        if not visual.transformer.batch_first:
            return "its tokens are laid out [N, B, D], as in releases of open_clip before 2.24"
        if visual.patch_size[0] != visual.patch_size[1] or visual.image_size[0] != visual.image_size[1]:
            return "its patches or its images are not square"
        for block in visual.transformer.resblocks:
            if type(block) is not ResidualAttentionBlock or not isinstance(block.attn, nn.MultiheadAttention):
                return "its blocks are not the standard ones"
        return None

    @staticmethod
    def shape_of(config: Mapping[str, Any]) -> TowerShape:
        vision = config["vision_cfg"]
        size = vision["image_size"]
        side = size if isinstance(size, int) else size[0]
        return TowerShape(int(side), int(vision["patch_size"]), int(vision["layers"]))

    @property
    def _first_weight(self) -> Tensor:
        weight: Tensor = self._visual.conv1.weight
        return weight

    def embed(self, pixels: Tensor, positional: PositionalPolicy) -> Tensor:
        """Patches, class token and positions, normalised: [B, 3, H, W] to the first tokens [B, N, D]."""
        visual = self._visual
        grid = self.grid_of(*pixels.shape[-2:])
        patches = visual.conv1(pixels.to(self.dtype)).flatten(2).transpose(1, 2)
        cls = visual.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        tokens = torch.cat([cls, patches], dim=1) + self._position_table(grid, positional).to(patches.dtype)
        embedded: Tensor = visual.ln_pre(tokens)
        return embedded

    def trunk(
        self,
        pixels: Tensor,
        positional: PositionalPolicy,
        *,
        until: int = -1,
        hidden: Collection[int] = (),
        queries_keys: Collection[int] = (),
    ) -> Trunk:
        """Runs the blocks before block `until` unmodified and records what is asked for; recording changes nothing.

        Args:
            pixels: [B, 3, H, W], normalised.
            until: the first block that does not run; -1 leaves the last one to the method, `depth` runs all.
            hidden: blocks whose output is kept.
            queries_keys: blocks whose queries and keys are kept.
        """
        tokens = self.embed(pixels, positional)
        kept: dict[int, Tensor] = {}
        pairs: dict[int, tuple[Tensor, Tensor]] = {}
        for index in range(until if until >= 0 else self.depth + until):
            if index in queries_keys:
                q, k, v = self.qkv(tokens, index)
                pairs[index] = (q, k)
                tokens = self.readout(tokens, index, attend(q, k, v), residual=True, mlp=True)
            else:
                tokens = self.block(tokens, index)
            if index in hidden:
                kept[index] = tokens
        return Trunk(tokens, self.grid_of(*pixels.shape[-2:]), kept, pairs)

    def block(self, tokens: Tensor, index: int) -> Tensor:
        """One unmodified block, called as it is."""
        out: Tensor = self._blocks[index](tokens)
        return out

    def normed(self, tokens: Tensor, index: int) -> Tensor:
        """What a block projects to queries, keys and values: its first LayerNorm of the tokens that enter it."""
        out: Tensor = self._blocks[index].ln_1(tokens)
        return out

    def qkv(self, tokens: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a block, each [B, H, N, d], from the tokens that enter it."""
        return self.project_qkv(self.normed(tokens, index), index)

    def project_qkv(self, normed: Tensor, index: int) -> tuple[Tensor, Tensor, Tensor]:
        """As `qkv`, from what `normed` gave."""
        attention = self._blocks[index].attn
        projected = F.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (split_heads(part, self.heads) for part in projected.chunk(3, dim=-1))
        return q, k, v

    def project_heads(self, mixed: Tensor, index: int) -> Tensor:
        """Merges the heads of [B, H, N, d] and applies the block's output projection, bias included: [B, N, D]."""
        block = self._blocks[index]
        out: Tensor = block.ls_1(block.attn.out_proj(merge_heads(mixed)))
        return out

    def readout(self, tokens: Tensor, index: int, mixed: Tensor, *, residual: bool, mlp: bool) -> Tensor:
        """The rest of a block after its attention.

        Args:
            tokens: [B, N, D] that entered the block.
            mixed: [B, H, N, d], the values as mixed by the method's attention; `v` itself is identity attention.
            residual: add `tokens` to the attention output.
            mlp: apply the block's MLP, with the skip connection around it.
        """
        block = self._blocks[index]
        out = self.project_heads(mixed, index)
        if residual:
            out = tokens + out
        if mlp:
            out = out + block.ls_2(block.mlp(block.ln_2(out)))
        return out

    def head(self, tokens: Tensor) -> Tensor:
        """The final LayerNorm and the projection to the joint space: [..., D] to [..., E]."""
        visual = self._visual
        out: Tensor = visual.ln_post(tokens) @ visual.proj
        return out

    def last_parts(self) -> tuple[nn.Module, nn.Module, Tensor]:
        """The last block, the final LayerNorm and the projection: to be copied, never changed."""
        return self._blocks[-1], self._visual.ln_post, self._visual.proj

    def patch_map(self, tokens: Tensor, grid: tuple[int, int]) -> Tensor:
        """Drops the class token and lays the patches out: [B, 1 + h * w, E] to [B, h, w, E]."""
        return tokens[:, 1:].reshape(len(tokens), *grid, -1)

    def _position_table(self, grid: tuple[int, int], positional: PositionalPolicy) -> Tensor:
        key = (grid, positional)
        if key not in self._positions:
            if len(self._positions) >= _MAX_CACHED_GRIDS:
                self._positions.clear()
            with torch.inference_mode(False), torch.no_grad():
                table = self._visual.positional_embedding.detach()
                self._positions[key] = resample_positions(table, self.native_grid, grid, positional)
        return self._positions[key]


TowerT = TypeVar("TowerT", bound=DenseTower, default=VisionTower)
"""The kind of tower of a model or a method: a vision transformer, unless it says otherwise."""
