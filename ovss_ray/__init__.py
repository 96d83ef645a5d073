"""Label millions of images, pixel by pixel, with classes named in plain text: training-free segmentation on Ray.

Names are imported on first use, so that `import ovss_ray` costs nothing: torch and Ray load only where they are needed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ovss_ray.errors import OvssError
from ovss_ray.version import __version__

if TYPE_CHECKING:
    from ovss_ray.labels.reading import open_run
    from ovss_ray.run.driver import run_job
    from ovss_ray.segmenters import Segmentation, Segmenter, load_protocol, load_segmenter, method_names
    from ovss_ray.spec import JobSpec
    from ovss_ray.vocabulary import Vocabulary, load_vocabulary

__all__ = [
    "JobSpec",
    "OvssError",
    "Segmentation",
    "Segmenter",
    "Vocabulary",
    "__version__",
    "load_protocol",
    "load_segmenter",
    "load_vocabulary",
    "method_names",
    "open_run",
    "run_job",
]

_HOMES = {
    "JobSpec": "ovss_ray.spec",
    "Segmentation": "ovss_ray.segmenters",
    "Segmenter": "ovss_ray.segmenters",
    "Vocabulary": "ovss_ray.vocabulary",
    "load_protocol": "ovss_ray.segmenters",
    "load_segmenter": "ovss_ray.segmenters",
    "load_vocabulary": "ovss_ray.vocabulary",
    "method_names": "ovss_ray.segmenters",
    "open_run": "ovss_ray.labels.reading",
    "run_job": "ovss_ray.run.driver",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'ovss_ray' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
