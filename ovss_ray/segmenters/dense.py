"""Dense methods: a score for every patch of sliding windows, brought to full resolution and labelled.

The protocol is the one that SCLIP introduced and most later papers share. A method states `patch_embeddings`, what its
vision tower gives for a batch of windows; everything else is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from ovss_ray.errors import SettingError
from ovss_ray.models.tower import TowerShape
from ovss_ray.models.vision import TowerT
from ovss_ray.ops.labelling import LabelRule, ScoreField, label_pixels
from ovss_ray.ops.pamr import pamr
from ovss_ray.ops.positional import PositionalPolicy
from ovss_ray.ops.resize import fitted_size
from ovss_ray.ops.windows import (
    WindowGrid,
    axis_matrix,
    cut_windows,
    pad_windows,
    padded_size,
    tile_maps,
    window_grid,
)
from ovss_ray.segmenters.base import Image, SegmenterSettings
from ovss_ray.segmenters.clip_segmenter import ClipSegmenter
from ovss_ray.segmenters.results import Segmentation, TextEmbeddings
from ovss_ray.vocabulary import Vocabulary


class WindowSettings(SegmenterSettings):
    """Settings of dense methods whatever their tower. Lengths are in pixels of the resized image; None follows the
    model."""

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset({"window_batch"})
    SEARCH: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "crop": (None, 0),
        "logit_scale": (20.0, 40.0, 60.0, 80.0, 100.0),
        "prob_thd": (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    }

    short_side: int | None = Field(
        default=None, ge=16, le=8192, description="Short side, or side, of the resized image; 1.5 x the model's input."
    )
    max_long_side: int = Field(default=2048, ge=16, description="Cap of the long side after resizing.")
    crop: int | None = Field(
        default=None, ge=0, le=8192, description="Size of the square windows; 0 is the whole image; the model's input."
    )
    stride: int | None = Field(default=None, ge=1, description="Step between windows; half the crop.")
    logit_scale: float = Field(default=40.0, gt=0, description="Factor on the cosines before the softmax.")
    prob_thd: float = Field(
        default=0.0, ge=0, le=1, description="Pixels whose best probability is below fall to the background; 0 is off."
    )
    area_thd: float = Field(
        default=0.0, ge=0, lt=1, description="Classes with no more than this share of the foreground go; 0 is off."
    )
    resize: Literal["short_side", "square", "patches"] = Field(
        default="short_side",
        description="What an image is resized to: short_side keeps its shape, square does not, patches only rounds its "
        "own size up to whole patches.",
    )
    interpolation: Literal["bilinear", "bicubic"] = Field(
        default="bilinear", description="How images are resized: bilinear as OpenCV, bicubic as Pillow (antialiased)."
    )
    pad: int | Literal["patch"] = Field(
        default=0, description="Windows are padded to a multiple of this, or of the patch size; 0 drops the remainder."
    )
    pamr: int = Field(default=0, ge=0, le=100, description="Steps of pixel-adaptive mask refinement; 0 is off.")
    pamr_dilations: tuple[int, ...] = Field(
        default=(8, 16), min_length=1, description="Distances in pixels of the neighbours that PAMR looks at."
    )
    window_batch: int | None = Field(
        default=None, ge=1, description="Windows in one forward pass, 128 on CUDA and 16 on a CPU; changes no label."
    )

    @model_validator(mode="after")
    def _stride_fits(self) -> Self:
        if self.crop and self.stride and self.stride > self.crop:
            raise ValueError(f"stride {self.stride} is larger than crop {self.crop}: pixels would stay unseen")
        if self.pad != "patch" and self.pad < 0:
            raise ValueError("pad must be 0, a positive number of pixels, or 'patch'")
        if min(self.pamr_dilations) < 1:
            raise ValueError("pamr_dilations must be positive numbers of pixels")
        return self

    def resolve(self, shape: TowerShape) -> Self:
        """Fills in what follows the model: crop = its input size, stride = half the crop, short side = 1.5 x input
        size."""
        image_size = shape.image_size
        crop = image_size if self.crop is None else self.crop
        stride = self.stride or max(1, (crop or image_size) // 2)
        if crop and stride > crop:
            raise SettingError(f"stride = {stride} is larger than crop = {crop}, the model's input; set both")
        short_side = self.short_side or image_size * 3 // 2
        return self.model_copy(update={"crop": crop, "stride": stride, "short_side": short_side})

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        if self.area_thd and vocabulary.background is None:
            raise SettingError(
                f"area_thd = {self.area_thd}: the area rule needs a background class, and the vocabulary "
                f"'{vocabulary.name}' has none; name one with background=, or leave area_thd at 0"
            )


class DenseSettings(WindowSettings):
    """Settings of dense methods that read a vision transformer."""

    positional: PositionalPolicy | None = Field(
        default=None, description="How positional embeddings are resampled to other grids; the method's own."
    )

    def own_positional(self) -> PositionalPolicy:
        """The policy that belongs to the method's definition."""
        return "dino_offset"

    def resolve(self, shape: TowerShape) -> Self:
        """Fills in what follows the model, and the positional policy, which follows the method."""
        positional = self.positional or self.own_positional()
        return super().resolve(shape).model_copy(update={"positional": positional})


@dataclass(frozen=True)
class _Prepared:
    """An image on the device, resized and normalised, and its windows."""

    pixels: Tensor
    grid: WindowGrid
    height: int
    width: int


