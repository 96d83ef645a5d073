"""A method that fails on some images, as it may be given by its module."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ovss_ray.segmenters import Segmentation, TextEmbeddings
from ovss_ray.segmenters.maskclip import MaskCLIP


class FailsOnSome(MaskCLIP):
    """MaskCLIP that cannot do with images whose first pixel has an odd sum."""

    name = "fails_on_some"

    def segment_batch(
        self, images: Sequence[NDArray[np.uint8]], text: TextEmbeddings, *, low_memory: bool
    ) -> list[Segmentation]:
        if any(int(image[0, 0].sum()) % 2 for image in images):
            raise ValueError("an odd image")
        return super().segment_batch(images, text, low_memory=low_memory)
