"""A job made definite: every default filled in, the vocabulary read, the weights identified, and its fingerprint."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ovss_ray.errors import RunMismatchError
from ovss_ray.images.addresses import storable
from ovss_ray.images.decoding import DECODING_VERSION
from ovss_ray.images.limits import DEFAULT_MAX_BYTES, Limits
from ovss_ray.images.listing import ImageRef, list_images
from ovss_ray.images.reach import Reach
from ovss_ray.images.splits import parse_split, reach_of
from ovss_ray.images.stores import is_local, local_path
from ovss_ray.labels.additions import Addition, grown
from ovss_ray.labels.layout import FORMAT_VERSION, Manifest
from ovss_ray.run.apart import call_apart
from ovss_ray.run.directory import RunDirectory
from ovss_ray.spec import JobSpec
from ovss_ray.version import __version__
from ovss_ray.vocabulary import Vocabulary, load_vocabulary

BATCH_TIMEOUT_S = {"cuda": 120.0, "cpu": 900.0}

LISTING_SETTINGS = tuple(
    name
    for name in inspect.signature(list_images).parameters
    if name in JobSpec.model_fields and name != "storage_options"
)
"""The settings of a job that say which images of its input it takes; `list_images` has arguments of these names."""

LATER_FIELDS = {name: JobSpec.model_fields[name].default for name in ("confidence_map", "components")}
"""Fields of the identity that runs of older versions do not have, with what they stand for there."""


@dataclass(frozen=True)
class ResolvedSpec:
    """A job whose method, settings, vocabulary and weights were found to exist and to fit each other.

    Attributes:
        spec: the job; its paths are absolute, its settings complete.
        vocabulary: the classes.
        weights_digest: SHA-256 of the weights.
        label_settings: those settings of the method that change labels.
        warnings: what the user should know about the labels before any is made; kept in `run.json`.
    """

    spec: JobSpec
    vocabulary: Vocabulary
    weights_digest: str
    label_settings: dict[str, Any]
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class LabellingJob:
    """All that a worker needs to know; small, and picklable.

    Attributes:
        spec: the job with every default filled in; its limits are those of the run.
        vocabulary: the classes.
        weights_digest: SHA-256 of the weights, which every worker checks.
        manifest: the images.
        fingerprint: SHA-256 over everything that changes the labels.
        conditional_put: whether the store honours "create only if absent".
    """

    spec: JobSpec
    vocabulary: Vocabulary
    weights_digest: str
    manifest: Manifest
    fingerprint: str
    conditional_put: bool

    def reach_of(self, image_id: int) -> Reach:
        """What the address of an image may lead to."""
        source = self.manifest.source_of(image_id) or self.spec.input
        return reach_of(source, self.spec.allow_schemes, self.spec.allow_hosts)

    def limits_of(self, shard: int) -> Limits:
        """How large the images of a shard may be: a retry may allow more than the run."""
        part, _ = self.manifest.place_of(shard)
        return self.manifest.parts[part].limits.over(self.spec.limits)

    @property
    def batch_timeout_s(self) -> float:
        """How long a micro-batch may take before it counts as hanging."""
        asked = self.spec.batch_timeout_s
        return BATCH_TIMEOUT_S[self.spec.device] if asked == "auto" else asked


def images_of(spec: JobSpec) -> Iterator[ImageRef]:
    """List the images of a job; raises as `list_images` and `list_split` do."""
    settings = {name: getattr(spec, name) for name in LISTING_SETTINGS}
    split = parse_split(spec.input)
    if split is None:
        reach = reach_of(spec.input, spec.allow_schemes, spec.allow_hosts)
        return list_images(spec.input, storage_options=spec.storage_options, without=spec.run, reach=reach, **settings)
    from ovss_ray.evaluation.ground_truth.images import list_split

    return list_split(split, storage_options=spec.storage_options, **settings)


def resolve(spec: JobSpec, vocabulary: Vocabulary | None = None) -> ResolvedSpec:
    """Check everything that can be checked before any work starts, and fill in what the method leaves open.

    This takes torch, and with it 600 MB that a driver would carry for days: a process that has not loaded it, and will
    not need it, leaves the checking to another.

    Args:
        spec: the job.
        vocabulary: the classes of a run that exists; by default they are read as the job says.

    Raises:
        SettingError: unknown method, wrong setting of the method, wrong vocabulary or template.
        WeightsError: weights that are missing or do not fit.
    """
    if spec.engine == "local" or "torch" in sys.modules:
        return _resolve(spec, vocabulary)
    return call_apart(_resolve, spec, vocabulary)


def _resolve(spec: JobSpec, vocabulary: Vocabulary | None) -> ResolvedSpec:
    from ovss_ray.models.cautions import caution
    from ovss_ray.models.clip import check_weights
    from ovss_ray.models.sources import resolve_weights, tower_shape
    from ovss_ray.models.text import check_query_lengths
    from ovss_ray.segmenters import get_method

    method = get_method(spec.method)
    given = method.parse_settings(spec.settings)
    if vocabulary is None:
        vocabulary = load_vocabulary(spec.classes, templates=spec.templates, background=spec.background)
    weights = resolve_weights(spec.clip, method.Tower)
    settings = given.resolve(tower_shape(weights.architecture, method.Tower))
    settings.check_vocabulary(vocabulary)
    check_query_lengths(settings.with_all_texts(vocabulary), weights.architecture)
    check_weights(weights.clip, method.Tower, trust_weights=spec.trust_weights)
    updates: dict[str, Any] = {
        **absolute_places(spec),
        "settings": settings.model_dump(mode="json"),
        "clip": weights.clip,
    }
    doubt = caution(weights, vocabulary)
    return ResolvedSpec(
        spec.model_copy(update=updates),
        vocabulary,
        weights.digest,
        settings.label_settings(),
        () if doubt is None else (doubt,),
    )


def absolute_places(spec: JobSpec) -> dict[str, Any]:
    """The fields of a job that name places, as they are stored: so that it can be continued from another folder."""
    updates: dict[str, Any] = {
        "input": _absolute(spec.input),
        "run": storable(local_path(spec.run)) if is_local(spec.run) else spec.run.rstrip("/"),
    }
    if spec.evaluate is not None:  # continued from another folder, it is to be found too
        places = {name: getattr(spec.evaluate, name) for name in ("root", "ground_truth")}
        absolute = {name: _absolute(place) for name, place in places.items() if place is not None}
        updates["evaluate"] = spec.evaluate.model_copy(update=absolute)
    return updates


def _absolute(source: str) -> str:
    split = parse_split(source)
    if split is not None:
        return split.absolute().uri
    return storable(local_path(source)) if is_local(source) else source


def with_dtype(resolved: ResolvedSpec, device: str) -> ResolvedSpec:
    """The job with its precision settled for workers on this device ("cuda" or "cpu"), as `resolve_dtype` would."""
    if resolved.spec.dtype != "auto":
        return resolved
    dtype = "float16" if device == "cuda" else "float32"
    return dataclasses.replace(resolved, spec=resolved.spec.model_copy(update={"dtype": dtype}))


def identity(resolved: ResolvedSpec, manifest: Manifest) -> dict[str, Any]:
    """Everything that changes the labels, field by field; its hash is the fingerprint.

    Batch size, number of workers, retries, devices and credentials are not in it. Nor is the name of a protocol:
    what it stands for is, so that the same settings spelled out give the same fingerprint.
    """
    spec = resolved.spec
    return {
        "input": {
            "place": spec.input,
            "extensions": list(spec.extensions),
            "uri_column": spec.uri_column,
            "image_column": spec.image_column,
            "keep_columns": list(spec.keep_columns),
            "limit": spec.limit,
            "sample": spec.sample,
            "manifest": manifest.digest,
        },
        "shard_size": manifest.shard_size,
        "method": spec.method,
        "settings": resolved.label_settings,
        "clip": spec.clip,
        "weights": resolved.weights_digest,
        "dtype": spec.dtype,
        "vocabulary": json.loads(resolved.vocabulary.to_json()),
        "decoding": {"version": DECODING_VERSION, **spec.limits._asdict()},
        "label_map": spec.label_map,
        **{name: getattr(spec, name) for name in LATER_FIELDS},
        "package_version": __version__,
    }


def fingerprint(fields: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `identity`."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def run_record(resolved: ResolvedSpec, manifest: Manifest, *, created_at: str) -> dict[str, Any]:
    """The content of `run.json`. Storage options are left out: they may hold secrets."""
    fields = identity(resolved, manifest)
    job = resolved.spec.model_dump(mode="json", exclude={"storage_options"})
    return {
        "format_version": FORMAT_VERSION,
        "created_at": created_at,
        "package_version": __version__,
        "fingerprint": fingerprint(fields),
        "identity": fields,
        "warnings": list(resolved.warnings),
        "job": {**job, "shard_size": manifest.shard_size},
        "vocabulary": json.loads(resolved.vocabulary.to_json()),
        "manifest": manifest.to_json(),
    }


def labelling_job(
    resolved: ResolvedSpec, manifest: Manifest, record: Mapping[str, Any], directory: RunDirectory, *, device: str
) -> LabellingJob:
    """What workers are told, once the run exists.

    Args:
        record: the content of its `run.json`.
        device: "cuda" or "cpu", where the workers run.
    """
    return LabellingJob(
        spec=resolved.spec.model_copy(update={"device": device}),
        vocabulary=resolved.vocabulary,
        weights_digest=resolved.weights_digest,
        manifest=manifest,
        fingerprint=record["fingerprint"],
        conditional_put=directory.conditional_put,
    )


def take_over(
    resolved: ResolvedSpec, record: Mapping[str, Any], additions: Sequence[Addition], *, run: str
) -> tuple[ResolvedSpec, Manifest]:
    """Settle what the job leaves to `auto` as the run that is being continued has settled it.

    Raises:
        RunMismatchError: the job differs from the run in a field that changes labels; lists the differences.
    """
    manifest = grown(Manifest.from_json(record["manifest"]), additions)
    stored = {**LATER_FIELDS, **record["identity"]}
    spec = resolved.spec
    updates: dict[str, Any] = {}
    if spec.dtype == "auto":
        updates["dtype"] = stored["dtype"]
    resolved = dataclasses.replace(resolved, spec=spec.model_copy(update=updates))
    fields = identity(resolved, manifest)
    if spec.shard_size != "auto":
        fields["shard_size"] = spec.shard_size
    stored["decoding"] = {"max_bytes": DEFAULT_MAX_BYTES, **stored["decoding"]}
    changes = differences(stored, fields)
    if changes:
        raise RunMismatchError(
            f"{run} was started with other settings, and mixing labels is refused:",
            *(f"  {change}" for change in changes),
            "Use the settings that it was started with, or label into a new run directory.",
        )
    return resolved, manifest


def differences(stored: Mapping[str, Any], asked: Mapping[str, Any]) -> list[str]:
    """One line per field that differs: name, the run's value, the value asked for."""
    before, after = _flatten(stored), _flatten(asked)
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    return [f"{name}: the run has {_short(before.get(name))}, asked for {_short(after.get(name))}" for name in names]


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{name}."))
        elif name == "classes" and isinstance(value, list):
            flat[f"{prefix}names"] = [entry["name"] for entry in value]
            flat.update({f"{prefix}queries of {entry['name']}": entry["queries"] for entry in value})
        else:
            flat[prefix + name] = value
    return flat


def _short(value: Any, longest: int = 100) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= longest else f"{text[:longest]}... ({len(text)} characters)"
