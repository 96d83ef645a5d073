"""How large an image may be."""

from __future__ import annotations

from typing import NamedTuple

DEFAULT_MAX_BYTES = 512 << 20
"""Of one image as a file: five bytes for each pixel that is allowed by default, more than usual formats take."""


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
