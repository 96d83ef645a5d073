"""Micro-batch sizes that fit into the device's memory, learned from those that did not."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

import torch

Shape = tuple[int, ...]

CLEAN_BATCHES_TO_GROW = 50
GROWTH = 1.5


class BatchLimits:
    """How many images of a shape go through the network together.

    Halved when they run out of memory; after 50 micro-batches at the limit that fit, half as many more are tried again,
    up to the size that the job asks for. Safe to use from several threads.

    Args:
        most: the micro-batch size of the job.
        known: limits that other workers have found.
    """

    def __init__(self, most: int, known: Mapping[Shape, int] | None = None) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._limits = dict(known or {})
        self._clean: dict[Shape, int] = {}

    def limit(self, shapes: Iterable[Shape]) -> int:
        """Images that may go together if they have these shapes, at least 1."""
        with self._lock:
            return min((self._limits.get(shape, self._most) for shape in shapes), default=self._most)

    def did_not_fit(self, shapes: Iterable[Shape], images: int) -> None:
        """So many images of these shapes ran out of memory."""
        with self._lock:
            for shape in set(shapes):
                self._limits[shape] = max(min(images // 2, self._limits.get(shape, self._most)), 1)
                self._clean[shape] = 0

    def fitted(self, shapes: Iterable[Shape], images: int) -> None:
        """So many images of these shapes went through."""
        with self._lock:
            for shape in set(shapes) & self._limits.keys():
                if images < self._limits[shape]:
                    continue
                self._clean[shape] = self._clean.get(shape, 0) + 1
                if self._clean[shape] >= CLEAN_BATCHES_TO_GROW:
                    self._clean[shape] = 0
                    self._grow(shape)

    def reduced(self) -> dict[Shape, int]:
        """The limits below the micro-batch size of the job."""
        with self._lock:
            return dict(self._limits)

    def _grow(self, shape: Shape) -> None:
        larger = max(int(self._limits[shape] * GROWTH), self._limits[shape] + 1)
        if larger >= self._most:
            del self._limits[shape], self._clean[shape]
        else:
            self._limits[shape] = larger


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that the memory of the device, or of the machine, did not suffice."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # CPU tensors and the libraries under CUDA have no exception type of their own.
    text = str(error)
    return isinstance(error, RuntimeError) and any(
        sign in text for sign in ("out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED")
    )


def is_device_lost(error: BaseException) -> bool:
    """Whether an exception says that this process can no longer use its GPU, so that only a new process helps."""
    return "CUDA error" in str(error) and not is_out_of_memory(error)
