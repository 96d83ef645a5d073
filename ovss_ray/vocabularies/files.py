"""Reading the files that vocabularies, templates and texts of classes stand in."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import fsspec

from ovss_ray.errors import SettingError, nearest


def read_text(path: str, what: str) -> str:
    """The text of a local or remote file; `SettingError` calls it by `what` where it cannot be read."""
    try:
        with fsspec.open(path, "rb") as stream:
            return cast(bytes, stream.read()).decode("utf-8-sig")
    except FileNotFoundError:
        parent = Path(path).parent
        siblings = [item.name for item in parent.iterdir()] if "://" not in path and parent.is_dir() else []
        raise SettingError(f"the {what} {path} does not exist{nearest(Path(path).name, siblings)}") from None
    except UnicodeDecodeError:
        raise SettingError(f"the {what} {path} is not UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError, ImportError) as error:
        raise SettingError(f"the {what} {path} cannot be read: {error}") from None
