"""Trying again: how often, and after which wait."""

from __future__ import annotations

import datetime
import email.utils
import itertools
import random
import time
from collections.abc import Callable
from typing import TypeVar

from ovss_ray.images.stores import StoreFailure, retry_after, store_failure

T = TypeVar("T")

FIRST_WINDOW_S = 0.5
LONGEST_WINDOW_S = 20.0
LONGEST_RETRY_AFTER_S = 60.0
THROTTLED_FACTOR = 4  # object stores need a while to spread a busy prefix over more servers


def try_often(
    operation: Callable[[], T],
    *,
    attempts: int,
    is_final: Callable[[Exception], bool],
    sleep: Callable[[float], None] = time.sleep,
    on_retry: Callable[[StoreFailure, Exception], None] | None = None,
) -> T:
    """Carry out an operation on a store, again after a wait while it fails in a way that may pass.

    Args:
        operation: what to do; doing it twice must be harmless.
        attempts: how often at most, 1 or more.
        is_final: whether an error will not go away by trying again.
        sleep: how to wait.
        on_retry: told about each error that is followed by another attempt.

    Raises:
        Exception: that of the last attempt.
    """
    for attempt in itertools.count(1):
        try:
            return operation()
        except Exception as error:  # every store raises exceptions of its own, from drivers that may be missing
            if attempt >= attempts or is_final(error):
                raise
            if on_retry is not None:
                on_retry(store_failure(error), error)
            sleep(wait_s(attempt, error))
    raise AssertionError("unreachable: the last attempt returns or raises")


def wait_s(attempt: int, error: Exception) -> float:
    """Seconds to wait after a failed attempt: random, in a window that doubles each time (full jitter).

    The window is four times as long where the server says that it is busy (429, 503), and begins after its Retry-After.

    Args:
        attempt: number of the attempt that failed, from 1.
        error: what it raised.
    """
    factor = THROTTLED_FACTOR if store_failure(error) == "throttled" else 1
    jitter = random.uniform(0, min(LONGEST_WINDOW_S, FIRST_WINDOW_S * factor * 2.0 ** (attempt - 1)))
    asked_for = _seconds(retry_after(error))
    # The jitter comes on top, or all threads would be back together.
    return jitter if asked_for is None else jitter + min(asked_for, LONGEST_RETRY_AFTER_S)


def _seconds(retry_after_header: str | None) -> float | None:
    """The wait that a Retry-After header asks for: it holds seconds or a date."""
    if retry_after_header is None:
        return None
    try:
        return max(0.0, float(retry_after_header))
    except ValueError:
        pass
    try:
        until = email.utils.parsedate_to_datetime(retry_after_header)
    except ValueError:
        return None
    return max(0.0, (until - datetime.datetime.now(datetime.timezone.utc)).total_seconds())
