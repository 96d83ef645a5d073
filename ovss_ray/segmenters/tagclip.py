"""TagCLIP: finds out which classes an image holds, then where those are (CLS-SEG, with CLIP-ES).

Lin et al., "TagCLIP: A Local-to-Global Framework to Enhance Open-Vocabulary Multi-Label Classification of CLIP Without
Training" (AAAI 2024), linyq2117/TagCLIP; its masks are those of "CLIP is Also an Efficient Segmenter: A Text-Driven
Approach for Weakly Supervised Semantic Segmentation" (CVPR 2023), linyq2117/CLIP-ES. Whole images go through, at their
own size.

A. Patches keep their own value in the last block, as in MaskCLIP; softmax over classes and background names.
B. Each class's scores spread along CLIP's own attention where enough blocks agree on it, from the boxes where the class
   is strong; an image scores a class by its best patch.
C. Every class that stands out is looked at again: a crop of its box, whose class token sees only its patches. Score and
   second look are averaged; classes above a relative threshold are the image's tags.
D. Grad-CAM for each tag, against the other tags and the background names, spread along attention; the background gets
   what the best tag leaves over.

Cost: one pass of CLIP and one of a crop per class that stands out, then the last block forward, and backward per tag.
Attention maps are held in full, so memory grows with the fourth power of the image's side: `max_long_side` shrinks
larger images (the authors' have 500 pixels at most).

The authors' code knows ViT-B/16 and three data sets (`variant`). Here blocks follow the model, and a third of all have
to agree. A class's probability is the largest of its queries' in A to C (they have one query a class); D has one text a
class, the authors' own where the class's name is theirs, else its first query. Images of one patch, or of one row of
patches, make their code fail; here one patch keeps its scores, and a single row counts as inside. Their masks are
stored in half precision, and vanish where a class is as good as certain; not here (see `VisionTail.grad_cam`). Their
CRF is left out: its package is no longer maintained. `dense` skips D and labels by the scores of B; it is not part of
the paper. Confidence is a class's share of all scores at a pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor
from typing_extensions import Self

from ovss_ray.errors import SettingError
from ovss_ray.models.clip import ClipModel
from ovss_ray.models.tail import VisionTail
from ovss_ray.models.vision import TowerShape, Trunk
from ovss_ray.ops.affinity import patch_attention, symmetric_transition, votes_and_means
from ovss_ray.ops.attention import attend
from ovss_ray.ops.boxes import high_boxes, min_max
from ovss_ray.ops.labelling import LabelledPixels, ScoreField, best_query, label_by_share
from ovss_ray.ops.positional import PositionalPolicy
from ovss_ray.ops.resize import bilinear_matrix
from ovss_ray.segmenters.base import Image, SegmenterSettings
from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.clip_segmenter import LOW_MEMORY_DIVISOR, ClipSegmenter
from ovss_ray.segmenters.results import Segmentation, TextEmbeddings
from ovss_ray.vocabularies.clip_es import CAM_NAMES, CAM_TEMPLATE, COCO_BACKGROUND, VOC_BACKGROUND
from ovss_ray.vocabulary import Vocabulary, VocabularyClass

_CAM_EPS = 1e-7
_HIDDEN = -1000.0
_MAP_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class _Published:
    """What the authors' code has per data set; blocks of 12."""

    smoothing_blocks: Sequence[int]
    tag_thd: float
    cam_blocks: Sequence[int]
    cam_box_thd: float
    background_names: tuple[str, ...]


_PUBLISHED = {
    "voc": _Published(range(8, 11), 0.5, range(4, 11), 0.4, VOC_BACKGROUND),
    "coco": _Published(range(8, 11), 0.5, range(4, 12), 0.7, COCO_BACKGROUND),
    "stuff": _Published(range(11), 0.1, range(4, 12), 0.7, ()),
}


