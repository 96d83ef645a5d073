"""Confusion matrices against plain loops over pixels."""

from __future__ import annotations

import doctest
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ovss_ray.errors import SettingError
from ovss_ray.evaluation import ConfusionMatrix, confusion, confusion_counts
from ovss_ray.evaluation.confusion import split_score

NUM_CLASSES = 4
PREDICTIONS = st.sampled_from([-1, 0, 1, 2, 3, 4, 255])  # -1, 4 and 255 are no class
TRUTHS = st.sampled_from([0, 1, 2, 3, 255])


@st.composite
def pairs(draw: st.DrawFn) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=6))
    prediction = draw(hnp.arrays(np.int64, shape, elements=PREDICTIONS))
    return prediction, draw(hnp.arrays(np.uint8, shape, elements=TRUTHS))


def scores_by_loops(images: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]]) -> dict[str, object]:
    pixels = [
        (int(p), int(t)) for prediction, truth in images for p, t in zip(prediction.flat, truth.flat, strict=True)
    ]
    pixels = [(p, t) for p, t in pixels if t != 255]
    iou, accuracy, weighted = [], [], 0.0
    for c in range(NUM_CLASSES):
        both = sum(p == c and t == c for p, t in pixels)
        either = sum(p == c or t == c for p, t in pixels)
        true = sum(t == c for _, t in pixels)
        iou.append(both / either if either else math.nan)
        accuracy.append(both / true if true else math.nan)
        weighted += true * both / either if either else 0.0

    def mean(values: list[float]) -> float:
        finite = [value for value in values if not math.isnan(value)]
        return sum(finite) / len(finite) if finite else math.nan

    return {
        "class_iou": iou,
        "class_accuracy": accuracy,
        "miou": mean(iou),
        "mean_accuracy": mean(accuracy),
        "pixel_accuracy": sum(p == t for p, t in pixels) / len(pixels) if pixels else math.nan,
        "frequency_weighted_iou": weighted / len(pixels) if pixels else math.nan,
    }


def assert_scores(matrix: ConfusionMatrix, expected: dict[str, object]) -> None:
    for name, value in expected.items():
        assert getattr(matrix, name) == pytest.approx(value, nan_ok=True), name


@given(images=st.lists(pairs(), min_size=1, max_size=4))
def test_scores_are_those_of_loops_over_all_pixels(
    images: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]]],
) -> None:
    matrix = ConfusionMatrix(NUM_CLASSES)
    for prediction, truth in images:
        matrix.update(prediction, truth)
    assert_scores(matrix, scores_by_loops(images))


@given(first=pairs(), second=pairs())
def test_matrices_of_parts_add_up_to_that_of_the_whole(
    first: tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]],
    second: tuple[npt.NDArray[np.int64], npt.NDArray[np.uint8]],
) -> None:
    one, other, whole = (ConfusionMatrix(NUM_CLASSES) for _ in range(3))
    one.update(*first)
    other.update(*second)
    whole.update(*first)
    whole.update(*second)
    total = one + other
    np.testing.assert_array_equal(total.counts, whole.counts)
    assert total.counts.dtype == np.int64
    one.update(*second)
    assert total is not one
    np.testing.assert_array_equal(total.counts, whole.counts)


def test_a_class_that_is_only_predicted_has_iou_zero_and_one_that_is_absent_does_not_count() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(np.array([0, 0, 1]), np.array([0, 0, 0]))
    assert matrix.class_iou == pytest.approx([2 / 3, 0, math.nan], nan_ok=True)
    assert matrix.miou == pytest.approx(1 / 3)
    assert matrix.mean_accuracy == pytest.approx(2 / 3)


def test_no_prediction_is_a_miss_and_nobodys_false_positive() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(np.array([0, 255, 1, 255], np.uint8), np.array([0, 0, 1, 255], np.uint8))
    assert matrix.class_iou == pytest.approx([1 / 2, 1])
    np.testing.assert_array_equal(matrix.counts, [[1, 0, 1], [0, 1, 0]])


