"""The reward of PnP-OVSS (section 3.4, equations 4 and 5): whether what a mask leaves of an image looks like its class.

For an image I with the classes K(I), Pr(X, k) is the softmax over K(I) of CLIP's similarities of a picture X, and a
class is accepted where Pr(M_k * I, k) > Pr(0, k): the image with everything outside its mask black, against a picture
that is all black. The reward of an image is the number of its classes that are accepted.

With one class both probabilities are 1, and by the formula no mask is ever accepted: such an image says nothing.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import log_softmax

FEWEST_CLASSES = 2
"""Images with fewer classes say nothing about a mask."""


def accepted(masked: NDArray[np.float64], blank: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Which classes of one image are accepted.

    Args:
        masked: [K, K] similarities; row j is what the mask of class j leaves of the image, against all K classes.
        blank: [K] similarities of the black picture.

    Returns:
        [K] bool; a row that equals `blank`, as that of an empty mask does, is never accepted.
    """
    mine: NDArray[np.float64] = log_softmax(masked, axis=1).diagonal()
    prior: NDArray[np.float64] = log_softmax(blank)
    return mine > prior


def nearest_pixels(labels: NDArray[np.integer], side: int) -> NDArray[np.integer]:
    """A label map [H, W] at [side, side], each pixel the one nearest to its centre; never a mixture of classes."""
    height, width = labels.shape
    centres = np.arange(side) + 0.5
    rows, columns = ((centres * length / side).astype(np.int64) for length in (height, width))
    small: NDArray[np.integer] = labels[rows[:, None], columns]
    return small