class TagCLIPSettings(SegmenterSettings):
    """Settings of TagCLIP; None follows the variant and the model."""

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset({"window_batch"})

    variant: Literal["voc", "coco", "stuff"] = Field(
        default="voc", description="Which data set's published values to take; stuff is for vocabularies full of stuff."
    )
    max_long_side: int = Field(default=1024, ge=16, le=4096, description="Larger images are shrunk to this long side.")
    logit_scale: float = Field(default=100.0, gt=0, description="Factor on the cosines before every softmax.")
    smoothing_blocks: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="Blocks whose attention spreads the scores; 8 to 10, for stuff 0 to 10."
    )
    votes: int | None = Field(
        default=None, ge=0, description="Blocks that must agree before scores spread; a third of all."
    )
    tag_thd: float | None = Field(
        default=None, ge=0, lt=1, description="Relative score above which a class is a tag; 0.5, for stuff 0.1."
    )
    cam_blocks: tuple[int, ...] | None = Field(
        default=None, min_length=1, description="Blocks whose attention spreads the masks; 4 to 11, for voc 4 to 10."
    )
    cam_box_thd: float | None = Field(
        default=None, ge=0, lt=1, description="Relative height above which a mask is boxed; 0.7, for voc 0.4."
    )
    background_names: Literal["auto"] | tuple[str, ...] = Field(
        default="auto",
        description="Names of what is no class: auto is the variant's list for a vocabulary with a background class, "
        "and none for others.",
    )
    dense: bool = Field(default=False, description="Label by patch scores instead of Grad-CAM: cheaper, unpublished.")
    window_batch: int | None = Field(
        default=None, ge=1, description="Crops in one forward pass, 128 on CUDA and 16 on a CPU; changes no label."
    )

    def resolve(self, shape: TowerShape) -> Self:
        """Fills in what follows the variant and the model; `SettingError` for blocks that the model has not."""
        published = _PUBLISHED[self.variant]
        filled = {
            "smoothing_blocks": self.smoothing_blocks or _blocks_like(published.smoothing_blocks, shape),
            "votes": max(1, round(shape.depth / 3)) if self.votes is None else self.votes,
            "tag_thd": published.tag_thd if self.tag_thd is None else self.tag_thd,
            "cam_blocks": self.cam_blocks or _blocks_like(published.cam_blocks, shape),
            "cam_box_thd": published.cam_box_thd if self.cam_box_thd is None else self.cam_box_thd,
        }
        resolved = self.model_copy(update=filled)
        for name in ("smoothing_blocks", "cam_blocks"):
            blocks = getattr(resolved, name)
            if not 0 <= min(blocks) <= max(blocks) < shape.depth:
                raise SettingError(f"{name} = {list(blocks)}: the model has blocks 0 to {shape.depth - 1}")
        if (resolved.votes or 0) > shape.depth:
            raise SettingError(f"votes = {resolved.votes}: the model has {shape.depth} blocks, so none would ever win")
        return resolved

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        if vocabulary.num_classes == 1 and vocabulary.background is not None:
            raise SettingError(f"the vocabulary '{vocabulary.name}' has a background and nothing else; name a class")

    def background_of(self, vocabulary: Vocabulary) -> tuple[str, ...]:
        """The names that compete with a vocabulary's classes."""
        if self.background_names != "auto":
            return self.background_names
        return () if vocabulary.background is None else _PUBLISHED[self.variant].background_names

    def with_all_texts(self, vocabulary: Vocabulary) -> Vocabulary:
        names = (*self.background_of(vocabulary), *cam_texts(vocabulary))
        more = (VocabularyClass(vocabulary.num_classes + i, name, (name,), (0, 0, 0)) for i, name in enumerate(names))
        templates = (*vocabulary.templates, CAM_TEMPLATE)
        return replace(vocabulary, classes=(*vocabulary.classes, *more), templates=templates)


def _blocks_like(published: Sequence[int], shape: TowerShape) -> tuple[int, ...]:
    """These blocks of 12 in another model; the last one only where it was among them."""
    blocks = shape.blocks_like(published)
    if published[-1] == 11 or shape.depth == 1:
        return blocks
    return tuple(sorted({min(block, shape.depth - 2) for block in blocks}))


def cam_texts(vocabulary: Vocabulary) -> tuple[str, ...]:
    """What stands for each class in stage D."""
    return tuple(CAM_NAMES.get(item.name.lower(), item.queries[0]) for item in vocabulary.classes)


