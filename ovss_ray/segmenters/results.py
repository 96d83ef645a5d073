"""What goes in beside the images and what comes out: text embeddings and segmentations."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ovss_ray.vocabulary import Vocabulary, VocabularyClass

if TYPE_CHECKING:
    from ovss_ray.labels.statistics import SegmentStatistics

_SHARES_SHOWN = 5
_NOTEBOOK_PX = 1280


@dataclass(frozen=True, eq=False)
class TextEmbeddings:
    """An encoded vocabulary: small, picklable and free of torch, so that it can cross processes and be stored.

    embeddings: [Q, E] float32, unit rows; shorter where a method mixes other texts in. query_class: [Q] int64, the
    class id of each query. extra: what a method encodes beside the queries, by a name of its own; each [n, E] float32
    with at least one row.
    """

    embeddings: NDArray[np.float32]
    query_class: NDArray[np.int64]
    vocabulary: Vocabulary
    extra: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True, eq=False, repr=False)
class Segmentation:
    """The label map of one image, at the image's own resolution.

    labels: [H, W] uint8, or uint16 with more than 255 classes; `vocabulary.ignore_index` where a pixel has no label.
    confidence: [H, W] float32 in 0..1, probability of the best class before the background threshold.
    margin: [H, W] float32 in 0..1, its lead over the second best class.
    image: uint8 [H, W, 3], what was labelled, if it was kept.
    """

    labels: NDArray[np.uint8] | NDArray[np.uint16]
    confidence: NDArray[np.float32]
    margin: NDArray[np.float32]
    vocabulary: Vocabulary
    image: NDArray[np.uint8] | None = None

    def segments(self) -> tuple[SegmentStatistics, ...]:
        """Statistics of every class that has at least one pixel, by ascending class id."""
        from ovss_ray.labels.statistics import segment_statistics

        return segment_statistics(self.labels, self.confidence, self.margin, self.vocabulary.ignore_index)

    def plot(
        self, image: NDArray[np.uint8] | Image.Image | None = None, *, legend: bool = True, max_side: int | None = None
    ) -> Image.Image:
        """The label map in the vocabulary's colours over the photo, with a legend of the classes present.

        Args:
            image: the photo, uint8 [H, W, 3] or a Pillow image; `segment` has kept the one that it labelled.
            legend: with it, pictures of less than 256 pixels are enlarged; without it, the picture has the size of the
                label map.
            max_side: longest side of the picture in pixels; a larger one is reduced, the legend comes on top.

        Raises:
            SettingError: if the image has another size or is no such array, as one of values from 0 to 1; or `max_side`
                is below 1.
        """
        from ovss_ray.images.decoding import upright_rgb  # the rules of a run, as for `segment`
        from ovss_ray.labels.pictures import draw_labels
        from ovss_ray.segmenters.given import check_array

        photo = self.image if image is None else image
        if isinstance(photo, Image.Image):
            photo = upright_rgb(photo)
        if photo is not None:
            check_array(photo, "the image")
        return draw_labels(self.labels, self.vocabulary, photo, legend=legend, max_side=max_side)

    def __repr__(self) -> str:
        """Size and shares of the classes, the largest first, not three arrays."""
        height, width = self.labels.shape
        shares = ", ".join(_line(*line) for line in self._shares()[:_SHARES_SHOWN])
        return f"<Segmentation {height} x {width}: {shares or 'no pixel has a label'}>"

    def _repr_png_(self) -> bytes:
        """The plot, as notebooks show it."""
        png = io.BytesIO()
        self.plot(max_side=_NOTEBOOK_PX).save(png, "PNG")
        return png.getvalue()

    def _shares(self) -> list[tuple[VocabularyClass, float]]:
        """The classes present with their shares of all pixels, the largest first."""
        ids, counts = np.unique(self.labels[self.labels < self.vocabulary.num_classes], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [(self.vocabulary.classes[ids[i]], counts[i] / self.labels.size) for i in order]


def _line(item: VocabularyClass, share: float) -> str:
    return f"{item.name} {share:.1%}"
