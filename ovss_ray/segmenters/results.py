"""What goes in beside the images and what comes out: text embeddings and segmentations."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from ovss_ray.vocabulary import Vocabulary, VocabularyClass

if TYPE_CHECKING:
    from ovss_ray.labels.statistics import SegmentStatistics

_LEGEND_ROW_PX = 16
_OVERLAY_OPACITY = 0.55
_SHARES_SHOWN = 5


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
    """

    labels: NDArray[np.uint8] | NDArray[np.uint16]
    confidence: NDArray[np.float32]
    margin: NDArray[np.float32]
    vocabulary: Vocabulary

    def segments(self) -> tuple[SegmentStatistics, ...]:
        """Statistics of every class that has at least one pixel, by ascending class id."""
        from ovss_ray.labels.statistics import segment_statistics

        return segment_statistics(self.labels, self.confidence, self.margin, self.vocabulary.ignore_index)

    def plot(self, image: NDArray[np.uint8] | Image.Image | None = None) -> Image.Image:
        """The label map in the vocabulary's colours, over the image if given, with a legend of the classes present."""
        if isinstance(image, Image.Image):
            from ovss_ray.images.decoding import upright_rgb  # the rules of a run, as for `segment`

            image = upright_rgb(image)
        height, width = self.labels.shape
        palette = np.array([item.color for item in self.vocabulary.classes], dtype=np.float32)
        labelled = self.labels < len(palette)
        colors: NDArray[np.floating[Any]] = np.zeros((height, width, 3), np.float32)
        colors[labelled] = palette[self.labels[labelled]]
        if image is not None:
            if image.shape != (height, width, 3):
                raise ValueError(f"the image has shape {image.shape}, the label map is {height} x {width}")
            opacity = np.where(labelled, _OVERLAY_OPACITY, 0.0)[..., None]
            colors = opacity * colors + (1 - opacity) * image
        picture = Image.fromarray(np.round(colors).astype(np.uint8))
        return self._with_legend(picture)

    def __repr__(self) -> str:
        """Size and shares of the classes, the largest first, not three arrays."""
        height, width = self.labels.shape
        shares = ", ".join(_line(*line) for line in self._shares()[:_SHARES_SHOWN])
        return f"<Segmentation {height} x {width}: {shares or 'no pixel has a label'}>"

    def _repr_png_(self) -> bytes:
        """The plot, as notebooks show it."""
        png = io.BytesIO()
        self.plot().save(png, "PNG")
        return png.getvalue()

    def _shares(self) -> list[tuple[VocabularyClass, float]]:
        """The classes present with their shares of all pixels, the largest first."""
        ids, counts = np.unique(self.labels[self.labels < self.vocabulary.num_classes], return_counts=True)
        order = np.argsort(-counts, kind="stable")
        return [(self.vocabulary.classes[ids[i]], counts[i] / self.labels.size) for i in order]

    def _with_legend(self, picture: Image.Image) -> Image.Image:
        lines = self._shares()
        height = max(picture.height, _LEGEND_ROW_PX * len(lines) + 4)
        measure = ImageDraw.Draw(picture).textlength
        width = picture.width + 24 + max((int(measure(_line(*line))) for line in lines), default=0)
        sheet = Image.new("RGB", (width, height), "white")
        sheet.paste(picture, (0, 0))
        draw = ImageDraw.Draw(sheet)
        for row, (item, share) in enumerate(lines):
            top = 2 + row * _LEGEND_ROW_PX
            draw.rectangle((picture.width + 4, top + 1, picture.width + 14, top + 11), fill=item.color, outline="black")
            draw.text((picture.width + 18, top), _line(item, share), fill="black")
        return sheet


def _line(item: VocabularyClass, share: float) -> str:
    return f"{item.name} {share:.1%}"
