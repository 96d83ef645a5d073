"""Names and messages made safe to print: no character of theirs moves the cursor, hides text or begins a line."""

from __future__ import annotations

import re

# Control characters (C0, DEL, C1), surrogates, line and paragraph separators, and what is invisible or turns text
# around. The joiners U+200C and U+200D stay: Persian, Indic scripts and emoji are written with them.
_UNSAFE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)


def printable(text: object) -> str:
    r"""A name (of a file, class or host, say) in one line, unsafe characters written as `\x1b`, `\n`, `\u202e`.

    A byte of a file name that is not UTF-8, which Python holds as a lone surrogate, is written as `\xff`.
    """
    return _UNSAFE.sub(_escape, str(text))


def printable_lines(text: str) -> str:
    """A message of one or several lines, safe as by `printable`; its own line ends and tabs stay."""
    return _UNSAFE.sub(lambda match: match[0] if match[0] in "\n\t" else _escape(match), text)


def _escape(match: re.Match[str]) -> str:
    code = ord(match[0])
    if match[0] in "\t\n\r":
        return {"\t": "\\t", "\n": "\\n", "\r": "\\r"}[match[0]]
    if 0xDC80 <= code <= 0xDCFF:
        return f"\\x{code - 0xDC00:02x}"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
