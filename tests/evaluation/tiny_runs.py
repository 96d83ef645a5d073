"""Run directories with label maps of one's choice, written by the real shard writer, and their ground truth as PNGs."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ovss_ray.errors import ImageError, InputError
from ovss_ray.evaluation.ground_truth import GroundTruth
from ovss_ray.labels import encode_shard, failed_row, load_schema, summarise
from ovss_ray.labels.additions import Addition
from ovss_ray.labels.layout import Manifest, Part, addition_name
from ovss_ray.vocabulary import Vocabulary, load_vocabulary

SHARD_SIZE = 4
NAMES = ("sky", "grass", "dog", "cat")

Labels = npt.NDArray[Any]


def draw_labels(rng: np.random.Generator, classes: int, *, ignored: int = 255) -> Labels:
    """A map of a few blobs and some ignored pixels; not all classes are in it."""
    height, width = rng.integers(12, 30, 2)
    few = rng.choice(classes, min(classes, 3), replace=False)
    coarse = rng.choice(few, (3, 4))
    labels = np.asarray(Image.fromarray(coarse.astype(np.int32), "I").resize((width, height), Image.Resampling.NEAREST))
    labels = labels.astype(np.uint8 if classes <= 255 else np.uint16)
    labels[rng.random(labels.shape) < 0.1] = ignored
    return labels


def disturb(labels: Labels, rng: np.random.Generator, classes: int, *, ignored: int = 255) -> Labels:
    """What a segmenter might make of it: a third of the pixels drawn anew, some without a label."""
    drawn = rng.integers(0, classes, labels.shape)
    predicted = np.where((rng.random(labels.shape) < 0.3) | (labels == ignored), drawn, labels)
    predicted[rng.random(labels.shape) < 0.05] = ignored
    return predicted.astype(labels.dtype)


@dataclass
class TinyRun:
    """A run over images called a00, a01, ...: the labels of each, None for one that failed.

    Attributes:
        uri: where it lies.
        names: its classes.
        labels: by image.
        retried: image ids of a later shard, which labels them again as `again` says.
    """

    uri: str
    labels: Sequence[Labels | None]
    names: Sequence[str] = NAMES
    retried: Mapping[int, Labels | None] = field(default_factory=dict)

    def write(self, done: Iterable[int] | None = None) -> TinyRun:
        """Write run.json, and the shards in `done` (None: all)."""
        fs, root = fsspec.core.url_to_fs(self.uri)
        parts = [Part("manifest/00000.parquet", len(self.labels))]
        record = {
            "format_version": 1,
            "fingerprint": "f" * 64,
            "job": {"method": "maskclip", "clip": "demo", "protocol": "maskclip/voc21", "settings": {"crop": 0}},
            "vocabulary": json.loads(self.vocabulary.to_json()),
            "manifest": Manifest(SHARD_SIZE, "d" * 64, tuple(parts)).to_json(),
        }
        for folder in ("manifest", "additions", "shards"):
            fs.makedirs(f"{root}/{folder}", exist_ok=True)
        fs.pipe_file(f"{root}/run.json", json.dumps(record).encode())
        shards = [list(enumerate(self.labels))[start : start + SHARD_SIZE] for start in range(0, len(self.labels), 4)]
        if self.retried:
            shards.append(list(self.retried.items()))
            self._add_retry(fs, root)
        for shard in range(len(shards)) if done is None else done:
            rows = [self._row(image_id, labels) for image_id, labels in shards[shard]]
            fs.pipe_file(f"{root}/shards/{shard:08d}.parquet", encode_shard(rows, {"shard_id": str(shard)}))
        return self

    @property
    def vocabulary(self) -> Vocabulary:
        return load_vocabulary(list(self.names))

    def _add_retry(self, fs: Any, root: str) -> None:
        part = Part("manifest/00001-00000000-00000.parquet", len(self.retried))
        rows = [{"image_id": image_id, "uri": uri_of(image_id)} for image_id in self.retried]
        sink = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, load_schema("manifest")), sink, row_group_size=SHARD_SIZE)
        fs.pipe_file(f"{root}/{part.name}", sink.getvalue())
        added = Addition(kind="retry", created_at="", package_version="0", settings={}, images=len(rows), digest="",
                         parts=(part,))  # fmt: skip
        fs.pipe_file(f"{root}/{addition_name(1)}", added.model_dump_json().encode())

    def _row(self, image_id: int, labels: Labels | None) -> Any:
        if labels is None:
            return failed_row(image_id, uri_of(image_id), ImageError("corrupt", "the file ends too early"))
        confidence = np.ones(labels.shape, np.float32)
        return summarise(
            image_id, uri_of(image_id), labels, confidence, confidence, ignore_index=self.vocabulary.ignore_index
        )


def uri_of(image_id: int) -> str:
    return f"s3://photos/{name_of(image_id)}.jpg"


def name_of(image_id: int) -> str:
    return f"a{image_id:02d}"


def write_truth(folder: str, truth: Mapping[int, Labels]) -> str:
    """Label images as PNGs in a folder or a bucket; returns the folder."""
    for image_id, labels in truth.items():
        sink = io.BytesIO()
        Image.fromarray(labels).save(sink, "PNG")
        fs, root = fsspec.core.url_to_fs(folder)
        fs.makedirs(root, exist_ok=True)
        fs.pipe_file(f"{root}/{name_of(image_id)}.png", sink.getvalue())
    return folder


def scored_run(uri: str, truth: str, *, images: int = 10, seed: int = 0) -> tuple[TinyRun, dict[int, Labels]]:
    """A run in shards of four, and its truth, both written."""
    rng = np.random.default_rng(seed)
    labels = {image_id: draw_labels(rng, len(NAMES)) for image_id in range(images)}
    run = TinyRun(uri, [disturb(labels[image_id], rng, len(NAMES)) for image_id in range(images)])
    write_truth(truth, labels)
    return run, labels


class DeadlyTruth(GroundTruth):
    """Ground truth that ends the process which reads image 5, as often as it is told; counts in a file.

    Or, with a sentence, a store that fails with it.
    """

    def __init__(self, truth: GroundTruth, count: Path, times: int, *, says: str | None = None) -> None:
        super().__init__("deadly", truth.vocabulary, truth.root, None)
        object.__setattr__(self, "rest", (truth, count, times, says))

    def names(self) -> tuple[str, ...]:
        return self.rest[0].names()

    def name_of(self, image_uri: str) -> str:
        return self.rest[0].name_of(image_uri)

    def read(self, name: str) -> Labels:
        truth, count, times, says = self.rest
        died = len(count.read_text()) if count.exists() else 0
        if name == name_of(5) and died < times:
            count.write_text("x" * (died + 1))
            if says is not None:
                raise InputError(says)
            os._exit(1)
        return truth.read(name)

    def identity(self) -> dict[str, object]:
        return self.rest[0].identity()
