"""A job that is scored in the same go: its ground truth, opened before images are labelled, and its run against it."""

from __future__ import annotations

from ovss_ray.evaluation.classes import class_ids, match_classes
from ovss_ray.evaluation.evaluate import Watch, evaluate_run
from ovss_ray.evaluation.ground_truth import GroundTruth, open_folder_truth, open_ground_truth
from ovss_ray.evaluation.result import Evaluation
from ovss_ray.spec import EvaluateSpec, JobSpec
from ovss_ray.vocabulary import Vocabulary, load_vocabulary


def open_truth(job: JobSpec, evaluate: EvaluateSpec, vocabulary: Vocabulary | None = None) -> GroundTruth:
    """The ground truth that a job names, once its classes are found to be comparable with those of the job.

    Args:
        job: the job.
        evaluate: its ground truth.
        vocabulary: the classes of a run that exists; by default they are read as the job says.

    Raises:
        SettingError: benchmark, split, id map or classes that do not exist or do not fit.
        InputError: there is no ground truth, or its store cannot be read.
    """
    classes = load_vocabulary(job.classes, background=job.background) if vocabulary is None else vocabulary
    if evaluate.images is not None:
        benchmark, split, root = evaluate.images
        truth = open_ground_truth(benchmark, root, split=split, storage_options=job.storage_options)
    else:
        assert evaluate.ground_truth is not None  # either of both is there
        truth = open_folder_truth(
            evaluate.ground_truth,
            classes if evaluate.classes is None else evaluate.classes,
            id_map=evaluate.id_map,
            ignore_index=evaluate.ignore_index,
            label_suffix=evaluate.label_suffix,
            image_suffix=evaluate.image_suffix,
            storage_options=job.storage_options,
        )
    match_classes(classes, truth.vocabulary)
    if evaluate.seen is not None:
        class_ids(_seen_names(evaluate.seen), truth.vocabulary, "seen")
    return truth


def evaluate_job(job: JobSpec, evaluate: EvaluateSpec, truth: GroundTruth, *, watch: Watch | None = None) -> Evaluation:
    """Score the run of a job on the engine of the job; see `evaluate_run`."""
    return evaluate_run(
        job.run,
        truth,
        boundary=evaluate.boundary,
        seen=None if evaluate.seen is None else _seen_names(evaluate.seen),
        engine=job.engine,
        ray_address=job.ray_address,
        storage_options=job.storage_options,
        watch=watch,
    )


def _seen_names(seen: str | list[str]) -> tuple[str, ...]:
    return load_vocabulary(seen).names
