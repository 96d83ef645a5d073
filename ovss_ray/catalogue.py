"""What `ovss-ray methods` prints: the methods, and the protocols that were published with them."""

from __future__ import annotations

import json
from dataclasses import asdict

from rich.table import Table

from ovss_ray.terminal import out, say


def print_methods(as_json: bool) -> None:
    """The cards of all methods, as a table or as JSON; imports every method, and torch with it."""
    from ovss_ray.segmenters import get_method, method_names

    cards = {name: get_method(name).card for name in method_names()}
    if as_json:
        say(json.dumps({name: asdict(card) for name, card in cards.items()}, indent=1))
        return
    table = Table("method", "paper", "idea", "training-free", "passes", "mIoU as published", show_lines=True)
    for name, card in cards.items():
        scores = ", ".join(f"{benchmark} {value:g}" for benchmark, value in card.published.items())
        table.add_row(name, f"{card.paper} ({card.venue})", card.idea, "yes" if card.training_free else "no",
                      str(card.passes), scores or "-")  # fmt: skip
    out.print(table)


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
