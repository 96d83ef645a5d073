"""Closing of label maps against SciPy's, and what it does to pixels without a label."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import ndimage

from ovss_ray.ops.morphology import close_labels

IDS = arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)), elements=st.integers(0, 4))


def closed(labels: np.ndarray, ignore_index: int = 255) -> np.ndarray:
    return close_labels(torch.from_numpy(labels), ignore_index).numpy()


@given(IDS)
def test_it_is_grey_level_closing(labels: np.ndarray) -> None:
    outside_is_ignored = ndimage.grey_closing(labels, size=(3, 3), mode="nearest")
    assert np.array_equal(closed(labels), outside_is_ignored)


@given(IDS)
def test_unlabelled_pixels_count_as_an_id_below_all_others(labels: np.ndarray) -> None:
    unlabelled = np.where(labels == 0, 255, labels)
    result = closed(unlabelled)
    assert np.array_equal(np.where(result == 255, 0, result), closed(labels))


@given(IDS)
def test_labels_only_grow_stay_labelled_and_settle_at_once(labels: np.ndarray) -> None:
    unlabelled = np.where(labels == 4, 255, labels)
    result = closed(unlabelled)
    labelled = unlabelled != 255
    assert (result[labelled] != 255).all()
    assert (result[labelled] >= unlabelled[labelled]).all()
    assert np.array_equal(closed(result), result)


def test_gaps_close_where_no_square_fits_and_larger_ones_stay() -> None:
    labels = np.full((20, 20), 7, np.int32)
    labels[5:7, 2:12] = 255
    labels[10:13, 5:9] = 255
    labels[15, 15] = 3
    expected = np.full((20, 20), 7, np.int32)
    expected[10:13, 5:9] = 255
    assert np.array_equal(closed(labels), expected)


@pytest.mark.parametrize("ignore_index", [255, 65535])
def test_the_type_is_kept_and_all_of_its_range_is_exact(ignore_index: int) -> None:
    labels = torch.arange(ignore_index - 3, ignore_index + 1, dtype=torch.int32).repeat(4, 1)
    result = close_labels(labels, ignore_index)
    assert result.dtype == torch.int32
    assert result.max() == ignore_index - 1
    assert torch.equal(close_labels(torch.full((3, 4), ignore_index), ignore_index), torch.full((3, 4), ignore_index))
