"""What an exception of a decoder means for an image, as a status and a sentence."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image, TiffTags

from ovss_ray.errors import ImageError

# What decoders say of sound files that they are not made for; anything else they say means damage.
_NOT_OURS = re.compile(
    r"unsupported(?! operand)|not supported|not available|cannot handle|unknown (pixel mode|raw mode|data organization)"
    r"|conversion from \w+ to \w+ not",
    re.IGNORECASE,
)
_ON_PURPOSE = (OSError, SyntaxError, ValueError, RuntimeError, TypeError, EOFError)
_OF_CODE = re.compile(r"object|argument|attribute|'\w+'|operand|unpack|expected|integer")
_DECODER_ERRORS = {
    "-1": "rows are longer than the header says",
    "-2": "the compressed data cannot be decoded",
    "-3": "the compressed data cannot be decoded",
    "-8": "its header and its compression contradict each other",
}


@contextmanager
def explained(kind: str) -> Iterator[None]:
    """Turn whatever a decoder raises into an `ImageError`; hostile bytes raise anything, and none may end the run.

    Args:
        kind: the format, as `sniff_format` names it.
    """
    try:
        yield
    except ImageError:
        raise
    except (MemoryError, Image.DecompressionBombError) as error:
        raise ImageError("too_large", f"{kind} too large to decode: {error or 'no memory left'}") from error
    except Exception as error:
        reason = in_words(kind, error)
        if _NOT_OURS.search(reason):
            raise ImageError("unsupported", f"{kind} of a kind that cannot be read: {reason}") from error
        raise ImageError("corrupt", f"damaged {kind}: {reason}") from error


def in_words(kind: str, error: Exception) -> str:
    """What is wrong with a file, where the exception's own text says it to nobody but the decoder's authors."""
    text = " ".join(str(error).split())
    # Pillow passes what goes wrong in a header on as a SyntaxError of the same text.
    origin = error.__cause__ if isinstance(error, SyntaxError) and error.__cause__ is not None else error
    code = re.fullmatch(r"decoder error (-\d+)", text)
    if code and code[1] in _DECODER_ERRORS:
        return _DECODER_ERRORS[code[1]]
    if isinstance(origin, KeyError):
        return _missing(kind, origin.args[0] if origin.args else "")
    if isinstance(origin, (IndexError, struct.error)):
        return f"it ends too early, or its header points past its end ({_named(origin, text)})"
    # What decoders say on purpose is a sentence; what Python says of their code is none about the file.
    if isinstance(origin, _ON_PURPOSE) and len(re.findall(r"[A-Za-z]+", text)) > 1 and not _OF_CODE.search(text):
        return text
    return f"its header contradicts itself ({_named(origin, text)})"


def _missing(kind: str, key: object) -> str:
    if kind == "TIFF" and isinstance(key, int):
        name = TiffTags.lookup(key).name
        return f"its tag {key}{'' if name == 'unknown' else f' ({name})'} is missing, or has a value that nobody knows"
    return f"a value that nobody knows, {key!r}"


def _named(error: BaseException, text: str) -> str:
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
