"""Command lines that cannot be parsed, explained in one sentence as all other errors are."""

from __future__ import annotations

import re
from typing import Any

import typer

from ovss_ray.errors import nearest
from ovss_ray.naming import COMMAND_LINE

UsageError: Any = typer.BadParameter.__base__  # which typer names nowhere, and takes from click or brings itself
"""What typer raises for flags and arguments that no command has, that are missing, or of the wrong type."""


_EXTRA = re.compile(r"Got unexpected extra arguments?(?:\(s\))? \((.*)\)", re.DOTALL)
_SHOWN_CHARACTERS = 100


def explain_usage(error: Any) -> str:
    """The sentence: what is wrong, the nearest flag or command if one is meant, and where the help is."""
    context = error.ctx
    command = "ovss-ray" if context is None or context.parent is None else f"ovss-ray {context.info_name}"
    option = getattr(error, "option_name", None)
    if option is not None and hasattr(error, "possibilities"):
        known = [name for part in context.command.params for name in (*part.opts, *part.secondary_opts)]
        flags = [name for name in known if name.startswith("--")]
        said = f"{command} has no flag {option}{nearest(option, flags)}"
    elif (more := _EXTRA.fullmatch(error.format_message())) is not None:
        said = _explain_extra(more[1], context)
    else:
        said = _begin_small(" ".join(error.format_message().split()).rstrip("."))
        said = said.replace(". Did you mean", "; did you mean").replace(": Input should", ": should")
        said = said.partition(", unable to ")[0]
    return f"{COMMAND_LINE}: {said} ({command} --help lists what there is)"


def _explain_extra(given: str, context: Any) -> str:
    """A pattern that the shell has filled in, or a list of classes with blanks, becomes several arguments."""
    shown = given if len(given) <= _SHOWN_CHARACTERS else f"{given[:_SHOWN_CHARACTERS]} ..."
    said = f"got unexpected extra argument(s) ({shown})"
    parts = [] if context is None else context.command.params
    if not any(part.name == "input" and "--input" not in part.opts for part in parts):
        return said
    return (
        f"{said}; put what holds blanks or wildcards in quotation marks ('photos/*.jpg', --classes 'cat, dog'), "
        "or give the folder of the images"
    )


def _begin_small(sentence: str) -> str:
    return sentence[:1].lower() + sentence[1:]
