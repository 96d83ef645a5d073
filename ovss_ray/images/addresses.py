"""Addresses of files: their protocol, the local path that they name, and how names that are not UTF-8 are written.

A run stores addresses as text, and file names are bytes. A name that is UTF-8 stands in its address as it is. One that
is not is written so that its bytes can be had back (`storable`):

* a local file as a `file://` URI, in which every byte but letters, digits and `-._~/` is a percent escape;
* a member of a tar as `tar+escaped://NAME::TAR`, NAME escaped in the same way;
* any other address with percent escapes for the bytes that are no UTF-8.
"""

from __future__ import annotations

import os
from urllib.parse import quote_from_bytes, unquote_to_bytes

# Protocols that mean the same store, and the extra of this package that brings its driver.
FAMILIES: tuple[tuple[tuple[str, ...], str | None], ...] = (
    (("file", "local"), None),
    (("http", "https"), None),
    (("s3", "s3a"), "s3"),
    (("gs", "gcs"), "gcs"),
    (("az", "abfs", "abfss"), "azure"),
)
PROTOCOLS = tuple(protocol for names, _ in FAMILIES for protocol in names)

LONGEST_ADDRESS = 16 << 10
"""Characters of an address that can be read: four times the longest path of Linux, twice what web servers take."""

TAR, ESCAPED_TAR = "tar://", "tar+escaped://"
CHAIN = "::"


def protocol_of(uri: str) -> str:
    """The protocol of a URI in lower case; "file" for a plain path."""
    protocol, mark, _ = uri.partition("://")
    return protocol.lower() if mark else "file"


def is_local(uri: str) -> bool:
    """Whether a URI or path lies on this machine's own file system."""
    return protocol_of(uri) in ("file", "local")


def family_of(protocol: str) -> tuple[str, ...]:
    """The protocols that mean the same store as this one; itself alone if it is unknown."""
    return next((names for names, _ in FAMILIES if protocol in names), (protocol,))


def local_path(uri: str) -> str:
    """The absolute path of a local URI: `~` is expanded, `file://` is taken off and its %-escapes undone."""
    if "://" in uri:
        uri = "/" + unescaped(uri.split("://", 1)[1]).partition("/")[2]  # without the host, which is this one
    return os.path.abspath(os.path.expanduser(uri))  # noqa: PTH100, PTH111 (pathlib cannot fold "..")


def storable(uri: str) -> str:
    """An address as it is stored: the same, unless it holds bytes that are not UTF-8 (as lone surrogates).

    `local_path` and `split_member` have them back.
    """
    if _is_text(uri):
        return uri
    if uri.startswith(TAR):
        name, _, file = uri.removeprefix(TAR).rpartition(CHAIN)
        if _is_text(name):
            return f"{TAR}{name}{CHAIN}{storable(file)}"
        return f"{ESCAPED_TAR}{escaped(name)}{CHAIN}{storable(file)}"
    if uri.startswith("parquet://"):
        cell, _, file = uri.rpartition(CHAIN)
        return f"{cell}{CHAIN}{storable(file)}"
    if is_local(uri):
        return "file://" + escaped(local_path(uri))
    return "".join(character if _is_text(character) else escaped(character) for character in uri)


def escaped(name: str) -> str:
    """A name with every byte but letters, digits and `-._~/` as a percent escape."""
    return quote_from_bytes(b"".join(map(_bytes_of, name)), safe="/")


def unescaped(text: str) -> str:
    """The name behind percent escapes; bytes that are not UTF-8 become lone surrogates, as everywhere in Python."""
    return unquote_to_bytes(text.encode("utf-8", "surrogateescape")).decode("utf-8", "surrogateescape")


def _bytes_of(character: str) -> bytes:
    is_byte = "\udc80" <= character <= "\udcff"
    return character.encode("utf-8", "surrogateescape" if is_byte else "surrogatepass")  # halves of pairs: from JSON


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
