"""What `ovss-ray methods` prints: the methods, and the protocols that were published with them."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.table import Table

from ovss_ray.terminal import out, say

if TYPE_CHECKING:
    from ovss_ray.segmenters import MethodCard


def print_methods(as_json: bool) -> None:
    """What is known of all methods, as a table or as JSON; imports every method, and torch with it."""
    from ovss_ray.report.methods import cards, methods_json

    if as_json:
        say(json.dumps(methods_json(), indent=1))
        return
    table = Table("method", "paper and idea", "passes", "mIoU as published", "scenes", show_lines=True)
    for name, card in cards().items():
        table.add_row(*_row(name, card))
    out.print(table)
    say("scenes: mIoU on the demo's scenes with the tiny CLIP; a check that a method segments, no ranking")


def _row(name: str, card: MethodCard) -> tuple[str, ...]:
    from ovss_ray.report.methods import BENCHMARKS, passes, scene_score

    free = "training-free" if card.training_free else "[bold]not training-free[/bold]"
    about = f"{card.paper} ({card.venue})\n{card.idea}\n[dim]{', '.join(card.models)}; {free}; {card.status}[/dim]"
    published = ", ".join(f"{BENCHMARKS[key]} {value:g}" for key, value in card.published.items())
    scores = scene_score(name)
    best = scores.whole if scores.windows is None else scores.windows
    return name, about, passes(card), published or "-", "-" if best is None else f"{100 * best:.0f}"


def print_protocols(as_json: bool) -> None:
    """All protocols, one a line, with the sources below them, or as JSON; imports no method."""
    from ovss_ray.segmenters import load_protocol, protocol_names

    protocols = [load_protocol(name) for name in protocol_names()]
    if as_json:
        say(json.dumps({protocol.name: asdict(protocol) for protocol in protocols}, indent=1))
        return
    for protocol in protocols:
        settings = " ".join(f"{name}={value}" for name, value in protocol.settings.items())
        say(f"{protocol.name:<28} {protocol.classes:<21} {protocol.templates:<12} {settings}")
    for name, source in {p.name.replace(f"/{p.benchmark}", ""): p.source for p in protocols}.items():
        say(f"{name}: {source}")
