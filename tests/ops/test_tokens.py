"""Operations on patch tokens against loops over patches, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from ovss_ray.ops.tokens import aggregate, cosine_similarities, find_anomalies, local_outlier_factor, repair


def tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors_by_loops(x: np.ndarray, neighbours: int) -> np.ndarray:
    count = len(x)
    squared = [[float(((x[i] - x[j]) ** 2).sum()) for j in range(count)] for i in range(count)]
    nearest = [
        sorted((j for j in range(count) if j != i), key=squared[i].__getitem__)[:neighbours] for i in range(count)
    ]
    reach = [squared[i][nearest[i][-1]] for i in range(count)]
    return np.array([sum(reach[i] / reach[j] for j in nearest[i]) / neighbours for i in range(count)])


@pytest.mark.parametrize(("count", "neighbours"), [(40, 30), (31, 30), (12, 1), (12, 4)])
def test_outlier_factors_are_those_of_the_formula(count: int, neighbours: int) -> None:
    patches = tokens(3, count, 5) + 100  # an offset that all share, as in CLIP
    patches[1, 3] += 8
    got = local_outlier_factor(patches, neighbours)
    for window, factors in zip(patches.double().numpy(), got.numpy(), strict=True):
        np.testing.assert_allclose(factors, factors_by_loops(window, neighbours), rtol=1e-5)
    assert got[1].argmax() == 3


def test_small_windows_have_no_outliers() -> None:
    patches = tokens(2, 30, 4)
    patches[:, 7] = 1000
    assert torch.equal(local_outlier_factor(patches, 30), torch.ones(2, 30))
    assert not find_anomalies(patches, 30, 0.05).any()
    assert find_anomalies(patches, 29, 0.05)[:, 7].all()


def test_duplicates_are_no_outliers_among_themselves() -> None:
    flat = tokens(1, 1, 6).expand(2, 50, 6)
    torch.testing.assert_close(local_outlier_factor(flat, 30), torch.ones(2, 50))
    assert not find_anomalies(flat, 30, 0.05).any()
    mostly = flat.clone()
    mostly[:, 45:] = tokens(2, 5, 6, seed=1)
    factors = local_outlier_factor(mostly, 30)
    assert factors.isfinite().all()
    torch.testing.assert_close(factors[:, :45], torch.ones(2, 45))
    assert (factors[:, 45:] > 1000).all()


@pytest.mark.parametrize("contamination", [0.05, 0.1, 0.5])
def test_anomalies_exceed_the_quantile_of_their_own_window(contamination: float) -> None:
    patches = tokens(3, 47, 6)
    patches[2] *= 10
    got = find_anomalies(patches, 30, contamination).numpy()
    for window, flags in zip(patches.double().numpy(), got, strict=True):
        factors = factors_by_loops(window, 30)
        assert np.array_equal(flags, factors > np.quantile(factors, 1 - contamination))
        assert flags.sum() == np.ceil(contamination * 46)


def test_no_patch_exceeds_the_largest() -> None:
    assert not find_anomalies(tokens(2, 40, 6), 30, 0).any()


def repaired_by_loops(x: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """x: [h, w, D]; flags: [h, w]."""
    out = x.copy()
    for row, column in zip(*np.nonzero(flags), strict=True):
        sound = []
        for down, right in itertools.product((-1, 0, 1), repeat=2):
            r, c = row + down, column + right
            if 0 <= r < x.shape[0] and 0 <= c < x.shape[1] and not flags[r, c]:
                sound.append(x[r, c])
        if sound:
            out[row, column] = np.mean(sound, axis=0)
    return out


@pytest.mark.parametrize("grid", [(5, 5), (3, 8), (8, 3), (1, 9), (1, 1)])
@pytest.mark.parametrize("share", [0.2, 0.8, 1.0])
def test_repair_takes_the_mean_of_sound_neighbours(grid: tuple[int, int], share: float) -> None:
    count = grid[0] * grid[1]
    patches = tokens(4, count, 3)
    anomalous = torch.rand(4, count, generator=torch.Generator().manual_seed(1)) < share
    got = repair(patches, anomalous, grid)
    for window in range(4):
        expected = repaired_by_loops(patches[window].view(*grid, 3).numpy(), anomalous[window].view(grid).numpy())
        np.testing.assert_allclose(got[window].view(*grid, 3), expected, atol=1e-6)


def test_repair_without_anomalies_is_the_identity() -> None:
    patches = tokens(2, 12, 3)
    assert torch.equal(repair(patches, torch.zeros(2, 12, dtype=torch.bool), (3, 4)), patches)


def test_repair_does_not_write_into_its_input() -> None:
    patches = tokens(2, 12, 3)
    before = patches.clone()
    anomalous = torch.zeros(2, 12, dtype=torch.bool)
    anomalous[:, 5] = True
    assert not torch.equal(repair(patches, anomalous, (3, 4)), before)
    assert torch.equal(patches, before)


def test_cosines_of_all_pairs() -> None:
    patches = tokens(2, 5, 4)
    patches[0, 2] = 0
    got = cosine_similarities(patches)
    for window, a, b in itertools.product(range(2), range(5), range(5)):
        x, y = patches[window, a].double(), patches[window, b].double()
        norms = float(x.norm() * y.norm())
        assert got[window, a, b].item() == pytest.approx(float(x @ y) / norms if norms else 0, abs=1e-6)


@pytest.mark.parametrize("beta", [0, 0.4, 0.9])
def test_aggregation_is_a_mean_weighted_by_similarity(beta: float) -> None:
    patches, similarity = tokens(2, 6, 3), cosine_similarities(tokens(2, 6, 4, seed=1))
    before = similarity.clone()
    got = aggregate(patches, similarity, beta)
    assert torch.equal(similarity, before)
    for window, a in itertools.product(range(2), range(6)):
        weights = [float(s) if s >= beta else 0.0 for s in similarity[window, a]]
        expected = sum(w * patches[window, b].numpy() for b, w in enumerate(weights)) / (sum(weights) + 1e-6)
        np.testing.assert_allclose(got[window, a], expected, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_compute_in_float32(dtype: torch.dtype) -> None:
    low = tokens(2, 40, 4).to(dtype)
    flags = find_anomalies(low, 30, 0.05)
    similarity = cosine_similarities(low)
    assert torch.equal(flags, find_anomalies(low.float(), 30, 0.05))
    assert torch.equal(repair(low, flags, (5, 8)), repair(low.float(), flags, (5, 8)))
    assert torch.equal(similarity, cosine_similarities(low.float()))
    assert torch.equal(aggregate(low, similarity, 0.4), aggregate(low.float(), similarity, 0.4))
