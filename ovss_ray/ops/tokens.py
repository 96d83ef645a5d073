"""Operations on the patch tokens of windows: outliers, their repair, and smoothing by similarity.

From SC-CLIP (Bai et al., "Self-Calibrated CLIP for Training-Free Open-Vocabulary Segmentation"). All take a batch of
windows, compute in float32, and keep every statistic within its window.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_LEAST_DISTANCE = 1e-12
_LEAST_SUM = 1e-6


def local_outlier_factor(patches: Tensor, neighbours: int) -> Tensor:
    """How much farther from its nearest patches each patch is than those are from theirs; about 1 for inliers.

    The simplified factor of SC-CLIP's code: with K_i the squared distance of patch i to its `neighbours`-th nearest
    one, the mean of K_i / K_j over the `neighbours` nearest patches j. (Breunig et al., SIGMOD 2000, and scikit-learn
    have distances that are not squared, and reach from i to j no shorter than K_j instead of K_i.)

    Args:
        patches: [B, n, D].
        neighbours: how many, at least 1.

    Returns:
        [B, n] float32, finite; 1 for all where a window has no more than `neighbours` patches, and among duplicates.
    """
    batch, count, _ = patches.shape
    if count <= neighbours:
        return torch.ones(batch, count, device=patches.device)
    patches = patches.float()
    # `cdist` multiplies matrices and so loses digits where tokens share a large offset, as CLIP's do.
    centred = patches - patches.mean(1, keepdim=True)
    distances = torch.cdist(centred, centred)
    distances.diagonal(dim1=1, dim2=2).fill_(torch.inf)
    nearest = distances.topk(neighbours, largest=False).indices
    farthest = patches.gather(1, nearest[:, :, -1:].expand_as(patches))
    # From the tokens themselves, not from `distances`: duplicates are at distance 0 and nothing else.
    reach = (patches - farthest).square().sum(-1).clamp(min=_LEAST_DISTANCE)
    reach_of_nearest = reach[:, None].expand(-1, count, -1).gather(2, nearest)
    return (reach[:, :, None] / reach_of_nearest).mean(-1)


def find_anomalies(patches: Tensor, neighbours: int, contamination: float) -> Tensor:
    """The patches of each window whose local outlier factor exceeds its quantile at 1 - `contamination`.

    Args:
        patches: [B, n, D].
        neighbours: as for `local_outlier_factor`.
        contamination: about the share of anomalies, 0..1; 0 finds none.

    Returns:
        [B, n] bool; none in windows with no more than `neighbours` patches.
    """
    factor = local_outlier_factor(patches, neighbours)
    return factor > factor.quantile(1 - contamination, dim=1, keepdim=True)


def repair(patches: Tensor, anomalous: Tensor, grid: tuple[int, int]) -> Tensor:
    """Replaces each anomalous patch by the mean of those of its eight neighbours that are not anomalous.

    Args:
        patches: [B, h * w, D], row-major.
        anomalous: [B, h * w] bool.
        grid: (h, w).

    Returns:
        [B, h * w, D] float32; patches without a sound neighbour, and all sound ones, are as they were.
    """
    patches = patches.float()
    sound = (~anomalous).float()[:, :, None]
    sums = _sum_3x3(patches * sound, grid)  # the centre itself is anomalous, so it adds nothing
    counts = _sum_3x3(sound, grid)
    replaced = anomalous[:, :, None] & (counts > 0)
    return torch.where(replaced, sums / counts.clamp(min=1), patches)


def cosine_similarities(patches: Tensor) -> Tensor:
    """The cosines of all pairs of patches of each window: [B, n, D] to [B, n, n] float32."""
    unit = F.normalize(patches.float(), dim=-1)
    return unit @ unit.transpose(1, 2)


def aggregate(patches: Tensor, similarity: Tensor, beta: float) -> Tensor:
    """Replaces each patch by the mean of the patches that are similar to it, itself included, weighted by similarity.

    Linear in `patches`.

    Args:
        patches: [B, n, D].
        similarity: [B, n, n] float32; row i weighs what patch i becomes.
        beta: pairs less similar than this have no weight; at least 0.

    Returns:
        [B, n, D] float32.
    """
    weights = similarity.masked_fill(similarity < beta, 0)
    return weights @ patches.float() / (weights.sum(-1, keepdim=True) + _LEAST_SUM)


def _sum_3x3(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """The sum of each 3 x 3 neighbourhood, with zeros outside: [B, h * w, D] to the same."""
    maps = tokens.transpose(1, 2).reshape(len(tokens), -1, *grid)
    return F.avg_pool2d(maps, 3, stride=1, padding=1, divisor_override=1).flatten(2).transpose(1, 2)
