"""What can be wrong with the annotation of one image."""

from __future__ import annotations

from collections.abc import Mapping

from ovss_ray.errors import OvssError


class AnnotationError(OvssError):
    """One image that cannot be scored because of its annotation; the message says what, in which file, what to do."""

    exit_code = 3


class MissingAnnotationError(AnnotationError):
    """An image without annotation, or one that the split does not have."""


class DamagedAnnotationError(AnnotationError):
    """An annotation file that cannot be decoded, or that holds no label map."""


class ColourAnnotationError(DamagedAnnotationError):
    """A colour image where a label map is expected, or the other way round."""


class UnknownIdsError(AnnotationError):
    """A label map with values that no rule of the data set explains.

    Attributes:
        values: the values, ascending; colours are numbers, red * 65536 + green * 256 + blue.
        counts: how many pixels have each of them.
    """

    def __init__(self, message: str, counts: Mapping[int, int]) -> None:
        super().__init__(message)
        self.args = (message, counts)  # both, or it could not be pickled
        self.values = tuple(sorted(counts))
        self.counts = tuple(counts[value] for value in self.values)

    def __str__(self) -> str:
        return str(self.args[0])
