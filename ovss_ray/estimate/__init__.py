"""What a job would take, from a timed sample: hours, price, sizes and the stage that binds."""

from ovss_ray.estimate.estimate import Estimate, estimate_job

__all__ = ["Estimate", "estimate_job"]
