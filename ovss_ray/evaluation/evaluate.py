"""A run against a ground truth, shard by shard: what was counted once is kept, and more shards only add to it."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from ovss_ray.errors import OvssError, SettingError
from ovss_ray.evaluation.classes import ClassMatch, class_ids, match_classes, mixed_up
from ovss_ray.evaluation.ground_truth.truth import GroundTruth
from ovss_ray.evaluation.interval import RESAMPLES, bootstrap_miou
from ovss_ray.evaluation.kept import KeptTables, identity_of
from ovss_ray.evaluation.metrics import Metrics, measure
from ovss_ray.evaluation.result import Evaluation
from ovss_ray.evaluation.scoring import ShardScorer, split_names
from ovss_ray.evaluation.table import REPEATED, ImageScores, gather
from ovss_ray.evaluation.tasks import EngineName, score_shards
from ovss_ray.images.stores import StorageOptions
from ovss_ray.labels.reading import Run, open_run
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.driver import RunInterrupted

Watch = Callable[[int, int], None]

_DRAWN_IMAGES = 20_000_000  # a quarter of a minute
_FEWEST_DRAWS = 100


def evaluate_run(
    run: str,
    truth: GroundTruth,
    *,
    boundary: bool = True,
    seen: Sequence[str] | None = None,
    again: bool = False,
    engine: EngineName = "ray",
    workers: int | None = None,
    ray_address: str | None = None,
    storage_options: StorageOptions | None = None,
    watch: Watch | None = None,
) -> Evaluation:
    """Score the shards of a run that are written and not scored yet, and add everything up.

    The counts of each image are kept in RUN/evaluation, one file per shard, so that a call that was killed goes on
    where it was, and a run that has grown costs the new shards only.

    Args:
        run: the run directory; the run may still be going on.
        truth: see `open_ground_truth` and `open_folder_truth`.
        boundary: count outlines for boundary IoU too; takes two thirds of the time.
        seen: names of the classes that count as seen, for the mean of these, of the others, and the harmonic one.
        again: forget what is kept and count anew, as after files of the ground truth were repaired in place.
        engine, workers, ray_address: see `score_shards`.
        storage_options: fsspec options by protocol, of the run.
        watch: called with the number of shards done so far and the number to do.

    Raises:
        SettingError: there is no such run, it has no class of the ground truth, or none of its images can be scored.
        OvssError: no shard is written yet, or a file of the run, the ground truth or its store cannot be used.
        RunInterrupted: SIGINT arrived.
    """
    with open_run(run, storage_options) as opened, _stopping_by_signal():
        match = match_classes(opened.vocabulary, truth.vocabulary)
        seen_ids = None if seen is None else class_ids(seen, truth.vocabulary, "seen")
        done = opened.shards_done()
        if not done:
            raise OvssError(f"no shard of {run} is written yet; start or continue the run, or wait for the first")
        directory = RunDirectory(run, storage_options)
        kept = KeptTables(directory, truth.name, identity_of(truth, opened.fingerprint, with_boundary=boundary))
        kept.prepare(anew=again)
        footer = {"fingerprint": opened.fingerprint, "identity": kept.digest}
        scorer = ShardScorer(run, storage_options or {}, truth, match, kept.folder, boundary,
                             directory.conditional_put, footer)  # fmt: skip
        scored = kept.shards()
        missing = [shard for shard in done if shard not in scored]
        finished = score_shards(scorer, missing, engine=engine, workers=workers, ray_address=ray_address)
        for number, _ in enumerate(finished, len(done) - len(missing) + 1):
            if watch is not None:
                watch(number, len(done))
        images = gather(kept.tables(done), truth.vocabulary.num_classes, opened.superseded(done))
        _require_images(images, opened, truth)
        scores = _measure(images, truth, seen_ids)
        return _evaluation(opened, truth, match, kept.folder, len(done), scores, images)


@contextmanager
def _stopping_by_signal() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise RunInterrupted(signal.SIGINT, "the shards that were scored are kept") from None


def _require_images(images: ImageScores, run: Run, truth: GroundTruth) -> None:
    if len(images.image_ids):
        return
    problems = images.problems()
    counted = ", ".join(f"{problem.images:,} {problem.status}" for problem in problems)
    example = problems[0].examples[0]
    raise SettingError(
        f"none of the images of {run.uri} can be scored against {truth.name} in {truth.root}: {counted}; "
        f"for example {example.uri}: {example.detail}"
    )


def _measure(images: ImageScores, truth: GroundTruth, seen: Sequence[int] | None) -> Metrics:
    interval, _ = bootstrap_miou(images.counts(), resamples=draws_for(len(images.image_ids)))
    return measure(truth.vocabulary.names, images.confusion(), interval, seen=seen, boundary=images.boundary())


def draws_for(images: int) -> int:
    """How often to draw so many images anew: an interval of more images is narrower, and needs fewer draws."""
    return min(RESAMPLES, max(_FEWEST_DRAWS, _DRAWN_IMAGES // images))


def _evaluation(
    run: Run, truth: GroundTruth, match: ClassMatch, folder: str, done: int, scores: Metrics, images: ImageScores
) -> Evaluation:
    missing = tuple(sorted(split_names(truth).difference(images.names)))
    doubt = mixed_up(images.confusion().counts, truth.vocabulary.names)
    job: dict[str, Any] = run.job
    return Evaluation(
        run=run.uri,
        method=job.get("method", ""),
        clip=job.get("clip", ""),
        protocol=job.get("protocol"),
        settings=job.get("settings") or {},
        fingerprint=run.fingerprint,
        truth=truth.name,
        truth_root=truth.root,
        kept=folder,
        shards=run.num_shards,
        shards_evaluated=done,
        expected_images=truth.expected_images,
        missing=missing,
        scores=scores,
        images=images,
        warnings=(*match.warnings(), *([doubt] if doubt else ()), *_gaps(run, truth, done, missing, images)),
    )


def _gaps(run: Run, truth: GroundTruth, done: int, missing: Sequence[str], images: ImageScores) -> Iterator[str]:
    """What keeps the scores from being those of the whole split, a sentence each."""
    if done < run.num_shards:
        yield (
            f"{run.num_shards - done:,} of {run.num_shards:,} shards are not written yet; continue the run, and give "
            "this command again"
        )
    there = len(truth.names())
    if truth.expected_images is not None and there != truth.expected_images:
        yield f"{truth.root} has {there:,} annotated images of {truth.name}, published are {truth.expected_images:,}"
    if missing:
        yield f"{len(missing):,} images of the ground truth are not scored, such as {shlex.join(missing[:3])}"
    repeated = [problem.images for problem in images.problems() if problem.status == REPEATED]
    if repeated:
        yield f"{repeated[0]:,} images of the run have the name of another one, and only the first of a name counts"
