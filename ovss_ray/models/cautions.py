"""Models whose labels mean nothing: good for trying the software out, and easily taken for a result."""

from __future__ import annotations

import json
import re
from functools import cache

from ovss_ray.models.sources import DEMO_FOLDER, WeightsInfo
from ovss_ray.vocabularies.notation import class_text
from ovss_ray.vocabulary import Vocabulary

_NAMES_SHOWN = 10
_COLOURS = {"red", "orange", "yellow", "green", "blue", "purple", "pink", "white", "black", "grey"}
_PLAIN_WORDS = {"a", "an", "the", "small", "large", *_COLOURS}
"""Words beside the names in the captions that the demo's model was trained with."""


def caution(weights: WeightsInfo, vocabulary: Vocabulary) -> str | None:
    """A sentence on why the labels of all or some classes mean nothing; None where they may mean something."""
    if weights.digest.startswith("random:"):
        return f"{weights.clip} has random weights: good for timing, but its labels mean nothing"
    if weights.clip != "demo":
        return None
    foreground = [item for item in vocabulary.classes if item.id != vocabulary.background]
    unseen = [item.name for item in foreground if not any(map(_seen, item.queries))]
    if not unseen:
        return None
    more = f" and {len(unseen) - _NAMES_SHOWN:,} more" if len(unseen) > _NAMES_SHOWN else ""
    named = class_text(unseen[:_NAMES_SHOWN], ", ")
    return (
        f"the demo's CLIP was trained on drawings of {', '.join(_drawn())} alone; it never saw {len(unseen):,} of "
        f"these {len(foreground):,} classes, and their labels mean nothing: {named}{more}"
    )


def _seen(query: str) -> bool:
    words = [word for word in re.findall(r"\w+", query.lower()) if word not in _PLAIN_WORDS]
    return len(words) == 1 and (words[0] in _drawn() or words[0].removesuffix("s") in _drawn())


@cache
def _drawn() -> tuple[str, ...]:
    """What the scenes show that the demo's model was trained on, as the record of its training has it."""
    record = json.loads((DEMO_FOLDER / "training.json").read_text("utf-8"))
    return tuple(next(iter(record["scores"].values()))["class_iou"])
