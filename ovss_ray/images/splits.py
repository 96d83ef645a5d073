"""Addresses of the images of a benchmark's split, such as `benchmark://voc21/val::s3://datasets/VOCdevkit`.

Which files they are is known to `evaluation/ground_truth/benchmarks.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from ovss_ray.errors import SettingError
from ovss_ray.images.reach import Reach
from ovss_ray.images.stores import is_local, local_path

_PREFIX, _CHAIN = "benchmark://", "::"
DEFAULT_SPLIT = "val"


class BenchmarkSplit(NamedTuple):
    """The images of a split ("val" ...) of a benchmark whose data set lies below `root`."""

    benchmark: str
    split: str
    root: str

    @property
    def uri(self) -> str:
        """Its address."""
        return f"{_PREFIX}{self.benchmark}/{self.split}{_CHAIN}{self.root}"

    def absolute(self) -> BenchmarkSplit:
        """The same with a root that does not depend on the working directory."""
        return self._replace(root=local_path(self.root) if is_local(self.root) else self.root.rstrip("/"))


def parse_split(uri: str) -> BenchmarkSplit | None:
    """The split that an address names; None for any other input. The split may be left out: "val".

    Raises:
        SettingError: the address begins like one of a benchmark and is none.
    """
    if not uri.startswith(_PREFIX):
        return None
    name, chain, root = uri.removeprefix(_PREFIX).partition(_CHAIN)
    benchmark, _, split = name.partition("/")
    if not benchmark or not chain or not root:
        raise SettingError(f"{uri} names no images; write for example {_PREFIX}voc21/{DEFAULT_SPLIT}{_CHAIN}DATA")
    return BenchmarkSplit(benchmark, split or DEFAULT_SPLIT, root)


def reach_of(source: str, schemes: Sequence[str] | None, hosts: Sequence[str] | None) -> Reach:
    """What the images of an input may be read from: of a split, what a list in its root may name.

    Args:
        source: the input of a job.
        schemes: `allow_schemes` of the job.
        hosts: `allow_hosts` of the job.
    """
    split = parse_split(source)
    place = source if split is None else split.root
    return Reach(place, None if schemes is None else tuple(schemes), None if hosts is None else tuple(hosts))
