"""Run directories written by the real shard writer, finished or not, local or in an object store."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import fsspec
import numpy as np
import numpy.typing as npt
import pytest

from ovss_ray.errors import ImageError
from ovss_ray.labels import ImageRow, encode_shard, failed_row, summarise
from ovss_ray.labels.layout import Manifest, Part
from ovss_ray.vocabulary import Vocabulary, load_vocabulary

SHARD_SIZE = 8


@dataclass
class WrittenRun:
    """A run directory and what a reader should find in it."""

    uri: str
    vocabulary: Vocabulary
    rows: dict[int, ImageRow] = field(default_factory=dict)  # of the written shards, by image id
    labels: dict[int, npt.NDArray[np.uint8]] = field(default_factory=dict)  # of the labelled images


def draw_row(
    image_id: int, vocabulary: Vocabulary, codec: str, **kept: Any
) -> tuple[ImageRow, npt.NDArray[np.uint8] | None]:
    """Image `image_id` of every test run: its size, labels and fate follow from the number."""
    uri = f"s3://images/{image_id:04d}.jpg"
    if image_id % 7 == 3:
        return failed_row(image_id, uri, ImageError("corrupt", "the file ends too early")), None
    rng = np.random.default_rng(image_id)
    shape = (5 + image_id % 4, 6 + image_id % 3)
    choices = [*range(vocabulary.num_classes), vocabulary.ignore_index]
    labels = rng.choice(choices, shape).astype(vocabulary.label_dtype)
    if image_id % 7 == 5:
        labels[:] = vocabulary.ignore_index
    confidence = rng.random(shape, np.float32)
    row = summarise(
        image_id, uri, labels, confidence, confidence / 2, ignore_index=vocabulary.ignore_index, codec=codec, **kept
    )
    return row, labels


def write_run(
    uri: str,
    *,
    images: int = 21,
    done: tuple[int, ...] | None = None,
    classes: int = 3,
    codec: str = "png",
    confidence: bool = False,
    components: int | None = None,
) -> WrittenRun:
    """Write a run of `images` images in shards of `SHARD_SIZE`, of which only those in `done` (None: all)."""
    kept = {"keep_confidence": confidence, "smallest_component": components}
    vocabulary = load_vocabulary([f"class'{index}" for index in range(classes)])
    fs, root = fsspec.core.url_to_fs(uri)
    shards = -(-images // SHARD_SIZE)
    record = {
        "format_version": 1,
        "fingerprint": "f" * 64,
        "job": {
            "shard_size": SHARD_SIZE,
            "label_map": codec,
            "method": "maskclip",
            "components": components,
            "confidence_map": "uint8" if confidence else "none",
        },
        "vocabulary": json.loads(vocabulary.to_json()),
        "manifest": Manifest(SHARD_SIZE, "d" * 64, (Part("manifest/00000.parquet", images),)).to_json(),
    }
    fs.makedirs(f"{root}/shards", exist_ok=True)
    fs.pipe_file(f"{root}/run.json", json.dumps(record).encode())
    run = WrittenRun(uri, vocabulary)
    for shard in range(shards) if done is None else done:
        rows = []
        for image_id in range(shard * SHARD_SIZE, min((shard + 1) * SHARD_SIZE, images)):
            row, labels = draw_row(image_id, vocabulary, codec, **kept)
            rows.append(row)
            run.rows[image_id] = row
            if labels is not None:
                run.labels[image_id] = labels
        fs.pipe_file(f"{root}/shards/{shard:08d}.parquet", encode_shard(rows, {"shard_id": str(shard)}))
    return run


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest) -> str:
    """Where a run can lie: a new local folder, or an object store; both with characters that globs give a meaning."""
    if request.param == "local":
        return str(request.getfixturevalue("tmp_path") / "run [1]'s")
    return f"{request.getfixturevalue('s3')}/runs/run [1]'s"


@pytest.fixture
def write() -> Callable[..., WrittenRun]:
    return write_run
