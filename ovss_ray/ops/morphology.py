"""Morphology of label maps."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def close_labels(labels: Tensor, ignore_index: int) -> Tensor:
    """Grey-level closing with a 3 x 3 square: the largest id around every pixel, then the smallest of those around.

    Gaps and notches of less than 3 pixels fill with the largest id around them, so the order of the ids matters: this
    is no neutral clean-up. No pixel gets a smaller id than it had. An unlabelled pixel counts as below every id, as a
    background of id 0 would; so unlabelled gaps fill as well, and no pixel loses its label. Nothing lies beyond the
    border. A second closing changes nothing.

    Args:
        labels: [H, W] integers, 0..65535.
        ignore_index: the value of pixels without a label.

    Returns:
        [H, W], as `labels`.
    """
    unlabelled = labels.masked_fill(labels == ignore_index, -1).float()
    dilated = F.max_pool2d(unlabelled[None], 3, stride=1, padding=1)
    closed = -F.max_pool2d(-dilated, 3, stride=1, padding=1)[0]
    return closed.masked_fill(closed < 0, ignore_index).to(labels.dtype)