@dataclass(frozen=True)
class _Texts:
    """An encoded vocabulary on the device.

    rows: [R, E] queries of the classes that can be tags, then background names. columns: for each of them its column of
    the scores, tags first. tags: class ids. cam_classes: [C, E]. cam_background: [b, E].
    """

    vocabulary: Vocabulary
    rows: Tensor
    columns: tuple[int, ...]
    tags: tuple[int, ...]
    cam_classes: Tensor
    cam_background: Tensor

    def probabilities(self, embeddings: Tensor, logit_scale: float) -> Tensor:
        """[n, E] to [n, tags and background names]: softmax over all rows, then the best query of each class."""
        cosines = F.normalize(embeddings.float(), dim=-1) @ self.rows.T
        return best_query((logit_scale * cosines).softmax(-1).T, self.columns).T


@dataclass(frozen=True)
class _View:
    """An image as the tower saw it, with the attention of its n patches: both affinities are [n, n]."""

    trunk: Trunk
    smoothing: Tensor
    cam_affinity: Tensor


class TagCLIP(ClipSegmenter):
    """Tags from dense scores and a second look, then Grad-CAM masks of the tags."""

    name = "tagclip"
    Settings: ClassVar[type[SegmenterSettings]] = TagCLIPSettings
    settings: TagCLIPSettings
    card = MethodCard(
        title="TagCLIP",
        paper="TagCLIP: A Local-to-Global Framework to Enhance Open-Vocabulary Multi-Label Classification of CLIP "
        "Without Training",
        venue="AAAI 2024",
        repository="linyq2117/TagCLIP",
        idea="Finds the classes of an image by dense scores and a second look at crops, then draws Grad-CAM masks.",
        models=("CLIP ViT",),
        passes_note="one of a crop per class that stands out; the last block forward, and backward per class found",
        published={"voc21": 64.8, "coco_object": 33.5, "coco_stuff": 18.7},
        published_source="ITACLIP paper, as quoted by the survey of training-free methods, table 1",
    )

    def __init__(self, clip: ClipModel, settings: TagCLIPSettings) -> None:
        super().__init__(clip, settings)
        self._tail = VisionTail(self.tower)

    @torch.inference_mode()
    def encode_vocabulary(self, vocabulary: Vocabulary) -> TextEmbeddings:
        text = super().encode_vocabulary(vocabulary)
        names = self.settings.background_of(vocabulary)
        extra = {
            "cam_classes": self._encode(cam_texts(vocabulary), (CAM_TEMPLATE,)),
            "cam_background": self._encode(names or ("background",), (CAM_TEMPLATE,)),
        }
        if names:
            extra["background"] = self._encode(names, vocabulary.templates)
        return replace(text, extra=extra)

    def _encode(self, queries: Sequence[str], templates: Sequence[str]) -> np.ndarray:
        return self.clip.text.encode(queries, templates).cpu().numpy().astype(np.float32)

    def patch_embeddings(self, pixels: Tensor) -> Tensor:
        """Stage A's embeddings [B, h, w, E] of normalised images [B, 3, H, W]; not L2-normalised."""
        return self._patch_embeddings(self.tower.trunk(pixels, self._positional(pixels)))

    def _patch_embeddings(self, trunk: Trunk) -> Tensor:
        _, _, values = self.tower.qkv(trunk.tokens, -1)
        tokens = self.tower.readout(trunk.tokens, -1, values, residual=True, mlp=True)
        return self.tower.patch_map(self.tower.head(tokens), trunk.grid)

    def _positional(self, pixels: Tensor) -> PositionalPolicy:
        native = self.tower.grid_of(*pixels.shape[-2:]) == self.tower.native_grid
        return "bilinear" if native else "bilinear_half"

    @torch.inference_mode()
    def segment_batch(self, images: Sequence[Image], text: TextEmbeddings, *, low_memory: bool) -> list[Segmentation]:
        self.settings.check_vocabulary(text.vocabulary)
        texts = self._texts(text)
        return [self.segmentation(self._label(image, texts, low_memory), text.vocabulary) for image in images]

    def _label(self, image: Image, texts: _Texts, low_memory: bool) -> LabelledPixels:
        height, width = image.shape[:2]
        size = self.size_in_patches(height, width, self.settings.max_long_side)
        pixels = self.normalised(image, size, "bicubic")[None]
        view = self._look(pixels, self._positional(pixels), low_memory)
        embeddings = self._patch_embeddings(view.trunk)[0].flatten(0, 1)
        scores = refine(texts.probabilities(embeddings, self.settings.logit_scale), view.smoothing, view.trunk.grid)
        found = self._find_tags(pixels, scores, view.trunk.grid, texts, low_memory)
        if self.settings.dense:
            background = None
            maps, classes = _dense_maps(scores, found, texts)
        else:
            if self._positional(pixels) != "bilinear_half":
                view = self._look(pixels, "bilinear_half", low_memory)  # stage D rounds on the native grid, too
            background = texts.vocabulary.background
            classes = [texts.tags[tag] for tag in found]
            maps = self._cams(view, classes, texts)
        rows, columns = (
            bilinear_matrix(*lengths).float().to(self.device)
            for lengths in zip(view.trunk.grid, (height, width), strict=True)
        )
        field = ScoreField(maps.view(-1, *view.trunk.grid), rows, columns)
        return label_by_share(field, classes, self.strip_scores(low_memory), background)

    def _look(self, pixels: Tensor, positional: PositionalPolicy, low_memory: bool) -> _View:
        """Runs the tower up to its last block, and sums up the attention maps of all blocks."""
        settings, last = self.settings, self.tower.depth - 1
        trunk = self.tower.trunk(pixels, positional, queries_keys=range(last))
        pairs = [*trunk.queries_keys.values(), self.tower.qkv(trunk.tokens, -1)[:2]]
        held = _MAP_ELEMENTS // (LOW_MEMORY_DIVISOR if low_memory else 1)
        maps = (patch_attention(queries[0], keys[0], held) for queries, keys in pairs)
        votes, (smoothing, cam) = votes_and_means(maps, (settings.smoothing_blocks or (), settings.cam_blocks or ()))
        return _View(trunk, smoothing * (votes >= (settings.votes or 0)), cam)

    def _find_tags(
        self, pixels: Tensor, scores: Tensor, grid: tuple[int, int], texts: _Texts, low_memory: bool
    ) -> list[int]:
        """Stage C: the columns of the classes that the image holds, at least one.

        Every class that stands out in the scores [n, columns] is looked at again in a crop. As in the authors' code, a
        class without a region ends the second look, for those after it as well.
        """
        level = scores[:, : len(texts.tags)].amax(0)
        standing_out = (level > self._relative_threshold(scores)).nonzero()[:, 0].tolist()
        masks = (min_max(scores.T[standing_out].view(-1, *grid)) > 0.5).cpu()
        patch, side = self.tower.patch_size, self.tower.image_size
        crops, inside = [], []
        for mask in masks:
            box = tight_box(mask)
            if box is None:
                break
            top, bottom, left, right = box
            crop = pixels[..., patch * top : patch * bottom, patch * left : patch * right]
            crops.append(F.interpolate(crop, (side, side), mode="bilinear", align_corners=False))
            part = mask[None, None, top:bottom, left:right].float()
            inside.append(F.interpolate(part, self.tower.native_grid, mode="nearest").flatten(1) > 0)
        if crops:
            looked_at = standing_out[: len(crops)]
            embeddings = self._look_again(torch.cat(crops), torch.cat(inside).to(self.device), low_memory)
            seen = texts.probabilities(embeddings, self.settings.logit_scale)[range(len(crops)), looked_at]
            level[looked_at] = (level[looked_at] + seen) / 2
        tags: list[int] = (level > self._relative_threshold(level)).nonzero()[:, 0].tolist()
        return tags or [int(level.argmax())]

    def _relative_threshold(self, scores: Tensor) -> Tensor:
        low, high = scores.aminmax()
        return low + (self.settings.tag_thd or 0.0) * (high - low)

    def _look_again(self, crops: Tensor, inside: Tensor, low_memory: bool) -> Tensor:
        """The class token's embedding [K, E] of crops [K, 3, S, S], which sees no patches but those inside [K, n]."""
        batch = self.window_batch(self.settings.window_batch, low_memory)
        parts = []
        for pixels, visible in zip(torch.split(crops, batch), torch.split(inside, batch), strict=True):
            tokens = self.tower.embed(pixels, "bilinear")
            bias = torch.zeros(len(tokens), 1, tokens.shape[1], tokens.shape[1], device=tokens.device)
            bias[:, 0, 0, 1:].masked_fill_(~visible, _HIDDEN)
            for index in range(self.tower.depth):
                mixed = attend(*self.tower.qkv(tokens, index), bias=bias)
                tokens = self.tower.readout(tokens, index, mixed, residual=True, mlp=True)
            parts.append(self.tower.head(tokens[:, 0]))
        return torch.cat(parts)

    def _cams(self, view: _View, classes: Sequence[int], texts: _Texts) -> Tensor:
        """Stage D: a map in 0..1 for each class id, [K, n]."""
        text = torch.cat([texts.cam_classes[classes], texts.cam_background])
        raw = self._tail.grad_cam(view.trunk.tokens[0], text, len(classes), self.settings.logit_scale)
        cams = min_max(min_max(raw, _CAM_EPS), _CAM_EPS)  # twice, as Grad-CAM's package does
        boxes = high_boxes(cams.view(-1, *view.trunk.grid), self.settings.cam_box_thd or 0.0).flatten(1)
        transition = symmetric_transition(view.cam_affinity)
        spread = transition @ (transition @ (boxes * cams).T)
        return min_max(spread.T, _CAM_EPS)

    def _texts(self, text: TextEmbeddings) -> _Texts:
        rows, vocabulary = self.text_on_device(text), text.vocabulary
        if "cam_classes" not in text.extra:
            raise SettingError("the text embeddings are those of another method; encode the vocabulary with this one")
        extra = {name: torch.from_numpy(values).to(self.device) for name, values in text.extra.items()}
        tags = tuple(item.id for item in vocabulary.classes if item.id != vocabulary.background)
        kept = [row for row, item in enumerate(vocabulary.query_class) if item != vocabulary.background]
        background = extra.get("background", rows[:0])
        columns = [tags.index(vocabulary.query_class[row]) for row in kept]
        columns += range(len(tags), len(tags) + len(background))
        return _Texts(
            vocabulary,
            torch.cat([rows[kept], background]),
            tuple(columns),
            tags,
            extra["cam_classes"],
            extra["cam_background"],
        )


