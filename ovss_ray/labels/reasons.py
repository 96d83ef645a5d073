"""Reasons of failure without what differs from image to image, so that a million of them are a few kinds."""

from __future__ import annotations

import re

KINDS_KEPT = 1000
OTHER_REASONS = "other reasons"

_LONGEST = 500
_FILE_TYPES = "jpe?g|jfif|png|tiff?|webp|gif|bmp|hei[cf]|avif|jp2|tar|parquet|npy|json|txt|csv|pt|safetensors"
_PARTS = [
    (re.compile(r"\b[A-Za-z][\w+.-]*://(?![,;])[^\s<>'\"]+"), "<url>"),  # not s3:// alone: nothing differs there
    (re.compile(r"(?<!\w)'[^']*(?:'(?!\w)|$)|(?<!\w)\"[^\"]*(?:\"|$)|`[^`]*(?:`|$)"), "<name>"),
    (re.compile(r"(?<![\w<./])(?!//(?:[\s,;]|$))(?:[A-Za-z]:|~|\.{1,2})?/[^\s:;,()<>]+"), "<path>"),
    (re.compile(rf"(?<![\w<./])[\w.%+-]+(?:/[\w.%+-]+)*\.(?:{_FILE_TYPES})\b", re.IGNORECASE), "<path>"),
    (re.compile(r"\b0[xX][0-9a-fA-F]+\b"), "<hex>"),
    (re.compile(r"(?<![\w-])(?=[a-f]*\d)[0-9a-f]{8,}(?![\w-])"), "<hex>"),
    (re.compile(r"(?<![\w<])(?=[^\s\d]*\d)[A-Za-z0-9+/=_-]{16,}(?![\w>])"), "<id>"),
    # Statuses of HTTP are few and say much; digits after a letter are part of a word, such as float16.
    (re.compile(r"(?<![A-Za-z\d])(?<!HTTP )(?<!status )\d+(?:[.,:]\d+)*(?:e[+-]?\d+)?", re.IGNORECASE), "N"),
]


def kind_of(reason: str | None) -> str:
    """A reason of failure with addresses, quoted names, paths, identifiers and numbers replaced by what they are.

    >>> kind_of("9000 x 20000 pixels, over the limit of 179000000 pixels")
    'N x N pixels, over the limit of N pixels'
    >>> kind_of("HTTP 503 from https://host/a.jpg?x=1 (attempt 5 of 5)")
    'HTTP 503 from <url> (attempt N of N)'
    """
    text = (reason or "no reason given")[:_LONGEST]
    for pattern, name in _PARTS:
        text = pattern.sub(name, text)
    return text
