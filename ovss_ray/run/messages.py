"""What a driver says of a job in a line."""

from __future__ import annotations

from ovss_ray.labels.layout import Manifest
from ovss_ray.run.pool import Engine
from ovss_ray.spec import JobSpec

SHOWN_CLASSES = 100  # characters of the classes as they were given


def what_is_asked(spec: JobSpec) -> str:
    """The job in one line."""
    classes = spec.classes if isinstance(spec.classes, str) else ", ".join(map(str, spec.classes))
    if len(classes) > SHOWN_CLASSES:
        classes = f"{classes[:SHOWN_CLASSES]}..."
    return f"Labelling {spec.input} with {spec.method} ({spec.clip}); classes: {classes}; run directory: {spec.run}"


def what_is_ahead(manifest: Manifest, done: int, engine: Engine) -> str:
    """The work in one line: images, shards, workers."""
    workers = engine.capacity()
    kind = "GPU worker" if engine.device == "cuda" else "CPU worker"
    shards = f"{manifest.shards:,} shard{'' if manifest.shards == 1 else 's'}"
    ahead = f"{manifest.images:,} images in {shards}, {workers:,} {kind}{'' if workers == 1 else 's'}"
    return f"{ahead}; {done:,} shards are finished already" if done else ahead


def limit_message(workers: int, reason: str | None) -> str:
    """How many workers are used from now on, for want of memory or again."""
    kept = f"{workers} worker is" if workers == 1 else f"{workers} workers are"
    if reason is None:
        return f"The image that took the memory is found: {kept} used again."
    return f"Workers are killed for want of memory: {kept} used from now on ({reason})."
