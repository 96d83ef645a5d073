"""Columns of the input that are kept with each image, as one JSON object."""

from __future__ import annotations

import datetime
import json
import math
import uuid
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from ovss_ray.errors import InputError, nearest
from ovss_ray.naming import setting_name

LARGEST_EXTRA = 1 << 20
"""Characters of what is kept with one image; a shard of images is in memory at a time."""


def check_columns(wanted: Sequence[str], there: Sequence[str], source: str) -> None:
    """Refuse columns that a source does not have.

    Raises:
        InputError: names the first of them and the nearest that is there.
    """
    for name in wanted:
        if name not in there:
            hint = nearest(name, there) or f"; its columns are: {', '.join(list(there)[:20]) or 'none'}"
            raise InputError(f"{source} has no column {name!r} to keep{hint}")


def to_json(names: Sequence[str], values: Sequence[Any], source: str) -> str:
    """The kept values of one image as a JSON object.

    Numbers, text, truth values, lists and objects stay what they are; dates and times become ISO 8601 text; numbers
    that JSON does not know (NaN, infinities) become null. In text, "?" stands for each byte that is not UTF-8.

    Raises:
        InputError: a value that JSON cannot hold, such as bytes; more than `LARGEST_EXTRA` characters.
    """
    record = dict(zip(names, values, strict=True))
    try:
        text = _json(record)
    except TypeError as error:
        name = next(name for name, value in record.items() if not _fits(value))
        raise InputError(
            f"column {name!r} of {source} cannot be kept: {error}; leave it out of {setting_name('keep_columns')}"
        ) from error
    if len(text) > LARGEST_EXTRA:
        raise InputError(
            f"{source} has an image with {len(text)} characters to keep, over the limit of {LARGEST_EXTRA}; leave long "
            f"columns out of {setting_name('keep_columns')}"
        )
    return text


def _json(record: dict[str, Any]) -> str:
    try:
        return _storable(_dump(record))
    except ValueError:  # NaN is rare, so it is looked for only where JSON has refused it
        return _storable(_dump(_finite(record)))


def _storable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def _dump(value: Any) -> str:
    return json.dumps(value, default=_plain, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _fits(value: Any) -> bool:
    try:
        _dump(_finite(value))
    except TypeError:
        return False
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, (datetime.date, datetime.time)):  # a datetime is a date
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, uuid.UUID):
        return str(value)
    raise TypeError(f"JSON holds no {type(value).__name__}")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
