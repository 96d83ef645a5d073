"""The job: every setting of a labelling run, typed and validated, from a YAML file or from the command line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ovss_ray.errors import SettingError, explain_invalid, nearest
from ovss_ray.images.addresses import PROTOCOLS, storable
from ovss_ray.images.decoding import DEFAULT_MAX_PIXELS
from ovss_ray.images.limits import DEFAULT_MAX_BYTES, Bytes, Limits, Pixels
from ovss_ray.images.listing import DEFAULT_EXTENSIONS
from ovss_ray.images.reach import check_hosts, check_schemes
from ovss_ray.images.splits import DEFAULT_SPLIT, BenchmarkSplit
from ovss_ray.naming import naming, note_file
from ovss_ray.parsing import load_yaml
from ovss_ray.segmenters.protocols import load_protocol

Auto = Literal["auto"]
LogFormat = Literal["text", "json"]


class EvaluateSpec(BaseModel):
    """`evaluate:` of a job file: the ground truth to score the run against, a benchmark or a folder of label images.

    `ovss-ray evaluate` has flags of these names.

    Construct it with `EvaluateSpec.build`, which turns every invalid value into one `SettingError` sentence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    benchmark: str | None = Field(default=None, description="voc21, cityscapes, ...")
    root: str | None = Field(default=None, min_length=1, description="Folder or bucket of the benchmark's data set.")
    split: str = Field(default=DEFAULT_SPLIT, description="Split of the benchmark.")

    ground_truth: str | None = Field(default=None, min_length=1, description="Folder or bucket of label images.")
    classes: str | list[str] | dict[str, Any] | None = Field(
        default=None, description="Classes of these label images; by default those of the job."
    )
    id_map: str | dict[str | int, str | int] | None = Field(
        default=None, description="What the values of the label images mean: a file, or the mapping itself."
    )
    ignore_index: int | None = Field(default=None, ge=0, description="Value of pixels that do not count.")
    label_suffix: str = Field(default="", description="What label images have behind the name of their image.")
    image_suffix: str = Field(default="", description="What images have behind the name of their label image.")

    boundary: bool = Field(default=True, description="Boundary IoU too.")
    seen: str | list[str] | None = Field(default=None, description="Classes that count as seen, for hIoU.")
    json_file: str | None = Field(default=None, alias="json", description="Where everything is written as JSON.")
    page: str | None = Field(default=None, description="Where a page (HTML) is written.")

    @model_validator(mode="after")
    def _names_one_ground_truth(self) -> EvaluateSpec:
        if (self.benchmark is None) == (self.ground_truth is None):
            raise ValueError("name the ground truth: either benchmark and root, or ground_truth")
        if (self.benchmark is None) != (self.root is None):
            raise ValueError("benchmark and root belong together: the name, and where its data set lies")
        own = ("classes", "id_map", "ignore_index", "label_suffix", "image_suffix")
        foreign = own if self.benchmark is not None else ("split",)
        for name in foreign:
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} is {'' if self.benchmark is None else 'not '}for a benchmark; leave it out")
        return self

    @property
    def images(self) -> BenchmarkSplit | None:
        """The images of the benchmark; None for label images of one's own."""
        if self.benchmark is None or self.root is None:
            return None
        return BenchmarkSplit(self.benchmark, self.split, self.root)

    @classmethod
    def build(cls, values: Any) -> EvaluateSpec:
        """Validate what stands below `evaluate:`.

        Raises:
            SettingError: one sentence with the field, its value and what is allowed.
        """
        if not isinstance(values, Mapping):
            raise SettingError("evaluate must hold 'field: value' lines, such as benchmark and root")
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            fields = [field.alias or name for name, field in cls.model_fields.items()]
            raise explain_invalid(error, source="evaluate", fields=fields) from None