class DenseSegmenter(ClipSegmenter[TowerT], Generic[TowerT]):
    """A method that scores every patch of every window against every query."""

    Settings: ClassVar[type[SegmenterSettings]] = DenseSettings
    settings: WindowSettings

    @property
    def positional(self) -> PositionalPolicy:
        """How the tower's positional embeddings are resampled; only towers that have some are asked."""
        assert isinstance(self.settings, DenseSettings)
        return self.settings.positional or self.settings.own_positional()

    @abstractmethod
    def patch_embeddings(self, pixels: Tensor) -> Tensor:
        """The method itself: embeddings of all patches of a batch of windows.

        Args:
            pixels: [B, 3, H, W], normalised; H and W are at least one patch.

        Returns:
            [B, h, w, E], not L2-normalised; what one window gives must not depend on the others.
        """

    def patch_scores(self, pixels: Tensor, text: Tensor, query_class: Sequence[int]) -> Tensor:
        """Scores of all patches against all queries: cosines [B, Q, h, w] float32, unless a method has its own.

        Args:
            pixels: as for `patch_embeddings`.
            text: [Q, E] float32, the embeddings of `TextEmbeddings`.
            query_class: class id of every query.
        """
        del query_class
        return cosine_scores(self.patch_embeddings(pixels), text)

    @torch.inference_mode()
    def segment_batch(self, images: Sequence[Image], text: TextEmbeddings, *, low_memory: bool) -> list[Segmentation]:
        self.settings.check_vocabulary(text.vocabulary)
        queries = self.text_on_device(text)
        rule = self._rule(text)
        prepared = [self._prepare(image) for image in images]
        maps = self._window_maps(prepared, queries, text.vocabulary.query_class, low_memory)
        strip_scores = self.strip_scores(low_memory)
        results = []
        for item, windows in zip(prepared, maps, strict=True):
            pixels = label_pixels(self._full_resolution(item, windows), rule, strip_scores)
            pixels = replace(pixels, labels=self.finish_labels(pixels.labels, text.vocabulary))
            results.append(self.segmentation(pixels, text.vocabulary))
        return results

    def finish_labels(self, labels: Tensor, vocabulary: Vocabulary) -> Tensor:
        """What a method does to a finished label map [H, W] int32; nothing, unless it says so."""
        del vocabulary
        return labels

    def _prepare(self, image: Image) -> _Prepared:
        height, width = image.shape[:2]
        settings = self.settings
        size = self._resized(height, width)
        pixels = self.normalised(image, size, settings.interpolation)
        grid = window_grid(*size, settings.crop or 0, settings.stride or 1)
        return _Prepared(pixels, grid, height, width)

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        settings = self.settings
        short_side = settings.short_side or 0
        if settings.resize == "square":
            return short_side, short_side
        if settings.resize == "short_side":
            return fitted_size(height, width, short_side, settings.max_long_side)
        return self.size_in_patches(height, width, settings.max_long_side)

    def _window_maps(
        self, prepared: Sequence[_Prepared], text: Tensor, query_class: Sequence[int], low_memory: bool
    ) -> list[Tensor]:
        """Patch scores [n, Q, h, w] of the windows of each image; windows of one shape go through together."""
        batch = self.window_batch(self.settings.window_batch, low_memory)
        by_shape: dict[tuple[int, int], list[int]] = defaultdict(list)
        for index, item in enumerate(prepared):
            by_shape[item.grid.shape].append(index)
        maps: dict[int, Tensor] = {}
        for shape, members in by_shape.items():
            size = self._padded(shape)
            windows = torch.cat([cut_windows(prepared[index].pixels, prepared[index].grid) for index in members])
            scores = torch.cat(
                [self.patch_scores(pad_windows(part, size), text, query_class) for part in torch.split(windows, batch)]
            )
            counts = [prepared[index].grid.count for index in members]
            maps.update(zip(members, torch.split(scores, counts), strict=True))
        return [maps[index] for index in range(len(prepared))]

    def _padded(self, shape: tuple[int, int]) -> tuple[int, int]:
        """The size that windows are padded to; an input below one patch is padded to one patch in any case."""
        patch = self.tower.patch_size
        multiple = patch if self.settings.pad == "patch" else self.settings.pad
        return padded_size(shape[0], multiple, patch), padded_size(shape[1], multiple, patch)

    def _full_resolution(self, item: _Prepared, maps: Tensor) -> ScoreField:
        padded = self._padded(item.grid.shape)
        rows = axis_matrix(item.grid.rows, maps.shape[-2], padded[0], item.height, self.device)
        columns = axis_matrix(item.grid.columns, maps.shape[-1], padded[1], item.width, self.device)
        field = ScoreField(tile_maps(maps, item.grid), rows, columns)
        if not self.settings.pamr:
            return field
        # PAMR looks across the whole map, so this is the one option that holds all scores at full resolution.
        size = (item.height, item.width)
        guide = F.interpolate(item.pixels[None], size, mode="bilinear", align_corners=False)[0]
        volume = field.strip(0, item.height)
        return ScoreField.of_volume(
            pamr(guide, volume, iterations=self.settings.pamr, dilations=self.settings.pamr_dilations)
        )

    def _rule(self, text: TextEmbeddings) -> LabelRule:
        vocabulary = text.vocabulary
        return LabelRule(
            query_class=vocabulary.query_class,
            logit_scale=self.settings.logit_scale,
            prob_thd=self.settings.prob_thd,
            area_thd=self.settings.area_thd,
            background=vocabulary.background,
            ignore_index=vocabulary.ignore_index,
        )


def cosine_scores(embeddings: Tensor, text: Tensor) -> Tensor:
    """Cosines in float32 of patch embeddings [B, h, w, E] with unit text rows [Q, E]: [B, Q, h, w]."""
    unit = F.normalize(embeddings.float(), dim=-1)
    return torch.einsum("bhwe,qe->bqhw", unit, text)
