"""Why a source of images cannot be listed, in one sentence."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from ovss_ray.errors import InputError, OvssError
from ovss_ray.images.stores import brief, is_local, protocol_of, refused_host, store_failure


def nearest_name(path: str) -> str:
    """The end of a sentence about a local path that does not exist: what is there instead."""
    missing = Path(path)
    while not missing.parent.is_dir():
        missing = missing.parent
    try:
        names = [entry.name for entry in islice(os.scandir(missing.parent), 10_000)]
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, names, n=1)
    return f" (did you mean {missing.parent / close[0]}?)" if close else f" ({missing.parent} exists)"


def no_byte_ranges(source: str) -> InputError:
    """The error for a file with images on a web server that gives whole files only."""
    return InputError(
        f"the server of {source} knows no byte ranges, which images inside a file need; download it first"
    )


@contextmanager
def listing(source: str) -> Iterator[None]:
    """Turn any exception of a store into an `InputError` that says what it means for `source`.

    Every store raises exceptions of its own, from drivers that may not be installed.
    """
    try:
        yield
    except OvssError:
        raise
    except Exception as error:
        raise InputError(why_unreadable(source, error)) from error


def _credentials(protocol: str) -> str:
    if protocol in ("gs", "gcs"):
        return 'set GOOGLE_APPLICATION_CREDENTIALS or, for a public bucket, storage_options {"gs": {"token": "anon"}}'
    if protocol in ("az", "abfs", "abfss"):
        return "set AZURE_STORAGE_CONNECTION_STRING or AZURE_STORAGE_ACCOUNT_NAME and _KEY, or give storage_options"
    return (
        "set them in the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID ...) or, for a public bucket, "
        'storage_options {"s3": {"anon": true}}'
    )


def why_unreadable(source: str, error: Exception) -> str:
    """What an exception of any store means for somebody who wants to list `source`."""
    failure = store_failure(error)
    detail = brief(error)
    place = (getattr(error, "filename", None) if is_local(source) else None) or source
    if failure == "not_found":
        return f"{place} does not exist; check the address"
    if (refusal := refused_host(error)) is not None:
        return f"{source} is not opened: {refusal}"
    if failure == "forbidden":
        return f"no permission to read {place}; check the rights of this user or its credentials ({detail})"
    if failure == "credentials":
        return f"no credentials for {source}; {_credentials(protocol_of(source))}"
    if isinstance(error, ValueError) and "range requests" in detail:
        return str(no_byte_ranges(source))
    if failure == "throttled":
        return f"{source} cannot be listed: the store is too busy to answer ({detail}); try again later"
    if failure == "rejected":
        return f"{source} cannot be listed: the store rejects the request ({detail}); check the address and its options"
    if failure == "unreachable":
        return f"the store of {source} cannot be reached; check the endpoint and the network ({detail})"
    return f"{source} cannot be listed: {detail}"