class JobSpec(BaseModel):
    """All settings of one labelling job; the command line's flags and the job file's keys are these field names.

    Construct it with `JobSpec.build`, which turns every invalid value into one `SettingError` sentence.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    input: str = Field(
        min_length=1,
        description="Images: a folder (searched recursively), a glob, WebDataset tars (train-{000..499}.tar), Parquet "
        "files with image bytes, a .txt/.csv/.jsonl/.parquet list of URIs, or the manifest.json of an S3 Inventory; "
        "local, s3://, gs://, az:// or http(s)://. benchmark://voc21/val::DATA: the images of a benchmark's split.",
    )
    run: str = Field(
        min_length=1,
        description="Run directory to create or continue; local or object storage.",
    )
    protocol: str | None = Field(
        default=None,
        description="Published protocol, such as sclip/voc21: method, classes, templates and settings, where no others "
        "are given; `ovss-ray methods --protocols` lists them.",
    )
    classes: str | list[str] | dict[str, Any] = Field(
        description='Vocabulary: "cat,dog,grass", with synonyms "cat: kitten; tabby,dog"; a .txt, .csv, .tsv, .json or '
        ".yaml file; or a shipped name such as voc21."
    )
    background: str | int | None = Field(
        default=None,
        description="Class that pixels below the confidence threshold fall to; "
        "without one they stay unlabelled (or follow the vocabulary file's own rule).",
    )
    templates: str | list[str] | None = Field(
        default=None,
        description="Prompt templates: a shipped set (imagenet_80, single, ...), a file, a text with {}, or a list of "
        "such texts; by default those of the vocabulary file, or imagenet_80.",
    )

    method: str = Field(
        default="maskclip", description="Segmenter; `ovss-ray methods` lists them. Your own: package.module:Class."
    )
    settings: dict[str, Any] = Field(
        default_factory=dict,
        description="Settings of the method, such as crop=0 or prob_thd=0.1; `ovss-ray methods METHOD` explains them.",
    )
    clip: str = Field(
        default="ViT-B-16-quickgelu/openai",
        description='CLIP model: "architecture/tag", "architecture//path/to/weights", or "demo" (shipped, tiny).',
    )
    trust_weights: bool = Field(
        default=False,
        description="Open weights in TorchScript, which run code of their own; OpenAI's files are known and need no "
        "trust.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where the segmenter runs; auto takes the GPU that the worker was given."
    )
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto",
        description="Precision of the networks: float32, float16 or bfloat16; auto is float16 on a GPU, else float32.",
    )

    extensions: tuple[str, ...] = Field(
        default=DEFAULT_EXTENSIONS, min_length=1, description="File extensions that count as images."
    )
    uri_column: str | None = Field(
        default=None, description="Column of a .csv/.jsonl/.parquet list that holds the URIs."
    )
    image_column: str | None = Field(
        default=None, description="Column of Parquet files that holds the bytes of images; by default it is looked for."
    )
    keep_columns: tuple[str, ...] = Field(
        default=(),
        description="Columns of a list or of Parquet files, or fields of WebDataset samples, that are kept with each "
        "image in the column `extra`: caption,license.",
    )
    limit: int | None = Field(default=None, ge=1, description="Label only the first N images.")
    sample: float | None = Field(
        default=None, gt=0, le=1, description="Label a stable random fraction of the images, chosen by hash of the URI."
    )
    max_pixels: Pixels = Field(
        default=DEFAULT_MAX_PIXELS,
        ge=1,
        description="Images with more pixels than this become too_large rows: a number, or 50M.",
    )

    max_bytes: Bytes = Field(
        default=DEFAULT_MAX_BYTES,
        ge=1,
        description="Images of more bytes than this become too_large rows: a number, or 512MiB. Counted while they "
        "arrive and after decompression, so that a stream without end takes no more.",
    )

    label_map: Literal["png", "zstd"] = Field(
        default="png", description="Codec of the label maps: grey PNG (readable everywhere) or zstd (faster)."
    )
    confidence_map: Literal["none", "uint8"] = Field(
        default="none",
        description="uint8 keeps the probability of every pixel's class, to threshold labels by later: about ten times "
        "the size of the label maps, whose codec it shares.",
    )
    components: int | None = Field(
        default=None,
        ge=1,
        description="Describe every connected component of at least so many pixels (box, area, centroid, mask), too.",
    )
    shard_size: int | Auto = Field(
        default="auto",
        description="Images per shard, the unit of work and of retry; auto is 1024, less for small inputs.",
    )

    engine: Literal["ray", "local"] = Field(
        default="ray", description="ray: actors on a cluster or embedded; local: in this process, for debugging."
    )
    ray_address: str | None = Field(
        default=None, description='Ray cluster to join ("auto", "ray://host:10001"); none starts an embedded one.'
    )
    workers: int | Auto = Field(
        default="auto", description="Number of actors; auto is one per GPU, or the CPUs shared out where there is none."
    )
    gpus_per_worker: float | Auto = Field(
        default="auto", description="GPUs reserved per actor (a fraction shares one); auto is 1 where there are any."
    )
    cpus_per_worker: float | Auto = Field(
        default="auto", description="CPUs reserved per actor; auto is 1 beside a GPU, up to 4 without."
    )
    batch_size: int = Field(default=8, ge=1, description="Images per micro-batch; does not change labels.")

    fetch_concurrency: int = Field(default=32, ge=1, description="Requests in flight per shard.")
    fetch_attempts: int = Field(default=5, ge=1, description="Tries per image before it becomes a fetch_failed row.")
    fetch_timeout_s: float = Field(default=60.0, gt=0, description="Seconds before one request counts as failed.")
    prefetch_mib: int = Field(
        default=1024,
        ge=1,
        description="MiB of images in all their forms (fetched, decoding, decoded, segmented) per worker; one image "
        "may be over it: docs/memory.md.",
    )
    decode_threads: int | Auto = Field(default="auto", description="Decoding threads per actor; auto follows the CPUs.")
    max_shard_attempts: int = Field(
        default=3, ge=1, description="Times that a shard may fail before the run stops with its reason."
    )
    batch_timeout_s: float | Auto = Field(
        default="auto",
        description="A micro-batch that takes longer than this, and than twenty average ones, counts as hanging: "
        "its worker is replaced; auto is 120 on a GPU, 900 without.",
    )
    max_failed_fraction: float = Field(
        default=0.2,
        ge=0,
        le=1,
        description="The run stops when more than this fraction of its images fail, first judged as a fraction of the "
        "first thousand; up to 20 failures never stop it, and 1 never stops.",
    )
    log_format: LogFormat = Field(
        default="text", description="Log lines of driver and workers: text, or json (one object a line)."
    )
    allow_schemes: tuple[str, ...] | None = Field(
        default=None,
        description="Protocols that addresses in a list may have: s3,https,file. By default any for a list on the "
        "local disk; for one in a bucket or on a web server its own, and http(s) of public hosts.",
    )
    allow_hosts: tuple[str, ...] | None = Field(
        default=None,
        description="Hosts that are not public and may be asked nevertheless: names, addresses, networks, * for all: "
        "images.corp,10.1.0.0/16. By default any that a list on the local disk names.",
    )
    storage_options: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        repr=False,  # they may hold secrets
        description="fsspec options per protocol, e.g. {s3: {endpoint_url: ...}}, or @FILE that holds them as JSON; "
        "never written to the run directory.",
    )
    evaluate: EvaluateSpec | None = Field(
        default=None,
        description="Ground truth that `ovss-ray run` scores the complete run against; of a benchmark, its images are "
        "the default of `input`. In job files only.",
    )

    @model_validator(mode="before")
    @classmethod
    def _take_images_of_benchmark(cls, values: Any) -> Any:
        if not isinstance(values, Mapping) or values.get("evaluate") is None:
            return values
        evaluate = values["evaluate"]
        if not isinstance(evaluate, EvaluateSpec):
            evaluate = EvaluateSpec.build(evaluate)
        filled = {} if evaluate.images is None else {"input": evaluate.images.uri}
        return {**filled, **values, "evaluate": evaluate}

    @model_validator(mode="before")
    @classmethod
    def _follow_protocol(cls, values: Any) -> Any:
        """What is given wins, so that a stored job, which has all of it, stays as it is."""
        if not isinstance(values, Mapping) or not isinstance(values.get("protocol"), str):
            return values
        protocol = load_protocol(values["protocol"])
        method = values.get("method", protocol.method)
        if method != protocol.method:
            raise SettingError(f"protocol {protocol.name} is for method {protocol.method}, not {method}; leave out one")
        filled = {"method": method, "classes": protocol.classes, "templates": protocol.templates, **values}
        settings = values.get("settings", {})
        return {**filled, "settings": {**protocol.settings, **settings}} if isinstance(settings, Mapping) else filled

    @field_validator("shard_size", "workers", "decode_threads")
    @classmethod
    def _positive_or_auto(cls, value: int | str) -> int | str:
        if isinstance(value, int) and value < 1:
            raise ValueError("must be at least 1, or auto")
        return value

    @field_validator("batch_timeout_s")
    @classmethod
    def _above_zero_or_auto(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value <= 0:
            raise ValueError("must be above 0, or auto")
        return value

    @field_validator("gpus_per_worker", "cpus_per_worker")
    @classmethod
    def _not_negative_or_auto(cls, value: float | str) -> float | str:
        if isinstance(value, float) and value < 0:
            raise ValueError("must not be negative, or auto")
        return value

    @field_validator("allow_schemes")
    @classmethod
    def _know_schemes(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else check_schemes(value)

    @field_validator("allow_hosts")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else check_hosts(value)

    @field_validator("keep_columns", "allow_schemes", "allow_hosts", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        return tuple(name for item in names if (name := str(item).strip())) if isinstance(names, Iterable) else value

    @field_validator("input", "run", mode="before")
    @classmethod
    def _check_address(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        protocol, mark, rest = value.partition(":/")
        if mark and protocol.lower() in PROTOCOLS and not rest.startswith("/"):  # else it would be a folder named "s3:"
            raise ValueError(f"addresses have two slashes: {protocol}://{rest}")
        return storable(value)

    @field_validator("extensions", mode="before")
    @classmethod
    def _split_extensions(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        if not isinstance(names, Iterable):
            return value
        cleaned = (str(name).strip().lower().lstrip(".") for name in names)
        return tuple(name for name in cleaned if name)

    @property
    def limits(self) -> Limits:
        """How large an image may be."""
        return Limits(self.max_pixels, self.max_bytes)

    @property
    def run_name(self) -> str:
        """The last part of the run directory's place: short enough for log lines and metrics."""
        return self.run.rstrip("/").rsplit("/", 1)[-1]

    @classmethod
    def build(cls, values: Mapping[str, Any], *, source: str) -> JobSpec:
        """Validate `values`; `source` names their origin (a file, "command line") in the error.

        Raises:
            SettingError: one sentence with the field, its value and what is allowed.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise explain_invalid(error, source=source, fields=cls.model_fields, named=naming()) from None

    @classmethod
    def from_file(cls, path: str | Path, **overrides: Any) -> JobSpec:
        """Read a job file (YAML); `${NAME}` and `${NAME:-default}` are taken from the environment.

        Args:
            path: the job file.
            overrides: fields that replace those of the file; `settings` and `storage_options` are merged.

        Raises:
            SettingError: the file is missing, is not a mapping, or holds a wrong setting.
        """
        values = _read_yaml(Path(path))
        note_file(values.keys() - overrides.keys())
        for field, value in overrides.items():
            merged = field in ("settings", "storage_options") and isinstance(values.get(field), dict)
            values[field] = {**values[field], **value} if merged else value
        return cls.build(values, source=str(path))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        siblings = [other.name for other in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise SettingError(f"job file {path} does not exist{nearest(path.name, siblings)}") from None
    except UnicodeDecodeError:
        raise SettingError(f"job file {path} is not UTF-8 text; give a YAML file") from None
    except OSError as error:
        raise SettingError(f"job file {path} cannot be read: {error.strerror}") from None
    values = _expand(load_yaml(text, f"job file {path}"), source=str(path))
    if not isinstance(values, dict):
        raise SettingError(f"job file {path} must hold 'field: value' lines, as those in jobs/ do")
    return values


_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


def _expand(value: Any, *, source: str) -> Any:
    if isinstance(value, dict):
        return {key: _expand(item, source=source) for key, item in value.items()}
    if isinstance(value, list):
        return [_expand(item, source=source) for item in value]
    if not isinstance(value, str):
        return value

    def lookup(match: re.Match[str]) -> str:
        name, default = match.groups()
        found = os.environ.get(name, default)
        if found is None:
            raise SettingError(
                f"{source}: ${{{name}}} is not set in the environment; set it, or write a default as ${{{name}:-value}}"
            )
        return found

    expanded = _VARIABLE.sub(lookup, value)
    # "${LIMIT:-100}" stands for the number 100, as it would without the variable.
    return load_yaml(expanded, source) if expanded != value and _VARIABLE.fullmatch(value) else expanded
