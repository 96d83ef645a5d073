"""The flags of the command line: one for each field of the job, with its description and default."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo

from ovss_ray.errors import SettingError
from ovss_ray.naming import Naming, use_naming
from ovss_ray.parsing import load_yaml
from ovss_ray.redaction import hide_options
from ovss_ray.spec import JobSpec

Panels = Mapping[str, tuple[str, ...]]

JOB_FLAGS: Panels = {
    "What to label with": ("protocol", "classes", "background", "templates"),
    "Method": ("method", "settings", "clip", "device", "dtype"),
    "Images": ("extensions", "uri_column", "image_column", "keep_columns", "limit", "sample", "max_pixels",
               "max_bytes"),
    "Output": ("label_map", "confidence_map", "components", "shard_size"),
    "Engine": ("engine", "ray_address", "workers", "gpus_per_worker", "cpus_per_worker", "batch_size",
               "fetch_concurrency", "fetch_attempts", "fetch_timeout_s", "prefetch_mib", "decode_threads",
               "max_shard_attempts", "batch_timeout_s", "max_failed_fraction", "log_format"),
    "Weights": ("trust_weights",),
    "Stores": ("allow_schemes", "allow_hosts", "storage_options"),
}  # fmt: skip
"""The fields of `JobSpec` as flags, by the panel of the help text that shows them."""

LISTING = tuple(name for name in JOB_FLAGS["Images"] if name not in ("max_pixels", "max_bytes"))
"""Those that say which images of an input are taken."""

HOW: Panels = {
    "Engine": ("device", *JOB_FLAGS["Engine"]),
    **{panel: JOB_FLAGS[panel] for panel in ("Weights", "Stores")},
}
"""Those that say how to work and change no label."""

_METAVARS = {
    "protocol": "NAME", "classes": "CLASSES", "background": "CLASS", "templates": "TEMPLATES",
    "method": "METHOD", "clip": "MODEL", "dtype": "TYPE", "extensions": "NAMES", "uri_column": "COLUMN",
    "image_column": "COLUMN", "keep_columns": "COLUMNS", "max_pixels": "PIXELS",
    "max_bytes": "BYTES", "ray_address": "ADDRESS",
    "allow_schemes": "NAMES", "allow_hosts": "NAMES", "storage_options": "JSON",
}  # fmt: skip
"""What the flags take that are text of some kind."""

Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, metavar="", show_default=False,
        help="Log what happens, on standard error; -vv: also each image without labels, and why.",
    ),
]  # fmt: skip

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")]
RunPlace = Annotated[str, typer.Argument(metavar="RUN", help="Run directory.")]
StorageOptionsJson = Annotated[
    str | None,
    typer.Option("--storage-options", metavar="JSON", help=JobSpec.model_fields["storage_options"].description),
]


def with_flags(panels: Panels, *, defaults: bool = True) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one flag per field, passed on as the mapping `flags` of those that were given.

    Args:
        panels: the fields.
        defaults: whether the help shows the defaults of new jobs, rather than to say that those of the run hold.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(command, include_extras=True)
        signature = inspect.signature(command)
        own = [p.replace(annotation=hints[p.name]) for p in signature.parameters.values() if p.name != "flags"]
        flags = [
            _flag(name, panel if defaults else f"{panel} (as the run has it, unless given)", defaults)
            for panel, names in panels.items()
            for name in names
        ]

        places = {p.name: p.name.upper() for p in own if isinstance(p.annotation.__metadata__[0], ArgumentInfo)}

        def call(**arguments: Any) -> None:
            use_naming(Naming(flags=True, others=places))
            given = {flag.name: arguments.pop(flag.name) for flag in flags}
            values = {name: value for name, value in given.items() if value is not None and value != []}
            for name, parse in (("settings", _parse_settings), ("storage_options", parse_storage_options)):
                if name in values:
                    values[name] = parse(values[name])
            command(**arguments, flags=values)

        parameters = [*own, *flags]
        call.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        call.__doc__, call.__name__ = command.__doc__, command.__name__
        return call

    return decorate


def parse_storage_options(text: str | None) -> dict[str, Any]:
    """The value of `--storage-options`: a JSON object, as `{"s3": {"endpoint_url": "http://minio:9000"}}`.

    Or "@FILE" with the name of a file that holds one, so that no secret stands in the command line.

    Raises:
        SettingError: it is not one, or the file cannot be read.
    """
    if text is None:
        return {}
    example = 'write for example {"s3": {"endpoint_url": "http://minio:9000"}}, or @FILE with the name of a file'
    try:
        options = json.loads(_content(text))
    except (ValueError, RecursionError) as error:
        # The text may hold secrets, and is not quoted.
        raise SettingError(f"command line: --storage-options is not a JSON object ({error}); {example}") from None
    if not isinstance(options, dict):
        raise SettingError(f"command line: --storage-options is not a JSON object; {example}")
    hide_options(options)
    return options


def _content(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise SettingError(f"command line: --storage-options {text} cannot be read: {reason}") from None


def _flag(name: str, panel: str, with_default: bool) -> inspect.Parameter:
    field = JobSpec.model_fields[name]
    help_text = field.description or ""
    option = "--" + name.replace("_", "-")
    if name == "settings":
        annotation: Any = Annotated[
            list[str] | None,
            typer.Option(
                option, "--set", metavar="NAME=VALUE", help=f"{help_text} May be repeated.", rich_help_panel=panel
            ),
        ]
    elif field.annotation is bool:
        both = f"{option}/{option.replace('--', '--no-', 1)}"  # a job file may say it, and a flag take it back
        annotation = Annotated[bool | None, typer.Option(both, help=help_text, rich_help_panel=panel)]
    else:
        default = field.get_default(call_default_factory=True)
        if with_default and not field.is_required() and default not in (None, {}, ()):
            shown = ", ".join(default) if isinstance(default, tuple) else default
            help_text = f"{help_text} [default: {shown}]"
        metavar = _METAVARS.get(name) or _metavar(field.annotation)
        annotation = Annotated[str | None, typer.Option(option, metavar=metavar, help=help_text, rich_help_panel=panel)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _metavar(annotation: Any) -> str:
    """What a flag takes, from the type of its field: `INT`, `FLOAT|auto`, `png|zstd`."""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return "|".join(_metavar(part) for part in get_args(annotation) if part is not NoneType)
    return {int: "INT", float: "FLOAT"}.get(annotation, "TEXT")


def _parse_settings(pairs: list[str]) -> dict[str, Any]:
    settings = {}
    for pair in pairs:
        name, sign, value = pair.partition("=")
        if not sign or not name.strip():
            raise SettingError(f"command line: --set {pair!r} is not of the form name=value")
        settings[name.strip()] = load_yaml(value, f"command line: the value of --set {name.strip()}")
    return settings
