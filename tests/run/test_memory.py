"""Micro-batch sizes that are learned from what did not fit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ovss_ray.run.memory import CLEAN_BATCHES_TO_GROW, BatchLimits, is_device_lost, is_out_of_memory

SHAPE, OTHER = (480, 640), (64, 64)


def test_a_shape_that_does_not_fit_is_halved_and_others_are_not() -> None:
    limits = BatchLimits(16)
    limits.did_not_fit([SHAPE] * 16, 16)
    assert (limits.limit([SHAPE]), limits.limit([OTHER]), limits.limit([SHAPE, OTHER])) == (8, 16, 8)
    limits.did_not_fit([SHAPE] * 8, 8)
    assert limits.limit([SHAPE]) == 4
    assert limits.reduced() == {SHAPE: 4}


def test_it_grows_back_after_fifty_full_batches_that_fit() -> None:
    limits = BatchLimits(16, {SHAPE: 8})
    for _ in range(CLEAN_BATCHES_TO_GROW):
        assert limits.limit([SHAPE]) == 8
        limits.fitted([SHAPE] * 3, 3)  # not full: tells nothing about eight
        limits.fitted([SHAPE] * 8, 8)
    assert limits.limit([SHAPE]) == 12
    for _ in range(CLEAN_BATCHES_TO_GROW):
        limits.fitted([SHAPE] * 12, 12)
    assert limits.limit([SHAPE]) == 16
    assert limits.reduced() == {}


@given(most=st.integers(1, 64), fits=st.integers(1, 64), batches=st.integers(1, 400))
def test_the_limit_stays_between_one_and_the_size_of_the_job(most: int, fits: int, batches: int) -> None:
    limits = BatchLimits(most)
    for _ in range(batches):
        size = limits.limit([SHAPE])
        assert 1 <= size <= most
        if size > fits:
            limits.did_not_fit([SHAPE], size)
            assert limits.limit([SHAPE]) == size // 2
        else:
            limits.fitted([SHAPE], size)


@pytest.mark.parametrize(
    ("error", "memory", "lost"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), True, False),
        (MemoryError(), True, False),
        (RuntimeError("CUDA error: out of memory"), True, False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory"), True, False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False, True),
        (RuntimeError("CUDA error: device-side assert triggered"), False, True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False, False),
        (ValueError("out of memory is what this picture shows"), False, False),
    ],
)
def test_what_an_exception_means(error: Exception, memory: bool, lost: bool) -> None:
    assert (is_out_of_memory(error), is_device_lost(error)) == (memory, lost)


def test_an_allocation_that_the_machine_refuses_is_recognised() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
