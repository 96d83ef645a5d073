"""What every method offers: a card, typed settings, `encode_vocabulary` and `segment`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, overload

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import nn
from typing_extensions import Self

from ovss_ray.errors import SettingError, explain_invalid
from ovss_ray.models.tower import DenseTower, TowerShape
from ovss_ray.models.vision import VisionTower
from ovss_ray.naming import Naming, naming
from ovss_ray.segmenters.cards import MethodCard
from ovss_ray.segmenters.given import Image as Image
from ovss_ray.segmenters.given import OneImage, as_list, read_images
from ovss_ray.segmenters.results import Segmentation, TextEmbeddings
from ovss_ray.vocabulary import Source, Vocabulary, load_vocabulary

if TYPE_CHECKING:
    from ovss_ray.images.stores import StorageOptions

Text = TextEmbeddings | Source


class SegmenterSettings(BaseModel):
    """Base of all settings: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    SPEED_ONLY: ClassVar[frozenset[str]] = frozenset()
    """Fields that change speed or memory, but no label."""

    SEARCH: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Values of the fields that a random search for good settings draws from."""

    def label_settings(self) -> dict[str, Any]:
        """The settings that change labels, JSON-ready: what belongs in a run's fingerprint."""
        return self.model_dump(mode="json", exclude=set(self.SPEED_ONLY))

    def resolve(self, shape: TowerShape) -> Self:
        """Fills in what follows the model; a second time changes nothing."""
        del shape
        return self

    def with_all_texts(self, vocabulary: Vocabulary) -> Vocabulary:
        """The vocabulary with every text that the method will encode among its queries; some add more than those."""
        return vocabulary

    def check_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Raises `SettingError` if a setting asks for something that the vocabulary has not."""


class Segmenter(ABC):
    """A published method with its frozen models and its settings: images in, label maps out.

    A segmenter knows nothing of Ray, files or threads, and is used from one thread at a time. Its results do not
    depend on which images are segmented together.
    """

    name: ClassVar[str]
    card: ClassVar[MethodCard]
    Settings: ClassVar[type[SegmenterSettings]]
    Tower: ClassVar[type[DenseTower]] = VisionTower
    """The kind of vision tower that the method's CLIP must have."""

    settings: SegmenterSettings
    device: torch.device
    dtype: torch.dtype
    _last_encoded: TextEmbeddings | None = None

    @property
    def training_free(self) -> bool:
        """Whether the method was published as needing no training on segmentation data."""
        return self.card.training_free

    @classmethod
    @abstractmethod
    def load(
        cls,
        *,
        clip: str | nn.Module,
        device: str | torch.device,
        dtype: str | torch.dtype,
        trust_weights: bool = False,
        **settings: Any,
    ) -> Self:
        """Loads the models; the settings are fields of `Settings`, for the rest see `load_segmenter`."""

    @property
    def texts_encoded(self) -> int:
        """How many texts were encoded so far; other threads read it to show progress. 0 if that is not known."""
        return 0

    @abstractmethod
    def encode_vocabulary(self, vocabulary: Vocabulary) -> TextEmbeddings:
        """Encodes all queries of a vocabulary, once for any number of images.

        Raises:
            SettingError: a query is too long for the text tower, or the settings do not fit the vocabulary.
        """

    @overload  # a str is a sequence of str, too, but an image
    def segment(  # type: ignore[overload-overlap]
        self, images: OneImage, text: Text, *, low_memory: bool = False, storage_options: StorageOptions | None = None
    ) -> Segmentation: ...

    @overload
    def segment(
        self,
        images: Sequence[OneImage],
        text: Text,
        *,
        low_memory: bool = False,
        storage_options: StorageOptions | None = None,
    ) -> list[Segmentation]: ...

    def segment(
        self,
        images: OneImage | Sequence[OneImage],
        text: Text,
        *,
        low_memory: bool = False,
        storage_options: StorageOptions | None = None,
    ) -> Segmentation | list[Segmentation]:
        """Labels every pixel of an image, or of several that are processed together.

        Args:
            images: an image, or a list of images of any kinds and sizes. A path, a URI (s3://, https:// ...) or the
                bytes of a file are read as a run reads them; a Pillow image of any mode like its file; an array is
                uint8 RGB [H, W, 3], or [N, H, W, 3] for several.
            text: "cat,dog" or anything else that `load_vocabulary` takes, which is encoded at its first use; or what
                `encode_vocabulary` of a segmenter with the same model gave.
            low_memory: takes smaller steps, so that a single large image may still fit; labels stay the same.
            storage_options: fsspec options by protocol, for URIs, e.g. `{"s3": {"endpoint_url": ...}}`.

        Returns:
            one segmentation for one image; for a list, a list in the same order. Each keeps its image, for `plot`.

        Raises:
            SettingError: the classes cannot be read, or do not fit the model or the settings.
            ImageError: a file cannot be read; `status` and `reason` are those that a run would note.
            ValueError: no images, or something that is no image; the message says what is taken.
            torch.cuda.OutOfMemoryError: passed through; free memory, segment fewer images, or use `low_memory`.
        """
        single, several = as_list(images)
        pixels = read_images(several, storage_options)
        encoded = text if isinstance(text, TextEmbeddings) else self._encoded(load_vocabulary(text))
        results = self.segment_batch(pixels, encoded, low_memory=low_memory)
        kept = [replace(result, image=image) for result, image in zip(results, pixels, strict=True)]
        return kept[0] if single else kept

    def _encoded(self, vocabulary: Vocabulary) -> TextEmbeddings:
        if self._last_encoded is None or self._last_encoded.vocabulary != vocabulary:
            self._last_encoded = self.encode_vocabulary(vocabulary)
        return self._last_encoded

    @abstractmethod
    def segment_batch(self, images: Sequence[Image], text: TextEmbeddings, *, low_memory: bool) -> list[Segmentation]:
        """What a method states: as `segment`, for a list of arrays that were checked, and an encoded vocabulary."""

    @classmethod
    def parse_settings(cls, values: Mapping[str, Any]) -> SegmenterSettings:
        """Validates settings; `SettingError` names the field, its value and what is allowed."""
        try:
            return cls.Settings(**values)
        except ValidationError as error:
            fields = cls.Settings.model_fields
            named = Naming(flags=True, others={name: f"--set {name}" for name in values})
            named = named if naming().is_flag("settings") else Naming()
            raise explain_invalid(error, source=f"settings of {cls.name}", fields=fields, named=named) from None


def check_text(text: TextEmbeddings, width: int) -> None:
    """Raises SettingError for text embeddings of another model."""
    if text.embeddings.shape[1] != width:
        raise SettingError(
            f"the text embeddings have {text.embeddings.shape[1]} dimensions, but this model has {width}; "
            "encode the vocabulary with this segmenter"
        )
