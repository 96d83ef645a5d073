"""What every kind of vision tower of CLIP has in common for the methods that read it patch by patch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ovss_ray.errors import WeightsError


@dataclass(frozen=True)
class TowerShape:
    """What settings may follow of a model: side of its square input and of a patch in pixels, number of blocks (of a
    ConvNeXt: stages)."""

    image_size: int
    patch_size: int
    depth: int

    def blocks_like(self, blocks: Sequence[int], depth: int = 12) -> tuple[int, ...]:
        """Blocks that were published for a tower of `depth` blocks, in this one; each once, ascending.

        The authors' code takes the same numbers for deeper towers, and so does this. In a shallower one they are
        scaled so that first and last stay first and last.
        """
        if self.depth >= depth:
            return tuple(sorted(set(blocks)))
        return tuple(sorted({round(block * (self.depth - 1) / (depth - 1)) for block in blocks}))


class DenseTower(ABC):
    """A frozen vision tower of CLIP that gives an embedding for every patch.

    A method names the kind that it reads; models with another are refused, before anything is downloaded where the
    architecture tells.

    Attributes:
        patch_size: side in pixels of what one embedding stands for.
        image_size: side in pixels of the square input that the model was trained with.
        depth: number of blocks.
        embed_dim: width of the joint space.
    """

    NEEDED: ClassVar[str]
    """What errors recommend instead of a model with another tower."""

    patch_size: int
    image_size: int
    depth: int
    embed_dim: int

    def __init__(self, visual: nn.Module, name: str) -> None:
        reason = self.unfit_module(visual)
        if reason:
            self._refuse(name, reason)
        self._visual: Any
        self._visual = visual

    @classmethod
    def refuse_others(cls, config: Mapping[str, Any], name: str) -> None:
        """Raises `WeightsError` if models of an open_clip configuration have another tower."""
        reason = cls.unfit_config(config)
        if reason:
            cls._refuse(name, reason)

    @classmethod
    def _refuse(cls, name: str, reason: str) -> None:
        raise WeightsError(f"{name} cannot be used: {reason}; {cls.NEEDED}")

    @staticmethod
    @abstractmethod
    def unfit_config(config: Mapping[str, Any]) -> str | None:
        """Why models of an open_clip configuration cannot be read, as far as it tells; None if they can."""

    @staticmethod
    @abstractmethod
    def unfit_module(visual: nn.Module) -> str | None:
        """Why the vision tower of a model cannot be read; None if it can."""

    @staticmethod
    @abstractmethod
    def shape_of(config: Mapping[str, Any]) -> TowerShape:
        """The shape of a tower of an open_clip configuration that is not unfit, without building it."""

    @property
    @abstractmethod
    def _first_weight(self) -> Tensor:
        """The weight of the first convolution."""

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the matrix products; LayerNorm is float32 in any case."""
        return self._first_weight.dtype

    @property
    def device(self) -> torch.device:
        return self._first_weight.device

    @property
    def shape(self) -> TowerShape:
        return TowerShape(self.image_size, self.patch_size, self.depth)

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """The patch grid of an input of this size; a remainder below one patch is dropped."""
        return height // self.patch_size, width // self.patch_size
