"""Secrets taken out of what is printed, logged and recorded: passwords and signatures in addresses, storage options."""

from __future__ import annotations

import contextlib
import ctypes
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

HIDDEN = "***"
SECRET_FLAGS = ("--storage-options",)

_SHORTEST = 6  # a shorter one would be found among ordinary words
_LONG = 16  # a shorter one may be part of a longer word, as "testing" of s3://testing-photos
_NAMES = (
    r"sig|policy|awsaccesskeyid|googleaccessid|key-pair-id|(?:\w{1,64}[-_])?(?:key|code)|"
    r"[\w.-]{0,64}(?:token|secret|password|passwd|pwd|apikey|auth|authorization|credentials?|signature|jwt)|"
    r"(?-i:\w{0,64}[a-z\d](?:Key|Code|Sig))"  # accessKey, but no monkey
)
_FILE_OF_CREDENTIALS = re.compile(r".*\.(?:json|pem|p12|pfx|key|crt|cer|cfg|ini|txt)", re.IGNORECASE)
_SECRET_OPTION = re.compile(
    r"secret|passw|pwd|token|credential|auth|cookie|connection_string|sas|(?<!public_)key", re.IGNORECASE
)
# Texts hold names that anybody may have chosen, of any length: no pattern may look twice at long parts of them.
_PATTERNS = (
    # user:password@ of any address, and anything@ of a web address; the container of abfs://container@account is none.
    (re.compile(r"(\b[a-z][a-z0-9+.-]{0,30}://[^/\s:@?#'\"]*):[^/\s@'\"]*@", re.IGNORECASE), rf"\1:{HIDDEN}@"),
    (re.compile(r"(\b(?:https?|ftp)://)[^/\s:@?#'\"]+@", re.IGNORECASE), rf"\1{HIDDEN}@"),
    (re.compile(rf"([?&;](?:amp;)?(?:{_NAMES})=)[^&\s'\"<>#;,)\]}}]+", re.IGNORECASE), rf"\1{HIDDEN}"),
    # Whatever its name: nothing else in an address is that long and has no structure.
    (re.compile(r"([?&][\w.-]+=)(?=[^?&\s]*\d)[A-Za-z0-9%_+=~-]{32,}[\w%.+=~-]*"), rf"\1{HIDDEN}"),
    (re.compile(r"(?<![\w-])eyJ[\w-]{8,}(?:\.[\w-]+){1,2}"), HIDDEN),  # a JSON Web Token
    (
        re.compile(r"\b(AccountKey|SharedAccessKey|SharedAccessSignature|Password|Pwd)=[^;\s'\"]+", re.IGNORECASE),
        rf"\1={HIDDEN}",
    ),
    (re.compile(r"\b(Bearer|Basic)\s+(?=\S*[\d=])[A-Za-z0-9._~+/=-]{8,}"), rf"\1 {HIDDEN}"),
)

_options: set[str] = set()


def redacted(text: str) -> str:
    """The text without the secrets that it holds.

    Hidden are the password of `user:password@`, signatures and tokens in the query of an address (presigned URLs, SAS),
    keys in connection strings, and the values of storage options that were passed to `hide_options` in this process.

    >>> redacted("https://user:pass@host/a.jpg?id=7&sig=x%2F and abfs://photos@account/b.jpg")
    'https://user:***@host/a.jpg?id=7&sig=*** and abfs://photos@account/b.jpg'
    """
    for value in tuple(_options):  # other threads may add to them
        if value in text:
            text = text.replace(value, HIDDEN) if len(value) >= _LONG else _whole_word(value).sub(HIDDEN, text)
    if any(mark in text for mark in ("=", "@", "Bearer", "Basic", "eyJ")):
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
    return text


@lru_cache
def _whole_word(value: str) -> re.Pattern[str]:
    return re.compile(rf"(?<![\w-])(?<!\w\.){re.escape(value)}(?![\w-]|\.\w)")


def hide_options(options: Any) -> None:
    """Hide the secrets among storage options in all that `redacted` sees from now on in this process.

    Args:
        options: values by name, in groups and lists of any depth; those whose name tells of a secret are hidden,
            except where they are the path of a file that holds it.
    """
    _options.update(_secrets(options, secret=False))


def hidden_values() -> set[str]:
    """What this process hides by value; for a process that writes for it."""
    return set(_options)


def hide_values(values: Iterable[str]) -> None:
    """Hide what another process hides."""
    _options.update(values)


def _secrets(value: Any, *, secret: bool) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _secrets(inner, secret=secret or bool(_SECRET_OPTION.search(str(name))))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _secrets(inner, secret=secret)
    elif secret and isinstance(value, str) and len(value) >= _SHORTEST and not _FILE_OF_CREDENTIALS.fullmatch(value):
        yield value


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Arguments of a command line with "..." for the value of flags that may hold secrets, and addresses redacted."""
    shown = []
    hide_next = False
    for argument in arguments:
        flag, sign, _ = argument.partition("=")
        if hide_next:
            shown.append("...")
        elif sign and flag in SECRET_FLAGS:
            shown.append(f"{flag}=...")
        else:
            shown.append(redacted(argument))
        hide_next = not hide_next and argument in SECRET_FLAGS
    return shown


def hide_arguments() -> None:
    """Take secrets out of this process's own command line, which other users see in `ps` and which Ray records.

    On Linux; elsewhere nothing happens. `sys.argv` stays.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        given = Path("/proc/self/cmdline").read_bytes().split(b"\0")[:-1]
        # Fields 48 and 49: where the kernel reads the arguments. Those before may hold spaces inside parentheses.
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        address, end = int(fields[45]), int(fields[46])
        if end - address != sum(len(argument) + 1 for argument in given):
            return
        for argument, secret in zip(given, _secret_parts(given), strict=True):
            if secret:
                ctypes.memset(address + len(argument) - secret, ord("*"), secret)
            address += len(argument) + 1


def _secret_parts(arguments: Sequence[bytes]) -> Iterator[int]:
    """How many bytes at the end of each argument are secret."""
    hide_next = False
    for argument in arguments:
        flag, sign, value = argument.partition(b"=")
        is_flag = flag.decode(errors="replace") in SECRET_FLAGS
        yield len(argument) if hide_next else len(value) if sign and is_flag else 0
        hide_next = not hide_next and is_flag and not sign
