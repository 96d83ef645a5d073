"""What an evaluation came to, for the terminal, the page, comparisons and JSON."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ovss_ray.evaluation.metrics import Metrics
from ovss_ray.evaluation.table import ImageScores, Problem


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One run against one ground truth.

    Attributes:
        run: the run directory.
        method, clip, protocol, settings: what the labels were made with; protocol is None if none was followed.
        fingerprint: of the run.
        truth: name of the ground truth, "voc21" or that of a folder.
        truth_root: where it lies.
        kept: folder of the run directory that holds the counts, such as "evaluation/voc21-0123456789ab".
        shards: shards of the run.
        shards_evaluated: how many of them are written, and evaluated.
        expected_images: annotated images of the published split; None for a folder of one's own.
        missing: names of images of the split that are not scored, sorted.
        scores: the metrics.
        images: counts by image: problems, worst and best images of a class, the bootstrap of a comparison.
        warnings: sentences about what makes the scores say less than they seem to.
    """

    run: str
    method: str
    clip: str
    protocol: str | None
    settings: dict[str, Any]
    fingerprint: str
    truth: str
    truth_root: str
    kept: str
    shards: int
    shards_evaluated: int
    expected_images: int | None
    missing: tuple[str, ...]
    scores: Metrics
    images: ImageScores
    warnings: tuple[str, ...] = field(default=())

    @property
    def images_evaluated(self) -> int:
        """Number of scored images."""
        return len(self.images.image_ids)

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Images of the run that are not scored, by reason."""
        return self.images.problems()

    @property
    def is_partial(self) -> bool:
        """Whether shards are not written yet, or images of the split are not scored."""
        fewer = self.expected_images is not None and self.images_evaluated < self.expected_images
        return self.shards_evaluated < self.shards or bool(self.missing) or fewer

    @property
    def exit_code(self) -> int:
        """0 if every image of the split is scored, else 5."""
        return 5 if self.is_partial else 0

    def record(self) -> dict[str, Any]:
        """All of it as JSON holds it: every image that is not scored, with its reason, included."""
        return {
            "run": self.run,
            "method": self.method,
            "clip": self.clip,
            "protocol": self.protocol,
            "settings": self.settings,
            "fingerprint": self.fingerprint,
            "ground_truth": {"name": self.truth, "root": self.truth_root, "images": self.expected_images},
            "kept": self.kept,
            "images_evaluated": self.images_evaluated,
            "shards": self.shards,
            "shards_evaluated": self.shards_evaluated,
            "partial": self.is_partial,
            "exit_code": self.exit_code,
            "scores": self.scores.record(),
            "warnings": list(self.warnings),
            "problems": {problem.status: problem.images for problem in self.problems},
            "unscored_images": self.images.unscored.to_pylist(),
            "missing_images": list(self.missing),
        }
