"""The CLIP that judges: how like each class it finds a picture, masked, whole or black."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image as PillowImage
from scipy.special import softmax

from ovss_ray.choose.reward import accepted, nearest_pixels
from ovss_ray.models.clip import ClipModel, load_clip, resolve_device, resolve_dtype
from ovss_ray.ops.labelling import best_query
from ovss_ray.vocabulary import Vocabulary

Picture = NDArray[np.uint8]
Scores = NDArray[np.float64]

_CPU_PICTURES, _CUDA_PICTURES = 16, 256


class Judge:
    """Scores pictures with CLIP as it was trained: its class token against the texts of the classes.

    Pictures are squashed to the model's own square (bicubic, as Pillow does), not cropped: a crop would lose masks. A
    class with several queries has the similarity of its best one.

    Attributes:
        side: of the square, in pixels.
        blank: [C] similarities of the black picture.
    """

    def __init__(self, clip: ClipModel, vocabulary: Vocabulary) -> None:
        self._tower = clip.vision
        self._device = clip.vision.device
        self._mean = 255 * torch.tensor(clip.pixel_mean, device=self._device)[:, None, None]
        self._std = 255 * torch.tensor(clip.pixel_std, device=self._device)[:, None, None]
        self._scale = clip.text.logit_scale
        self._query_class = vocabulary.query_class
        self._pictures = _CUDA_PICTURES if self._device.type == "cuda" else _CPU_PICTURES
        with torch.inference_mode():
            self._text = clip.text.encode(vocabulary.queries, vocabulary.templates).to(self._device)
        self.side = clip.vision.image_size
        self.candidates = np.array([item.id for item in vocabulary.classes if item.id != vocabulary.background])
        self.blank = self.similarities([np.zeros((self.side, self.side, 3), np.uint8)])[0]

    @classmethod
    def load(cls, clip: str, vocabulary: Vocabulary, *, device: str, dtype: str, trust_weights: bool = False) -> Judge:
        """Load the model.

        Args:
            clip, trust_weights: as for `load_segmenter`; a vision transformer.

        Raises:
            WeightsError: it cannot be loaded, or its vision tower has no class token.
        """
        where = resolve_device(device)
        return cls(load_clip(clip, where, resolve_dtype(dtype, where), trust_weights=trust_weights), vocabulary)

    def square(self, image: Picture) -> Picture:
        """An image [H, W, 3] at [side, side, 3]."""
        size = (self.side, self.side)
        return np.asarray(PillowImage.fromarray(image).resize(size, PillowImage.Resampling.BICUBIC))

    @torch.inference_mode()
    def similarities(self, pictures: Iterable[Picture]) -> Scores:
        """CLIP's logits [n, C] of pictures [side, side, 3]: cosines times the model's own scale."""
        parts = []
        waiting = iter(pictures)
        while batch := list(islice(waiting, self._pictures)):
            levels = torch.from_numpy(np.stack(batch)).to(self._device).permute(0, 3, 1, 2).float()
            trunk = self._tower.trunk((levels - self._mean) / self._std, "dino_offset", until=self._tower.depth)
            embedded = F.normalize(self._tower.head(trunk.tokens[:, 0]).float(), dim=-1)
            parts.append(best_query((embedded @ self._text.T).T, self._query_class).T)
        return (self._scale * torch.cat(parts).double()).cpu().numpy()

    def present(self, squares: Sequence[Picture], threshold: float) -> list[tuple[int, ...]]:
        """The classes that CLIP finds in whole images, most probable first.

        Those whose probability, a softmax over all classes but the background, is at least `threshold`, and the most
        probable one in any case.
        """
        found = []
        for row in softmax(self.similarities(squares)[:, self.candidates], axis=1):
            order = np.argsort(-row, kind="stable")
            count = max(1, int((row >= threshold).sum()))
            found.append(tuple(int(self.candidates[index]) for index in order[:count]))
        return found

    def accepted(
        self,
        squares: Sequence[Picture],
        labels: Sequence[NDArray[np.integer[Any]]],
        classes: Sequence[Sequence[int]],
    ) -> list[tuple[bool, ...]]:
        """Which classes of each image are accepted; see `reward.accepted`.

        Args:
            squares: the images, as `square` gives them.
            labels: their label maps [H, W], of any size.
            classes: K(I) of each.
        """
        small = [nearest_pixels(one, self.side) for one in labels]
        filled = [[bool((one == k).any()) for k in ids] for one, ids in zip(small, classes, strict=True)]
        scores = iter(self.similarities(_masked(squares, small, classes)) if any(map(any, filled)) else ())
        verdicts = []
        for ids, there in zip(classes, filled, strict=True):
            rows = [next(scores) if full else self.blank for full in there]
            chosen = list(ids)
            verdicts.append(tuple(accepted(np.stack(rows)[:, chosen], self.blank[chosen]).tolist()) if chosen else ())
        return verdicts


def _masked(
    squares: Sequence[Picture], labels: Sequence[NDArray[np.integer[Any]]], classes: Sequence[Sequence[int]]
) -> Iterator[Picture]:
    """The images with all but one class black, for every class that has a pixel."""
    for square, one, ids in zip(squares, labels, classes, strict=True):
        for k in ids:
            mask = one == k
            if mask.any():
                yield square * mask[..., None]
