"""Ground truth: the label maps that people drew, of the benchmarks of the field and of one's own."""

from ovss_ray.evaluation.ground_truth.benchmarks import BENCHMARKS, open_ground_truth
from ovss_ray.evaluation.ground_truth.errors import (
    AnnotationError,
    ColourAnnotationError,
    DamagedAnnotationError,
    MissingAnnotationError,
    UnknownIdsError,
)
from ovss_ray.evaluation.ground_truth.folder import open_folder_truth
from ovss_ray.evaluation.ground_truth.truth import GroundTruth

__all__ = [
    "BENCHMARKS",
    "AnnotationError",
    "ColourAnnotationError",
    "DamagedAnnotationError",
    "GroundTruth",
    "MissingAnnotationError",
    "UnknownIdsError",
    "open_folder_truth",
    "open_ground_truth",
]
