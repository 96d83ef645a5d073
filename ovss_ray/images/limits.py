"""How large an image may be."""

from __future__ import annotations

import re
from typing import Annotated, NamedTuple

from pydantic import BeforeValidator

DEFAULT_MAX_BYTES = 512 << 20
"""Of one image as a file: five bytes for each pixel that is allowed by default, more than usual formats take."""


_COUNT = re.compile(r"(\d[\d_]*(?:\.\d*)?(?:e\d+)?) *([kmgt]?)(i?)(?:b|bytes|p|px|pixels)?", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def _count(example: str) -> BeforeValidator:
    """Takes numbers with the prefix of a unit: k, M, G, T are powers of 1000, Ki, Mi, Gi, Ti of 1024."""

    def parse(value: object) -> object:
        if not isinstance(value, str):
            return value
        found = _COUNT.fullmatch(value.strip())
        if found is None or (found[3] and not found[2]):
            raise ValueError(f"should be a number, as {example}")
        number, power = found[1].replace("_", ""), _POWERS[found[2].lower()]
        unit = (1024 if found[3] else 1000) ** power
        try:
            return int(number) * unit if number.isdigit() else round(float(number) * unit)
        except (ValueError, OverflowError):  # thousands of digits, or more than floats know
            raise ValueError(f"should be a smaller number, as {example}") from None

    return BeforeValidator(parse)


Pixels = Annotated[int, _count("50000000 or 50M")]
Bytes = Annotated[int, _count("500000000, 500MB or 512MiB")]


class Limits(NamedTuple):
    """How large an image may be; larger ones are `too_large`. None is what the run was started with.

    Labels do not depend on them, only which images have some: a retry may raise them.
    """

    max_pixels: int | None = None
    max_bytes: int | None = None

    def raised_over(self, own: Limits) -> Limits:
        """These, with None for what is as the run has it."""
        return Limits(*(None if asked == given else asked for asked, given in zip(self, own, strict=True)))

    def over(self, own: Limits) -> Limits:
        """These, with what the run has for None."""
        return Limits(*(given if asked is None else asked for asked, given in zip(self, own, strict=True)))


AS_THE_RUN = Limits()
