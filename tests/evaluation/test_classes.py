"""Classes of a run and of a ground truth, matched by name."""

from __future__ import annotations

import numpy as np
import pytest

from ovss_ray.errors import SettingError
from ovss_ray.evaluation.classes import class_ids, match_classes, mixed_up
from ovss_ray.vocabulary import load_vocabulary, shipped_vocabularies


@pytest.mark.parametrize("name", shipped_vocabularies())
def test_the_same_list_is_the_identity_though_it_has_names_twice(name: str) -> None:
    vocabulary = load_vocabulary(name)
    match = match_classes(vocabulary, vocabulary)
    count = vocabulary.num_classes
    assert match.lookup[:count].tolist() == list(range(count))
    assert set(match.lookup[count:].tolist()) == {count}
    assert list(match.warnings()) == []


def test_another_order_is_mapped() -> None:
    match = match_classes(load_vocabulary(["dog", "Night_Sky", "cat"]), load_vocabulary(["cat", "dog", "night sky"]))
    assert match.apply(np.array([[0, 1, 2, 255, 3]], np.uint8)).tolist() == [[1, 2, 0, 3, 3]]
    assert list(match.warnings()) == []


def test_classes_that_only_one_has_are_told() -> None:
    match = match_classes(load_vocabulary(["dog", "cow"]), load_vocabulary(["cat", "dog", "bird"]))
    assert match.apply(np.array([[0, 1, 255]], np.uint8)).tolist() == [[1, 3, 3]]
    foreign, absent = match.warnings()
    assert foreign.startswith("the ground truth lacks cow of the run")
    assert absent.startswith("the run never had cat, bird of the ground truth")


def test_a_large_vocabulary_meets_a_small_one() -> None:
    many = load_vocabulary([f"class {index}" for index in range(300)])
    match = match_classes(many, load_vocabulary(["class 299", "class 7"]))
    assert match.apply(np.array([[299, 7, 8, 65535]], np.uint16)).tolist() == [[0, 1, 2, 2]]
    assert "class 0, class 1, class 2, class 3, class 4, class 5, class 6, class 8 and 290 more" in next(
        match.warnings()
    )


def test_nothing_in_common_is_an_error() -> None:
    with pytest.raises(SettingError, match="has no class of the ground truth voc20: it was labelled with river, lake"):
        match_classes(load_vocabulary(["river", "lake"]), load_vocabulary("voc20"))


def test_named_classes_are_found_and_misspelt_ones_told() -> None:
    truth = load_vocabulary(["river bank", "dog", "cat"])
    assert class_ids(["cat", "River-Bank"], truth, "seen") == (0, 2)
    twice = load_vocabulary("ade847")
    assert [twice.names[class_id] for class_id in class_ids(["basket"], twice, "seen")] == ["basket", "basket"]
    with pytest.raises(SettingError, match="seen: custom has no class 'doog'; did you mean 'dog'"):
        class_ids(["doog"], truth, "seen")


@pytest.mark.parametrize(
    ("order", "said"),
    [
        ([0, 1, 3, 2], "(c as d, d as c)"),  # two lines of the list changed places
        ([0, 2, 3, 1], "(b as c, c as d, d as b)"),
        ([1, 2, 3, 4], "(a as b, b as c)"),  # all values are one too low, and d has no label
    ],
)
def test_lists_in_another_order_are_noticed(order: list[int], said: str) -> None:
    counts = np.full((4, 5), 10)
    counts[np.arange(4), order] = 100
    found = mixed_up(counts, "abcd")
    assert found is not None
    assert said in found


def test_poor_labels_are_no_mixed_up_list() -> None:
    names = "abcd"
    right = np.eye(4, 5, dtype=int) * 100 + 10
    one_for_all = np.zeros((4, 5), int)
    one_for_all[:, 2] = 100
    one_taken_for_another = right.copy()
    one_taken_for_another[0, 1] = 900
    chain_of_three = one_taken_for_another.copy()
    chain_of_three[1, 2] = 900
    evenly = np.full((4, 5), 10)
    absent = np.zeros((4, 5), int)
    for counts in (right, one_for_all, one_taken_for_another, chain_of_three, evenly, absent):
        assert mixed_up(counts, names) is None
