"""A choice in words, as a record for scripts, and as the command that labels with the winner."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import Any

from rich.table import Table

from ovss_ray.choose.candidates import setting_text
from ovss_ray.choose.choose import Choice
from ovss_ray.printable import printable

_NOT_FOR_LABEL = {"input", "run", "method", "settings", "storage_options", "protocol", "evaluate"}


def choice_table(choice: Choice) -> Table:
    """The candidates, best first."""
    table = Table("candidate", "mean reward", "accepted", "behind (95%)", "", "images/s")
    table.columns[0].overflow = "fold"
    for standing in choice.ranking.standings:
        table.add_row(
            printable(choice.candidates[standing.key].candidate.name),
            f"{standing.mean_reward:.3f}",
            f"{standing.accepted_share:.1%}",
            "" if standing.behind is None else f"{standing.behind.low:+.2f} to {standing.behind.high:+.2f}",
            "best" if standing.behind is None else "tied" if standing.tied else "",
            f"{standing.images_per_s:.1f}",
        )
    return table


def choice_text(choice: Choice, label_command: str) -> str:
    """What the table rests on, what it cannot tell, and what to do next."""
    ranking = choice.ranking
    lines = [f"Compared on {ranking.images:,} images with {ranking.classes:,} classes, {_where_from(choice)}."]
    if choice.image_classes is None:
        lines.append(
            "CLIP finds few of the classes, and what it finds favours coarse masks: --image-classes is better."
        )
    if ranking.too_few_classes:
        lines.append(
            f"Images with fewer than two classes, of which the reward says nothing: {ranking.too_few_classes:,}."
        )
    if ranking.unread:
        number, reason = len(ranking.unread), next(iter(ranking.unread.values()))
        lines.append(f"Images that could not be read, left out for all: {number:,} (e.g. {printable(reason)}).")
    names = {key: settled.candidate.name for key, settled in choice.candidates.items()}
    lines += [
        f"Images that {names[one.key]} failed on, whose classes count as not accepted: {one.unsegmented:,}."
        for one in ranking.standings
        if one.unsegmented
    ]
    tied = [names[one.key] for one in ranking.standings[1:] if one.tied]
    if tied:
        best = choice.best.candidate.name
        lines.append(f"Tied: on this sample {best} cannot be told from {', '.join(tied)}; the fastest of them may do.")
    lines.append(
        "The reward is no accuracy: it asks whether CLIP likes what a mask shows, not what the mask misses "
        "(docs/choosing.md). Look at some labels before a long run:"
    )
    lines.append(f"  {label_command}")
    if choice.spec.storage_options:
        lines.append("  (with --storage-options as here)")
    return "\n".join(lines)


def label_command(choice: Choice) -> str:
    """The command that labels the input with the best candidate; its run directory is to be filled in."""
    words = ["ovss-ray", "label", choice.spec.input, "RUN"]
    for name in sorted(choice.spec.model_fields_set - _NOT_FOR_LABEL):
        words += _flag(f"--{name.replace('_', '-')}", getattr(choice.spec, name))
    words += ["--method", choice.best.candidate.method]
    for name, value in choice.best.candidate.settings.items():
        words += ["--set", f"{name}={setting_text(value)}"]
    return shlex.join(words)


def _flag(flag: str, value: Any) -> list[str]:
    """A flag and its value as the command line reads them back; nothing for what it is without the flag."""
    if value is None or value is False:
        return []
    if value is True:
        return [flag]
    if isinstance(value, tuple):
        text = ",".join(value)
    else:
        text = json.dumps(value, ensure_ascii=False) if isinstance(value, list | dict) else str(value)
    return [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def choice_record(choice: Choice, label_command: str) -> dict[str, Any]:
    """Everything, JSON-ready."""
    ranking = choice.ranking
    return {
        "input": choice.spec.input,
        "clip": choice.clip,
        "judge": choice.judge,
        "image_classes": choice.image_classes or "judge",
        "images": ranking.images,
        "classes": ranking.classes,
        "too_few_classes": ranking.too_few_classes,
        "unread": [{"image_id": number, "error": reason} for number, reason in ranking.unread.items()],
        "candidates": [
            {
                "name": choice.candidates[standing.key].candidate.name,
                "method": choice.candidates[standing.key].candidate.method,
                "settings": dict(choice.candidates[standing.key].candidate.settings),
                **asdict(standing),
            }
            for standing in ranking.standings
        ],
        "label_command": label_command,
    }


def _where_from(choice: Choice) -> str:
    if choice.image_classes is not None:
        return f"given by {choice.image_classes}; judged by {choice.judge}"
    same = " (the model that segments, too)" if choice.judge == choice.clip else ""
    return f"found and judged by {choice.judge}{same}"
