"""What a file is by its first bytes; names of files are not to be trusted."""

from __future__ import annotations

import codecs
import re
import struct

# "BM" alone begins many a text, so the size of the header that follows it is looked at.
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)

# (format, offset, first bytes): what the decoder reads, and what people hand it by mistake.
_SIGNATURES: tuple[tuple[str, int, bytes], ...] = (
    ("JPEG", 0, b"\xff\xd8\xff"),
    ("PNG", 0, b"\x89PNG\r\n\x1a\n"),
    ("GIF", 0, b"GIF87a"),
    ("GIF", 0, b"GIF89a"),
    ("WEBP", 8, b"WEBP"),
    ("TIFF", 0, b"II*\x00"),
    ("TIFF", 0, b"MM\x00*"),
    ("TIFF", 0, b"II+\x00"),
    ("TIFF", 0, b"MM\x00+"),
    *(("BMP", 14, struct.pack("<I", size)) for size in _BMP_HEADERS),
    ("PSD", 0, b"8BPS"),
    ("EPS", 0, b"%!PS"),
    ("EPS", 0, b"\xc5\xd0\xd3\xc6"),
    ("PDF", 0, b"%PDF"),
    ("Matroska video", 0, b"\x1aE\xdf\xa3"),
    ("JPEG 2000", 0, b"\x00\x00\x00\x0cjP  "),
    ("JPEG 2000", 0, b"\xff\x4f\xff\x51"),
    ("JPEG XL", 0, b"\xff\x0a"),
    ("JPEG XL", 0, b"\x00\x00\x00\x0cJXL "),
    ("OpenEXR", 0, b"\x76\x2f\x31\x01"),
    ("DDS", 0, b"DDS "),
    ("ICO", 0, b"\x00\x00\x01\x00"),
    ("Parquet", 0, b"PAR1"),
    ("NumPy", 0, b"\x93NUMPY"),
    ("ZIP archive", 0, b"PK\x03\x04"),
    ("gzip archive", 0, b"\x1f\x8b"),
    ("DICOM", 128, b"DICM"),
    ("tar archive", 257, b"ustar"),
)
# Of ISO base media files, which all begin alike: the brands that they claim, in their order of precedence.
_BRANDS: tuple[tuple[str, frozenset[bytes]], ...] = (
    ("AVIF", frozenset((b"avif", b"avis"))),
    ("HEIC", frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"))),
)
_HTML = re.compile(rb"<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE)
_SVG = re.compile(rb"<(?:!doctype\s+)?svg\b", re.IGNORECASE)
_PNM = re.compile(rb"P[1-7]\s")


def sniff_format(data: bytes) -> str | None:
    """The format of a file by its content, e.g. "JPEG", "PSD" or "HTML page"; None if it is nothing known."""
    head = data[:1024]
    if head.startswith(b"ftyp", 4):
        return _brand(head)
    for name, offset, signature in _SIGNATURES:
        if head.startswith(signature, offset) and (name != "BMP" or head.startswith(b"BM")):
            return name
    head = head.removeprefix(b"\xef\xbb\xbf")
    head = head.lstrip()
    if _HTML.match(_without(head, (b"<!--", b"-->"))):
        return "HTML page"
    if _SVG.match(_without(head, (b"<!--", b"-->"), (b"<?xml", b"?>"))):
        return "SVG"
    if head.startswith(b"<?xml"):
        return "XML document"
    if head[:1] in (b"{", b"["):
        return "JSON document"
    if _PNM.match(head):
        return "PNM"
    return "text file" if _is_text(head) else None


def _without(head: bytes, *brackets: tuple[bytes, bytes]) -> bytes:
    """What follows the comments, or what else stands in these brackets, that a document begins with.

    Not by a regular expression: a row of comments has exponentially many ways to be one comment or several.
    """
    while True:
        for opening, closing in brackets:
            end = head.find(closing, len(opening)) if head[: len(opening)].lower() == opening else -1
            if end >= 0:
                head = head[end + len(closing) :].lstrip()
                break
        else:
            return head


def _brand(head: bytes) -> str:
    end = min(max(struct.unpack(">I", head[:4])[0], 16), len(head))
    major, *compatible = (head[start : start + 4] for start in (8, *range(16, end - 3, 4)))
    for brands in ({major}, set(compatible)) if major not in (b"mif1", b"msf1") else (set(compatible), {major}):
        for name, known in _BRANDS:
            if brands & known:
                return name
    return "MP4 video"


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # which lets the head end within a character
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\n\r\f" for character in text)
