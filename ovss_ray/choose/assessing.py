"""What is computed where the devices are: the classes that CLIP finds in images, and the reward of a candidate."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from ovss_ray.choose.candidates import SettledCandidate
from ovss_ray.choose.judge import Judge
from ovss_ray.choose.loading import Batch, Setting, load_batches
from ovss_ray.errors import MeaninglessLabelsWarning, RunFailedError
from ovss_ray.run.manifest import ManifestRow
from ovss_ray.run.memory import is_device_lost, is_out_of_memory
from ovss_ray.run.prefetch import Image, LoadedImage
from ovss_ray.segmenters.base import Segmenter
from ovss_ray.segmenters.registry import load_segmenter
from ovss_ray.segmenters.results import Segmentation, TextEmbeddings
from ovss_ray.vocabulary import Vocabulary

log = logging.getLogger(__name__)

_WARM_UP = np.zeros((64, 64, 3), np.uint8)


@dataclass(frozen=True)
class SampledImage:
    """An image of the sample.

    Attributes:
        row: where it is.
        classes: K(I), the ids of its classes; empty if none is known.
        error: why it could not be read when its classes were looked for; None if it could, or was not read.
    """

    row: ManifestRow
    classes: tuple[int, ...]
    error: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What became of one image with one candidate.

    Attributes:
        image_id: of the image.
        status: "ok"; "unread" if the image could not be fetched or decoded; "unsegmented" if the method failed on it.
        error: the reason, if not "ok".
        accepted: for each of its classes, whether the candidate's mask was accepted.
    """

    image_id: int
    status: str
    error: str | None
    accepted: tuple[bool, ...]


@dataclass(frozen=True)
class Assessment:
    """What was found of one candidate.

    Attributes:
        verdicts: by image id.
        seconds: spent in the segmenter, on all images but a made-up one that warmed it up.
        device: "cuda" or "cpu".
    """

    verdicts: tuple[Verdict, ...]
    seconds: float
    device: str


def find_classes(setting: Setting, rows: Sequence[ManifestRow], threshold: float) -> list[SampledImage]:
    """The classes that the judge finds in whole images; see `Judge.present`."""
    judge = _load_judge(setting)
    found: list[SampledImage] = []
    for batch, failed in load_batches(setting, rows):
        found += [SampledImage(image.row, (), _unread(image)) for image in failed]
        if batch:
            present = judge.present([judge.square(pixels) for _, pixels in batch], threshold)
            found += [SampledImage(image.row, ids) for (image, _), ids in zip(batch, present, strict=True)]
    return sorted(found, key=lambda image: image.row.image_id)


def assess(setting: Setting, candidate: SettledCandidate, sample: Sequence[SampledImage]) -> Assessment:
    """Segment the sample with a candidate and have every mask judged.

    Raises:
        SettingError, WeightsError: the method cannot be loaded.
        RunFailedError: the device is lost.
    """
    spec = setting.spec
    segmenter = load_segmenter(
        candidate.candidate.method,
        clip=spec.clip,
        device=spec.device,
        dtype=spec.dtype,
        trust_weights=spec.trust_weights,
        **candidate.settings,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MeaninglessLabelsWarning)  # said once for all candidates
        text = segmenter.encode_vocabulary(setting.vocabulary)
    judge = _load_judge(setting)
    segmenter.segment([_WARM_UP], text)
    classes = {image.row.image_id: image.classes for image in sample}
    verdicts: list[Verdict] = []
    seconds = 0.0
    for batch, failed in load_batches(setting, [image.row for image in sample]):
        verdicts += [Verdict(image.row.image_id, "unread", _unread(image), ()) for image in failed]
        if batch:
            started = time.perf_counter()
            outcomes = _segment(segmenter, [pixels for _, pixels in batch], text)
            seconds += time.perf_counter() - started
            verdicts += _judged(judge, batch, outcomes, classes)
    ordered = sorted(verdicts, key=lambda verdict: verdict.image_id)
    return Assessment(tuple(ordered), seconds, segmenter.device.type)


def _load_judge(setting: Setting) -> Judge:
    spec = setting.spec
    return _judge_of(setting.judge, setting.vocabulary, spec.device, spec.dtype, spec.trust_weights)


@lru_cache(maxsize=1)  # one process assesses many candidates, and to encode the texts can take longer than to judge
def _judge_of(clip: str, vocabulary: Vocabulary, device: str, dtype: str, trust_weights: bool) -> Judge:
    return Judge.load(clip, vocabulary, device=device, dtype=dtype, trust_weights=trust_weights)


def _judged(
    judge: Judge, batch: Batch, outcomes: Sequence[Segmentation | str], classes: Mapping[int, tuple[int, ...]]
) -> list[Verdict]:
    verdicts = []
    masks: list[tuple[int, Image, Segmentation]] = []
    for (image, pixels), outcome in zip(batch, outcomes, strict=True):
        image_id = image.row.image_id
        if isinstance(outcome, Segmentation):
            masks.append((image_id, pixels, outcome))
            continue
        log.warning("segmenting %s failed: %s", image.row.uri, outcome)
        # No label map, no masks: a candidate must not gain by failing.
        verdicts.append(Verdict(image_id, "unsegmented", outcome, (False,) * len(classes[image_id])))
    accepted = judge.accepted(
        [judge.square(pixels) for _, pixels, _ in masks],
        [segmentation.labels for _, _, segmentation in masks],
        [classes[image_id] for image_id, _, _ in masks],
    )
    return verdicts + [
        Verdict(image_id, "ok", None, found) for (image_id, _, _), found in zip(masks, accepted, strict=True)
    ]


def _segment(
    segmenter: Segmenter, images: Sequence[Image], text: TextEmbeddings, *, low_memory: bool = False
) -> list[Segmentation | str]:
    """Label maps, or reasons; a micro-batch that fails is halved, and one image tried again with less memory."""
    try:
        return list(segmenter.segment(images, text, low_memory=low_memory))
    except Exception as error:  # a method may raise anything; it is about the images unless the device is gone
        if is_device_lost(error):
            raise RunFailedError(f"the device failed: {error}") from error
        reason, memory = f"{type(error).__name__}: {error}", is_out_of_memory(error)
    # Not before the exception is gone: its frames hold the tensors.
    if memory and torch.cuda.is_available():
        torch.cuda.empty_cache()
    if len(images) > 1:
        half = len(images) // 2
        return _segment(segmenter, images[:half], text) + _segment(segmenter, images[half:], text)
    if memory and not low_memory:
        return _segment(segmenter, images, text, low_memory=True)
    return [" ".join(reason.split())[:200]]


def _unread(image: LoadedImage) -> str:
    assert image.failure is not None
    return f"{image.failure.status}: {image.failure.reason}"
