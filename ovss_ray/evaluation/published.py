"""Published mIoU of methods on benchmarks, as data in `published.yaml`, by the names that this package uses."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml


@dataclass(frozen=True)
class PublishedScore:
    """One cell of a published table.

    Attributes:
        method: as printed, "NACLIP + PAMR".
        backbone: as printed, "CLIP ViT-B/16"; "" where the source does not say.
        benchmark: name of the vocabulary, "voc21".
        miou: percent, as printed.
        source: title of the paper or name of the repository, and the table.
        setting: what else tells the row from others of the method, "short side 448"; may be "".
        quoted_from: where the source took it from; "" if it is the source's own, or not said.
        trained_on: what the method saw beyond the weights it is built on; "" if nothing, or not said.
        supervised: whether that were label maps.
        note: what to know before comparing; may be "".
    """

    method: str
    backbone: str
    benchmark: str
    miou: float
    source: str
    setting: str = ""
    quoted_from: str = ""
    trained_on: str = ""
    supervised: bool = False
    note: str = ""

    @property
    def label(self) -> str:
        """Method and setting in one."""
        return f"{self.method}, {self.setting}" if self.setting else self.method

    @property
    def remarks(self) -> str:
        """All that qualifies the number, in one line."""
        quoted = f"quoted from the {self.quoted_from}" if self.quoted_from else ""
        trained = f"trained on {self.trained_on}{' with label maps' if self.supervised else ''}"
        return "; ".join(part for part in (quoted, trained if self.trained_on else "", self.note) if part)


def published_for(
    *, method: str | None = None, benchmark: str | None = None, backbone: str | None = None
) -> tuple[PublishedScore, ...]:
    """The published scores that fit, in the order of the tables; all of them if nothing is asked for.

    Args:
        method: a method of this package ("naclip": all rows of it, under any name it is printed with), or a name as
            printed ("NACLIP + PAMR"). A method without published numbers gives nothing.
        benchmark: "voc21" ...; one without published numbers gives nothing.
        backbone: as printed, see `backbone_of`.

    >>> [score.miou for score in published_for(method="gem", benchmark="voc21")]
    [46.2, 44.6]
    """
    scores, names = _published()
    printed = None if method is None else names.get(method, (method,))
    return tuple(
        score
        for score in scores
        if (printed is None or score.method in printed)
        and (benchmark is None or score.benchmark == benchmark)
        and (backbone is None or score.backbone == backbone)
    )


def published_methods() -> Mapping[str, tuple[str, ...]]:
    """The names that a method of this package has in the tables, by its name here."""
    return _published()[1]


_ARCHITECTURE = re.compile(r"ViT-([BLH])-(\d+)(-quickgelu|-336)*")


def backbone_of(clip: str) -> str | None:
    """What the tables call a model, for the weights that they are about: OpenAI's, MetaCLIP's, LAION's ViT-H/14.

    Args:
        clip: "architecture/weights" as for `load_segmenter`.

    Returns:
        "CLIP ViT-B/16" ...; None for any other model.

    >>> backbone_of("ViT-B-16-quickgelu/openai")
    'CLIP ViT-B/16'
    """
    architecture, _, weights = clip.partition("/")
    match = _ARCHITECTURE.fullmatch(architecture)
    if match is None:
        return None
    size = f"ViT-{match[1]}/{match[2]}"
    if weights.startswith("metaclip"):
        return f"MetaCLIP {size}"
    return f"CLIP {size}" if weights == "openai" or (match[1] == "H" and weights.startswith("laion")) else None


@cache
def _published() -> tuple[tuple[PublishedScore, ...], Mapping[str, tuple[str, ...]]]:
    text = (resources.files("ovss_ray.evaluation") / "published.yaml").read_text(encoding="utf-8")
    data: dict[str, Any] = yaml.safe_load(text)
    scores = [
        score
        for table in data["tables"]
        for row in table["rows"]
        for score in _scores(row, f"{data['sources'][table['source']]}, {table['place']}", table.get("note", ""))
    ]
    return tuple(scores), {method: tuple(names) for method, names in data["methods"].items()}


def _scores(row: Mapping[str, Any], source: str, note: str) -> list[PublishedScore]:
    fields = {"backbone": "", **{name: value for name, value in row.items() if name not in ("miou", "notes")}}
    found = []
    for benchmark, miou in row["miou"].items():
        remarks = (row.get("notes", {}).get(benchmark), note)
        found.append(PublishedScore(**fields, benchmark=benchmark, miou=miou, source=source,
                                    note="; ".join(filter(None, remarks))))  # fmt: skip
    return found
