"""Reading the files that vocabularies, templates and texts of classes stand in."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import fsspec

from ovss_ray.errors import SettingError, nearest
from ovss_ray.images.formats import sniff_format

MAX_BYTES = 64 << 20

_TEXTS = (None, "text file", "JSON document", "XML document", "PNM")
_KINDS = "give a text, YAML, JSON, CSV or TSV file"


def read_text(path: str, what: str) -> str:
    """The text of a local or remote file; `SettingError` calls it by `what` where it cannot be read."""
    data = _read(path, what)
    if len(data) > MAX_BYTES:
        raise SettingError(f"the {what} {path} has more than {MAX_BYTES >> 20} MiB; {_KINDS} of names")
    kind = sniff_format(data)
    if kind not in _TEXTS:
        raise SettingError(f"the {what} {path} is not text but of another kind ({kind}); {_KINDS}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SettingError(f"the {what} {path} is not UTF-8 text; save it as UTF-8") from None
    if "\0" in text:
        raise SettingError(f"the {what} {path} is not text, it holds zero bytes; {_KINDS}")
    return text


def _read(path: str, what: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as stream:
            return cast(bytes, stream.read(MAX_BYTES + 1))
    except FileNotFoundError:
        parent = Path(path).parent
        siblings = [item.name for item in parent.iterdir()] if "://" not in path and parent.is_dir() else []
        raise SettingError(f"the {what} {path} does not exist{nearest(Path(path).name, siblings)}") from None
    except IsADirectoryError:
        raise SettingError(f"the {what} {path} is a folder; give a file") from None
    except (OSError, ValueError, ImportError) as error:
        raise SettingError(f"the {what} {path} cannot be read: {error}") from None