def test_counts_beyond_32_bits_stay_exact() -> None:
    matrix = ConfusionMatrix(1, counts=np.array([[2**40, 1]]))
    matrix.update(np.array([0]), np.array([0]))
    assert matrix.counts.tolist() == [[2**40 + 1, 1]]


def test_nothing_counted_is_nan_everywhere() -> None:
    matrix = ConfusionMatrix(2)
    matrix.update(np.array([[1]]), np.array([[255]]))
    assert_scores(matrix, scores_by_loops([]) | {"class_iou": [math.nan] * 2, "class_accuracy": [math.nan] * 2})


def test_another_ignore_index_leaves_255_a_class() -> None:
    counts = confusion_counts(np.array([255, 7]), np.array([255, 65535]), 300, ignore_index=65535)
    assert counts.sum() == counts[255, 255] == 1


@pytest.mark.parametrize("value", [-1, 4, 254])
def test_a_truth_that_is_no_class_is_refused(value: int) -> None:
    with pytest.raises(SettingError, match=f"value {value}, which is neither one of the 4 classes"):
        ConfusionMatrix(NUM_CLASSES).update(np.array([0, 0]), np.array([0, value]))


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        ConfusionMatrix(2).update(np.zeros((2, 3), np.uint8), np.zeros((3, 2), np.uint8))
    with pytest.raises(ValueError, match="cannot be added"):
        ConfusionMatrix(2) + ConfusionMatrix(3)
    with pytest.raises(ValueError, match="cannot be added"):
        ConfusionMatrix(2) + ConfusionMatrix(2, ignore_index=0)
    with pytest.raises(ValueError, match="shape"):
        ConfusionMatrix(2, counts=np.zeros((2, 2), np.int64))


def test_the_example_in_the_documentation_runs() -> None:
    assert doctest.testmod(confusion).failed == 0


@pytest.mark.parametrize("seed", range(5))
def test_iou_and_accuracy_are_those_of_torchmetrics(seed: int) -> None:
    import torch
    from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

    rng = np.random.default_rng(seed)
    truth = rng.choice([0, 1, 3, 255], size=(4, 30, 40)).astype(np.uint8)  # class 2 is never true
    prediction = np.where(rng.random(truth.shape) < 0.6, truth, rng.integers(0, NUM_CLASSES, truth.shape))
    prediction[prediction == 255] = 0
    matrix = ConfusionMatrix(NUM_CLASSES)
    for one, other in zip(prediction, truth, strict=True):
        matrix.update(one, other)
    pair = torch.from_numpy(prediction.astype(np.int64)), torch.from_numpy(truth.astype(np.int64))
    options = {"num_classes": NUM_CLASSES, "ignore_index": 255}
    assert float(MulticlassJaccardIndex(**options, average="macro")(*pair)) == pytest.approx(matrix.miou, abs=1e-6)
    per_class = MulticlassJaccardIndex(**options, average=None)(*pair)
    np.testing.assert_allclose(per_class.numpy(), matrix.class_iou, atol=1e-6)
    micro = MulticlassAccuracy(**options, average="micro")(*pair)
    assert float(micro) == pytest.approx(matrix.pixel_accuracy, abs=1e-6)


def test_classes_that_are_only_predicted_count_for_one_mean_and_not_for_the_other() -> None:
    matrix = ConfusionMatrix(3)
    matrix.update(np.array([0, 0, 1, 2]), np.array([0, 0, 0, 0]))
    assert matrix.class_iou.tolist() == [0.5, 0, 0]
    assert matrix.miou == pytest.approx(0.5 / 3)
    assert matrix.miou_of_true_classes == 0.5


def test_seen_and_unseen_classes_are_averaged_apart() -> None:
    score = split_score(np.array([0.6, 0.2, math.nan, 0.4]), seen={0, 3})
    assert (score.seen, score.unseen) == pytest.approx((0.5, 0.2))
    assert score.harmonic == pytest.approx(2 / (1 / 0.5 + 1 / 0.2))
    assert split_score(np.zeros(2), seen={0}).harmonic == 0
