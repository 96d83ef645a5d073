"""Labels, confidence and margin against a NumPy walk through the published steps on the whole volume."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax

from ovss_ray.ops.labelling import LabelRule, ScoreField, best_query, label_by_share, label_pixels

RULE = LabelRule(query_class=(0, 0, 1, 2, 2, 2, 3), logit_scale=12.0, background=0)


def reference(scores: np.ndarray, rule: LabelRule) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    probability = softmax(rule.logit_scale * scores.astype(np.float64), axis=0)
    query_class = np.array(rule.query_class)
    classes = np.stack([probability[query_class == c].max(0) for c in range(rule.num_classes)])
    if rule.area_thd:
        areas = np.bincount(classes.argmax(0).ravel(), minlength=rule.num_classes).astype(float)
        foreground = [c for c in range(rule.num_classes) if c != rule.background]
        for c in foreground:
            if areas[c] <= rule.area_thd * areas[foreground].sum():
                classes[c] = 0
    labels = classes.argmax(0)
    ranked = np.sort(classes, axis=0)
    confidence = ranked[-1]
    margin = ranked[-1] - ranked[-2] if len(ranked) > 1 else ranked[-1]
    fallback = rule.ignore_index if rule.background is None else rule.background
    labels = np.where(confidence < rule.prob_thd, fallback, labels)
    return labels, confidence, margin


def random_field(seed: int, queries: int, height: int, width: int) -> ScoreField:
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(queries, 4, 5, generator=generator) * 0.3
    rows, columns = torch.rand(height, 4, generator=generator), torch.rand(width, 5, generator=generator)
    return ScoreField(maps, rows / rows.sum(1, keepdim=True), columns / columns.sum(1, keepdim=True))


@pytest.mark.parametrize("background", [0, 2, None])
@pytest.mark.parametrize("prob_thd", [0.0, 0.4])
@pytest.mark.parametrize("area_thd", [0.0, 0.2])
def test_labels_follow_the_published_steps(background: int | None, prob_thd: float, area_thd: float) -> None:
    rule = dataclasses.replace(RULE, background=background, prob_thd=prob_thd, area_thd=area_thd)
    field = random_field(1, 7, 31, 17)
    got = label_pixels(field, rule, 1 << 20)
    labels, confidence, margin = reference(field.strip(0, 31).numpy(), rule)
    np.testing.assert_array_equal(got.labels.numpy(), labels)
    np.testing.assert_allclose(got.confidence.numpy(), confidence, atol=1e-5)
    np.testing.assert_allclose(got.margin.numpy(), margin, atol=1e-5)
    assert len(np.unique(labels)) > 1


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 23), st.integers(1, 3000))
def test_strips_equal_the_whole(seed: int, height: int, width: int, max_elements: int) -> None:
    rule = dataclasses.replace(RULE, area_thd=0.1, prob_thd=0.3)
    field = random_field(seed, 7, height, width)
    strips, whole = label_pixels(field, rule, max_elements), label_pixels(field, rule, 1 << 30)
    # Matrix products of other shapes may round differently, so pixels on a knife's edge may differ.
    torch.testing.assert_close(strips.confidence, whole.confidence, atol=1e-6, rtol=0)
    steady = (whole.margin > 1e-5) & ((whole.confidence - rule.prob_thd).abs() > 1e-5)
    assert torch.equal(strips.labels[steady], whole.labels[steady])


def test_a_class_of_exactly_the_area_threshold_is_struck_out() -> None:
    scores = torch.zeros(3, 1, 12)
    scores[0, 0, :2], scores[1, 0, 2:11], scores[2, 0, 11] = 1.0, 1.0, 1.0
    scores[1, 0, 11] = 0.5
    rule = LabelRule((0, 1, 2), 10.0, area_thd=0.1, background=0)
    got = label_pixels(ScoreField.of_volume(scores), rule, 99)
    assert got.labels.tolist() == [[0] * 2 + [1] * 10]
    kept = label_pixels(ScoreField.of_volume(scores), dataclasses.replace(rule, area_thd=0.09), 99)
    assert kept.labels[0, 11] == 2


def test_a_strip_never_holds_more_than_it_may() -> None:
    field = random_field(0, 7, 50, 20)
    parts = list(field.strips(max_elements=7 * 20 * 3))
    assert [top for top, _ in parts] == list(range(0, 50, 3))
    assert max(scores.numel() for _, scores in parts) == 7 * 20 * 3
    torch.testing.assert_close(torch.cat([scores for _, scores in parts], 1), field.strip(0, 50))


def test_a_computed_volume_is_labelled_alike() -> None:
    field = random_field(3, 7, 12, 9)
    volume = ScoreField.of_volume(field.strip(0, 12))
    assert volume.shape == (12, 9)
    assert torch.equal(label_pixels(volume, RULE, 200).labels, label_pixels(field, RULE, 1 << 20).labels)


def test_one_class_is_certain_everywhere() -> None:
    got = label_pixels(random_field(0, 1, 5, 6), LabelRule((0,), 40.0), 1 << 20)
    assert got.labels.unique().tolist() == [0]
    torch.testing.assert_close(got.confidence, torch.ones(5, 6))
    torch.testing.assert_close(got.margin, torch.ones(5, 6))


def test_more_than_255_classes_keep_their_ids() -> None:
    maps = torch.zeros(300, 1, 3)
    maps[[7, 255, 299], 0, [0, 1, 2]] = 1.0
    field = ScoreField(maps, torch.ones(2, 1), torch.eye(3))
    got = label_pixels(field, LabelRule(tuple(range(300)), 40.0, ignore_index=65535), 1 << 20)
    assert got.labels.tolist() == [[7, 255, 299]] * 2


def test_the_best_query_of_each_class() -> None:
    scores = torch.tensor([[1.0], [5.0], [2.0], [0.0]])
    assert best_query(scores, (0, 0, 1, 2)).tolist() == [[5.0], [2.0], [0.0]]
    assert best_query(scores, (0, 1, 2, 3)) is scores


def test_repeating_a_query_lowers_every_other_probability() -> None:
    """The softmax runs over queries, so synonyms dilute: documented behaviour, not to be deduplicated away."""
    once = ScoreField.of_volume(torch.tensor([[[0.5]], [[0.4]]]))
    twice = ScoreField.of_volume(torch.tensor([[[0.5]], [[0.4]], [[0.4]]]))
    confidence = label_pixels(once, LabelRule((0, 1), 10.0), 99).confidence
    diluted = label_pixels(twice, LabelRule((0, 1, 1), 10.0), 99).confidence
    assert diluted.item() < confidence.item()


@pytest.mark.parametrize("background", [None, 9])
@pytest.mark.parametrize("max_elements", [1, 1 << 20])
def test_the_largest_share_of_scores_wins(background: int | None, max_elements: int, rng) -> None:
    volume = rng.random((3, 6, 7)).astype(np.float32)
    got = label_by_share(ScoreField.of_volume(torch.from_numpy(volume)), (4, 300, 2), max_elements, background)
    for row in range(6):
        for column in range(7):
            scores = dict(zip((4, 300, 2), volume[:, row, column].tolist(), strict=True))
            if background is not None:
                scores[background] = 1 - max(scores.values())
            second, first = sorted(scores.values())[-2:]
            assert got.labels[row, column] == max(scores, key=scores.__getitem__)
            assert float(got.confidence[row, column]) == pytest.approx(first / sum(scores.values()), rel=1e-5)
            assert float(got.margin[row, column]) == pytest.approx((first - second) / sum(scores.values()), abs=1e-6)


def test_pixels_without_any_score_are_shared_equally_or_background() -> None:
    nothing = ScoreField.of_volume(torch.zeros(2, 1, 3))
    shared, ground = label_by_share(nothing, (5, 6), 99), label_by_share(nothing, (5, 6), 99, background=0)
    assert (shared.confidence.tolist(), shared.margin.tolist()) == ([[0.5] * 3], [[0.0] * 3])
    assert (ground.labels.tolist(), ground.confidence.tolist()) == ([[0, 0, 0]], [[1.0, 1.0, 1.0]])
    alone = label_by_share(ScoreField.of_volume(torch.zeros(1, 1, 1)), (7,), 99)
    assert (alone.labels.item(), alone.confidence.item(), alone.margin.item()) == (7, 1.0, 1.0)