def refine(scores: Tensor, affinity: Tensor, grid: tuple[int, int]) -> Tensor:
    """Stage B: spreads each class's scores [n, K] along the affinity [n, n], from the boxes where they are high.

    The boxes are those of the spread scores above their mean; what spreads from them are the scores themselves.
    """
    if len(scores) == 1:
        return scores  # a single patch has no other to learn from
    maps = min_max((affinity @ scores).T).view(-1, *grid)
    boxes = high_boxes(maps, maps.mean((1, 2))).flatten(1)
    return affinity @ (boxes.T * scores)


def tight_box(mask: Tensor) -> tuple[int, int, int, int] | None:
    """The box (top, bottom, left, right) around a mask [h, w], ends excluded; None if it is empty.

    As in the authors' code it ends before the last row and the last column, unless there is only one.
    """
    rows, columns = (mask.any(axis).nonzero()[:, 0].tolist() for axis in (1, 0))
    if not rows:
        return None
    bottom, right = (
        min(ends[-1] + 1, max(size - 1, 1)) for ends, size in zip((rows, columns), mask.shape, strict=True)
    )
    return (rows[0], bottom, columns[0], right) if rows[0] < bottom and columns[0] < right else None


def _dense_maps(scores: Tensor, found: Sequence[int], texts: _Texts) -> tuple[Tensor, list[int]]:
    """Stage B's maps of the tags [K, n] and their class ids; the background's is its best name's."""
    ids, maps = [texts.tags[tag] for tag in found], scores.T[found]
    names = scores.T[len(texts.tags) :]
    if texts.vocabulary.background is None or not len(names):
        return maps, ids
    return torch.cat([maps, names.amax(0, keepdim=True)]), [*ids, texts.vocabulary.background]
