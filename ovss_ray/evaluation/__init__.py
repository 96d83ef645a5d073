"""How good the labels are: confusion matrices against ground truth."""

from ovss_ray.evaluation.confusion import ConfusionMatrix, confusion_counts

__all__ = ["ConfusionMatrix", "confusion_counts"]
