"""The facts about methods, read off their files without importing them: a table needs no torch."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ovss_ray.segmenters.registry import METHODS, check_method_name


@dataclass(frozen=True)
class MethodCard:
    """The facts about a published method, for tables and documentation.

    models: kinds of models it runs. passes: forward passes per window; passes_note: what comes on top. published:
    vocabulary name -> mIoU in percent, as printed in `published_source` for `published_model`; only numbers that were
    published. status: what was checked, and what was not.

    In a method's file all of it is written as literals, so that `read_card` finds it.
    """

    title: str
    paper: str
    venue: str
    repository: str
    idea: str
    models: tuple[str, ...]
    passes: int = 1
    passes_note: str = ""
    training_free: bool = True
    published: Mapping[str, float] = field(default_factory=dict)
    published_model: str = "OpenAI CLIP ViT-B/16"
    published_source: str = ""
    status: str = "formulas checked; published mIoU not reproduced yet"


@cache
def read_card(method: str) -> MethodCard:
    """The card of a method that comes with the package, from the text of its file: `card = MethodCard(...)`.

    Raises:
        SettingError: there is no such method.
        ValueError: its card is not made of literals.
    """
    check_method_name(method)
    tree = ast.parse((Path(__file__).parent / f"{method}.py").read_text("utf-8"))
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Assign) else None
        if isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == MethodCard.__name__:
            facts: dict[str, Any] = {str(item.arg): ast.literal_eval(item.value) for item in value.keywords}
            return MethodCard(**facts)
    raise ValueError(f"{method}.py has no card = MethodCard(...)")


def cards() -> dict[str, MethodCard]:
    """The cards of all methods that come with the package, by name."""
    return {name: read_card(name) for name in METHODS}
