"""From the values in an annotation file to class ids, with nothing left out in silence."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from ovss_ray.evaluation.ground_truth.errors import UnknownIdsError
from ovss_ray.labels.codecs import LabelMap

_LISTED = 8  # unknown values in a message
_LOOKUP_SIZE = 65536
_UNKNOWN = -1

Values = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True, eq=False)
class IdTable:
    """What each value of an annotation file means.

    Attributes:
        ids: value -> class id 0..C-1, or the ignore index.
        dtype: of the label maps, "uint8" or "uint16".
        otherwise: the id of all values that `ids` lacks, where the data set defines one; None: they are unknown.
    """

    ids: Mapping[int, int]
    dtype: str
    otherwise: int | None = None

    def apply(self, values: Values, where: str, show: Callable[[int], str] = str) -> LabelMap:
        """The class ids of an annotation.

        Args:
            values: [H, W] as in the file, 0 or more.
            where: the file, for messages.
            show: how a value is written in messages.

        Returns:
            [H, W] of `dtype`.

        Raises:
            UnknownIdsError: a value that neither `ids` nor `otherwise` explains.
        """
        ids = self._lookup[values] if int(values.max(initial=0)) < len(self._lookup) else self._search(values)
        unknown = ids == _UNKNOWN
        if unknown.any():
            if self.otherwise is None:
                raise _unknown_ids(values[unknown], where, show)
            ids = np.where(unknown, self.otherwise, ids)
        return ids.astype(self.dtype)

    def digest(self) -> str:
        """SHA-256 of everything that the table says, hexadecimal."""
        return digest([sorted(self.ids.items()), self.otherwise, self.dtype])

    @cached_property
    def _lookup(self) -> npt.NDArray[np.int32]:
        lookup = np.full(_LOOKUP_SIZE, _UNKNOWN, np.int32)
        for value, class_id in self.ids.items():
            if value < _LOOKUP_SIZE:
                lookup[value] = class_id
        return lookup

    def _search(self, values: Values) -> npt.NDArray[np.int32]:
        known = np.array(sorted(self.ids), np.int64)
        meanings = np.array([self.ids[value] for value in known.tolist()], np.int32)
        places = np.minimum(np.searchsorted(known, values), len(known) - 1)
        return np.where(known[places] == values, meanings[places], np.int32(_UNKNOWN))

    def __getstate__(self) -> dict[str, Any]:
        return {"ids": dict(self.ids), "dtype": self.dtype, "otherwise": self.otherwise}  # without the lookup


def digest(value: Any) -> str:
    """SHA-256 of a value that JSON can hold, hexadecimal."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _unknown_ids(values: Values, where: str, show: Callable[[int], str]) -> UnknownIdsError:
    found, numbers = np.unique(values, return_counts=True)
    counts = dict(zip(found.tolist(), numbers.tolist(), strict=True))
    listed = [f"{show(value)} ({count} pixels)" for value, count in list(counts.items())[:_LISTED]]
    more = f" and {len(counts) - _LISTED} more" if len(counts) > _LISTED else ""
    return UnknownIdsError(
        f"{where} has values that are no class and not ignored: {', '.join(listed)}{more}; check that it belongs to "
        "this data set, or give the values a meaning in an id map",
        counts,
    )
