"""From score maps to labels: synonyms, area rule, background threshold, in strips at full image resolution."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ScoreField:
    """Cosine scores of every query at every pixel, kept as the product `rows @ maps @ columns.T`.

    maps: [Q, a, b]; rows: [H, a]; columns: [W, b]. Any rows of the image can be computed with the coordinates of the
    whole image, so the Q x H x W volume need not exist.
    """

    maps: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.rows.shape[0], self.columns.shape[0]

    def strip(self, top: int, bottom: int) -> Tensor:
        """The scores [Q, bottom - top, W] of some image rows."""
        vertical = torch.matmul(self.rows[top:bottom], self.maps)
        return torch.matmul(vertical, self.columns.T)

    def strips(self, max_elements: int) -> Iterator[tuple[int, Tensor]]:
        """All rows from top to bottom as (first row, scores); a strip has at most `max_elements` scores, or one row."""
        height, width = self.shape
        step = max(1, max_elements // (self.maps.shape[0] * width))
        for top in range(0, height, step):
            yield top, self.strip(top, min(top + step, height))

    @classmethod
    def of_volume(cls, scores: Tensor) -> ScoreField:
        """Wraps scores [Q, H, W] that were computed for every pixel."""
        return _Volume(scores, scores.new_empty(scores.shape[1], 0), scores.new_empty(scores.shape[2], 0))


class _Volume(ScoreField):
    def strip(self, top: int, bottom: int) -> Tensor:
        return self.maps[:, top:bottom]


@dataclass(frozen=True)
class LabelRule:
    """How class scores become labels.

    query_class: class id of every query, never decreasing. logit_scale: factor before the softmax over all queries.
    prob_thd: pixels whose best class probability is below get `background`, or `ignore_index` where that is None.
    area_thd: foreground classes whose share of the foreground pixels is not above it are struck out (0: no rule).
    """

    query_class: tuple[int, ...]
    logit_scale: float
    prob_thd: float = 0.0
    area_thd: float = 0.0
    background: int | None = None
    ignore_index: int = 255

    @property
    def num_classes(self) -> int:
        return self.query_class[-1] + 1


@dataclass(frozen=True)
class LabelledPixels:
    """labels [H, W] int32; confidence [H, W] and margin [H, W] float32 in 0..1.

    Confidence is the probability of the best class, before the threshold is applied; margin is its lead over the
    second best class (over 0 where there is one class only).
    """

    labels: Tensor
    confidence: Tensor
    margin: Tensor


def label_pixels(field: ScoreField, rule: LabelRule, max_elements: int) -> LabelledPixels:
    """Labels every pixel: softmax over all queries, the best query of each class, area rule, argmax, threshold.

    Args:
        field: cosine scores.
        rule: see `LabelRule`.
        max_elements: scores held at one time; bounds memory, does not change the result.
    """
    height, width = field.shape
    struck = _struck_classes(field, rule, max_elements) if rule.area_thd > 0 else None
    device = field.maps.device
    labels = torch.empty(height, width, dtype=torch.int32, device=device)
    confidence = torch.empty(height, width, dtype=torch.float32, device=device)
    margin = torch.empty(height, width, dtype=torch.float32, device=device)
    fallback = rule.ignore_index if rule.background is None else rule.background
    for top, scores in field.strips(max_elements):
        best, first, second = top_two(scores, rule, struck)
        if rule.prob_thd > 0:
            best = best.masked_fill(first < rule.prob_thd, fallback)
        rows = slice(top, top + scores.shape[1])
        labels[rows] = best.int()
        confidence[rows] = first
        margin[rows] = first - second
    return LabelledPixels(labels, confidence, margin)


def top_two(scores: Tensor, rule: LabelRule, struck: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The best class and the probabilities of the best and the second best one.

    A class's probability is the largest of its queries' probabilities; the softmax runs over all queries, so that
    class probabilities need not sum to 1.

    Args:
        scores: [Q, h, w] cosines.
        struck: [C] bool, classes whose probability counts as 0.

    Returns:
        class ids [h, w] int64, first and second probability [h, w] float32.
    """
    logits = scores.float() * rule.logit_scale
    total = logits.logsumexp(0)
    classes = best_query(logits, rule.query_class)
    if struck is not None:
        classes = classes.masked_fill(struck[:, None, None], -torch.inf)
    first, best = classes.max(0)
    if len(classes) == 1:
        return best, (first - total).exp(), torch.zeros_like(first)
    second = classes.scatter(0, best[None], -torch.inf).amax(0)
    return best, (first - total).exp(), (second - total).exp()


def best_query(scores: Tensor, query_class: Sequence[int]) -> Tensor:
    """The largest score of each class: [Q, ...] to [C, ...]. Softmax keeps order, so this may come before or after."""
    counts = torch.bincount(torch.as_tensor(query_class)).tolist()
    if len(counts) == len(query_class):
        return scores
    return torch.stack([group.amax(0) if len(group) > 1 else group[0] for group in torch.split(scores, counts)])


def _struck_classes(field: ScoreField, rule: LabelRule, max_elements: int) -> Tensor:
    """Area rule of SCLIP: foreground classes whose argmax pixels are at most `area_thd` of all foreground pixels."""
    areas = torch.zeros(rule.num_classes, dtype=torch.int64, device=field.maps.device)
    for _, scores in field.strips(max_elements):
        best = best_query(scores, rule.query_class).argmax(0)
        areas += torch.bincount(best.flatten(), minlength=rule.num_classes)
    foreground = torch.ones_like(areas, dtype=torch.bool)
    if rule.background is not None:
        foreground[rule.background] = False
    return foreground & (areas <= rule.area_thd * areas[foreground].sum())


def label_by_share(
    field: ScoreField, class_ids: Sequence[int], max_elements: int, background: int | None = None
) -> LabelledPixels:
    """Labels every pixel with the class whose score is largest, for scores that are no probabilities.

    Confidence is the best score's share of the sum of all scores (of a sum of 0, an equal share), margin its lead over
    the second best share.

    Args:
        field: [K] maps of scores, not negative.
        class_ids: the class of each map.
        max_elements: scores held at one time; bounds memory, does not change the result.
        background: a class whose score is 1 minus the largest of the others; None for no such class.
    """
    height, width = field.shape
    labels = torch.empty(height, width, dtype=torch.int32, device=field.maps.device)
    confidence = torch.empty(height, width, device=field.maps.device)
    margin = torch.empty_like(confidence)
    ids = torch.tensor([*([] if background is None else [background]), *class_ids], device=field.maps.device)
    for top, scores in field.strips(max_elements):
        if background is not None:
            scores = torch.cat([1 - scores.amax(0, keepdim=True), scores])
        total = scores.sum(0)
        shares = torch.where(total > 0, scores / total, 1 / len(scores))
        rows = slice(top, top + scores.shape[1])
        best = shares.argmax(0)
        first = shares.amax(0)
        second = shares.scatter(0, best[None], 0).amax(0)
        labels[rows], confidence[rows], margin[rows] = ids[best].int(), first, first - second
    return LabelledPixels(labels, confidence, margin)
