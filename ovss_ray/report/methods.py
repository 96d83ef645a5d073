"""The table of methods: what each is, what was published about it, how it does on the synthetic scenes, what it costs.

python -m ovss_ray.report.methods benchmarks/methods.json > docs/methods.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ovss_ray.evaluation.scene_scores import SceneScore, read_record, recorded_scores
from ovss_ray.segmenters.cards import MethodCard, cards

BENCHMARKS = {
    "voc21": "VOC21",
    "context60": "Context60",
    "coco_object": "COCO-Object",
    "voc20": "VOC20",
    "cityscapes": "Cityscapes",
    "context59": "Context59",
    "ade20k": "ADE20K",
    "coco_stuff": "COCO-Stuff",
}
"""The eight benchmarks of the field, by the name of their vocabulary, in the order that papers print them."""

_INTRODUCTION = """\
# Methods

What dense labels can be read off a frozen CLIP with, and what is known about each. `ovss-ray methods` prints the first
tables; this page is made by `python -m ovss_ray.report.methods benchmarks/methods.json > docs/methods.md`.

"""

_PUBLISHED = """
## Published mIoU

Percent, as printed. None of it has been reproduced with this package yet: that takes the weights and the data sets. The
settings behind the numbers are the protocols (`--protocol METHOD/BENCHMARK`).

"""

_SCENES = """
## Scenes and cost

*Windows* slide over the image with half of their size as stride; they are as large as the model's input, those of
ClearCLIP twice that. *Whole* is the whole image in one pass (`--set crop=0`), which every dense method can do: cheaper,
but the tower then sees more patches than it was trained on. Sizes of images and windows are the methods' defaults.

The scene score is the mIoU in percent over {scenes} synthetic scenes with the tiny CLIP that the package ships. It
checks that a method segments and ranks nothing: the tiny CLIP was trained so that its patches can be read as MaskCLIP
reads them.

Inputs are the pictures that enter the vision tower for one image of {height} x {width} pixels (windows, views, crops),
calls are forward calls. Speed is images per second as a share of MaskCLIP's with windows. Memory is what the first call
on two images took beyond the model. Measured by `benchmarks/methods.py` on {machine}, {threads} of them used, beside
other work, so that a tenth means nothing; with {clip} (random weights cost the same), `convclip` with
`convnext_base_w/random`.

"""


def scene_score(method: str) -> SceneScore:
    """The recorded scene score of a method; empty where there is none."""
    return recorded_scores().get(method, SceneScore())


def passes(card: MethodCard) -> str:
    """The forward passes of a method for each window, in words."""
    return f"{card.passes}; {card.passes_note}" if card.passes_note else str(card.passes)


def methods_json() -> dict[str, dict[str, Any]]:
    """All that is known of every method, JSON-ready."""
    return {name: asdict(card) | {"scene_miou": asdict(scene_score(name))} for name, card in cards().items()}


def methods_page(costs: Mapping[str, Any]) -> str:
    """The page docs/methods.md.

    Args:
        costs: what `benchmarks/methods.py` wrote.
    """
    known = cards()
    about = [
        (f"`{name}`", _paper(card), card.idea, ", ".join(card.models), "yes" if card.training_free else "no",
         passes(card), card.status)
        for name, card in known.items()
    ]  # fmt: skip
    published = [
        (f"`{name}`", *(_number(card.published.get(key)) for key in BENCHMARKS), card.published_source or "-")
        for name, card in known.items()
    ]
    first, last = read_record()["test_seeds"]
    height, width = costs["size"]
    scenes = _SCENES.format(
        scenes=last - first + 1,
        height=height,
        width=width,
        clip=f"`{costs['clip']}`",
        machine=costs["machine"],
        threads=costs["threads"],
    )
    return "".join(
        [
            _INTRODUCTION,
            _table(("method", "paper", "idea", "models", "training-free", "passes per window", "status"), about),
            _PUBLISHED,
            _table(("method", *BENCHMARKS.values(), "source"), published),
            scenes,
            _table(
                ("method", "way", "scene score", "inputs", "calls", "speed", "memory, MiB"),
                [row for name in known for row in _cost_rows(name, costs["methods"].get(name, {}))],
            ),
        ]
    )


def _cost_rows(name: str, costs: Mapping[str, Mapping[str, float]]) -> Iterable[tuple[str, ...]]:
    scores = asdict(scene_score(name))
    for way in ("windows", "whole"):
        cost = costs.get(way)
        if cost or scores[way] is not None:
            measured = ("-",) * 4
            if cost:
                measured = (
                    f"{cost['inputs']:g}",
                    f"{cost['calls']:g}",
                    f"{cost['speed']:.2f}",
                    f"{cost['peak_mib']:g}",
                )
            yield (f"`{name}`", way, _number(scores[way], 100), *measured)


def _paper(card: MethodCard) -> str:
    return f"{card.paper} ({card.venue}), [{card.repository}](https://github.com/{card.repository})"


def _number(value: float | None, factor: float = 1) -> str:
    return "-" if value is None else f"{factor * value:.1f}"


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, tuple("---" for _ in header), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


if __name__ == "__main__":
    sys.stdout.write(methods_page(json.loads(Path(sys.argv[1]).read_text())))
