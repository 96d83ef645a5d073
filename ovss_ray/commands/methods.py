"""`ovss-ray methods`: the methods, the settings of one, and the protocols that were published with them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ovss_ray.flags import AsJson
from ovss_ray.terminal import out, say, say_json

if TYPE_CHECKING:
    from ovss_ray.segmenters import MethodCard, Protocol


_SHOWN = (("voc21", "VOC21"), ("ade20k", "ADE20K"))
"""The benchmarks whose published mIoU the table shows."""


def methods(
    method: Annotated[
        str | None, typer.Argument(metavar="METHOD", help="Explain this one, and every setting of it, for --set.")
    ] = None,
    protocols: Annotated[
        bool, typer.Option("--protocols", help="The published settings of each on each benchmark, for --protocol.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """The segmenters: paper, idea, cost and published mIoU (percent); the settings of one; or with --protocols how
    they were run.

    Example: ovss-ray methods naclip
    """
    if protocols:
        print_protocols(as_json, method)
    elif method is None:
        print_methods(as_json)
    else:
        print_method(method, as_json)


def print_methods(as_json: bool) -> None:
    """All methods, a line each that fits 80 columns, or all that is known of them as JSON; imports none of them."""
    from ovss_ray.report.methods import methods_json
    from ovss_ray.segmenters.cards import cards

    if as_json:
        say_json(methods_json())
        return
    say(_line("method", "published in", "passes", *(label for _, label in _SHOWN), "scenes"))
    for name, card in cards().items():
        published = (_number(card.published.get(benchmark)) for benchmark, _ in _SHOWN)
        number = f"{card.passes}{'+' if card.passes_note else ''}"
        say(_line(name, card.venue, number, *published, _best_scene_score(name)))
    say(
        "",
        "VOC21, ADE20K: mIoU in percent as published; +: and a part of a pass more.",
        "scenes: mIoU on the demo's scenes with the tiny CLIP; it checks that a method",
        "segments, and ranks nothing. docs/methods.md compares what they cost.",
        "ovss-ray methods METHOD: paper, idea, cost and settings of one.",
    )


def _line(method: str, venue: str, *numbers: str) -> str:
    return f"{method:<14}{venue:<28}" + "".join(f"{number:>8}" for number in numbers)


def print_method(name: str, as_json: bool) -> None:
    """What is known of one method and of its settings, as text or as JSON (the settings as JSON schema)."""
    from ovss_ray.report.methods import scene_score
    from ovss_ray.segmenters import get_method

    method = get_method(name)
    settings = method.Settings.model_json_schema().get("properties", {})
    if as_json:
        say_json(asdict(method.card) | {"scene_miou": asdict(scene_score(name)), "settings": settings})
        return
    say(*_about(name, method.card), "")
    table = Table("--set", "values", "default", "what it is", box=None, pad_edge=False)
    for field, schema in settings.items():
        table.add_row(field, allowed_values(schema), as_typed(schema.get("default")), schema.get("description", ""))
    out.print(table)
    say(f"null follows the model or is off, as described. Example: --method {name} --set {next(iter(settings))}=VALUE")


def allowed_values(schema: Mapping[str, Any]) -> str:
    """The values that a setting may have, in words, from its JSON schema: "integer >= 16, <= 8192"."""
    if "anyOf" in schema:
        return " or ".join(allowed_values(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "enum" in schema or "const" in schema:
        return ", ".join(as_typed(value) for value in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of: {allowed_values(schema.get('items', {}))}"
    bounds = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = ", ".join(f"{sign} {schema[key]:g}" for key, sign in bounds.items() if key in schema)
    words = {"boolean": "true, false", "object": "mapping", "string": "text"}
    return f"{words.get(kind, kind)} {limits}".rstrip()


def as_typed(value: Any) -> str:
    """A value of a setting as one types it behind `--set NAME=`."""
    return value if isinstance(value, str) else json.dumps(value)


def _about(name: str, card: MethodCard) -> list[str]:
    from ovss_ray.report.methods import BENCHMARKS, passes

    published = ", ".join(f"{BENCHMARKS.get(key, key)} {value:g}" for key, value in card.published.items())
    return [
        f"{card.title}: {card.paper} ({card.venue}), github.com/{card.repository}",
        card.idea,
        f"models: {', '.join(card.models)}; {'training-free' if card.training_free else 'not training-free'}",
        f"passes per window: {passes(card)}",
        f"mIoU as published: {published or '-'}" + (f" ({card.published_source})" if card.published_source else ""),
        f"mIoU on the demo's scenes: {_best_scene_score(name)}",
        f"status: {card.status}",
    ]


def _best_scene_score(name: str) -> str:
    from ovss_ray.report.methods import scene_score

    scores = scene_score(name)
    best = scores.whole if scores.windows is None else scores.windows
    return "-" if best is None else f"{100 * best:.0f}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def print_protocols(as_json: bool, method: str | None = None) -> None:
    """All protocols, or those of a method, one a line, with the sources below them, or as JSON; imports no method."""
    protocols = _protocols(method)
    if as_json:
        say_json({protocol.name: asdict(protocol) for protocol in protocols})
        return
    for protocol in protocols:
        settings = " ".join(f"{name}={value}" for name, value in protocol.settings.items())
        say(f"{protocol.name:<28} {protocol.classes:<21} {protocol.templates:<12} {settings}")
    for name, source in {p.name.replace(f"/{p.benchmark}", ""): p.source for p in protocols}.items():
        say(f"{name}: {source}")


def _protocols(method: str | None) -> list[Protocol]:
    from ovss_ray.errors import SettingError
    from ovss_ray.segmenters import load_protocol, protocol_names

    known = [load_protocol(name) for name in protocol_names()]
    chosen = [protocol for protocol in known if method in (None, protocol.method)]
    if not chosen:
        have = ", ".join(dict.fromkeys(protocol.method for protocol in known))
        raise SettingError(f"no protocol was published for '{method}', only for {have}")
    return chosen
