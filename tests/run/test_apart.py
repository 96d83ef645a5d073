"""Calls in a process of their own, and what a driver leaves to them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ovss_ray.errors import SettingError, WeightsError
from ovss_ray.run.apart import call_apart
from ovss_ray.run.job import _resolve, resolve, with_dtype
from ovss_ray.segmenters import resolve_dtype
from ovss_ray.spec import JobSpec
from tests.run.conftest import CLIP, draw_photos


def _describe(name: str, *, loud: bool = False) -> tuple[str, int, list[str]]:
    if loud:
        sys.stdout.write("a library that prints")
        sys.stdout.flush()
        os.system("echo a program that prints")
    return name, os.getpid(), sys.path


def _refuse(what: str) -> None:
    raise WeightsError(f"{what} is missing")


def _die() -> None:
    os.abort()


def test_a_call_apart_runs_in_another_process_with_the_same_module_path() -> None:
    name, process, path = call_apart(_describe, "an ünusual name", loud=True)
    assert name == "an ünusual name"
    assert process != os.getpid()
    assert path == sys.path


def test_errors_of_a_call_apart_are_passed_on() -> None:
    with pytest.raises(WeightsError, match=r"^the file is missing$"):
        call_apart(_refuse, "the file")
    with pytest.raises(RuntimeError, match="_die failed in a process of its own"):
        call_apart(_die)


DRIVER = """
import sys
from ovss_ray.run.driver import run_job
from ovss_ray.spec import JobSpec
spec = JobSpec.build(dict(input=sys.argv[1], run=sys.argv[2], classes="a,b", templates="single", clip=sys.argv[3],
                          workers=1, cpus_per_worker=1), source="test")
assert run_job(spec).labelled == 4
assert not {"torch", "open_clip"} & set(sys.modules), "the driver has loaded torch"
"""


def test_a_driver_of_ray_workers_never_loads_torch(tmp_path: Path) -> None:
    photos = draw_photos(tmp_path / "photos", 4)
    subprocess.run([sys.executable, "-c", DRIVER, str(photos), str(tmp_path / "run"), CLIP], check=True, timeout=300)


def test_a_job_is_resolved_apart_as_it_is_here(make_spec: Callable[..., JobSpec]) -> None:
    spec = make_spec(engine="ray")
    assert call_apart(_resolve, spec, None) == resolve(spec)
    with pytest.raises(SettingError, match="there is no method 'clipbas'"):
        call_apart(_resolve, make_spec(engine="ray", method="clipbas"), None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_the_drivers_precision_is_that_of_the_segmenters(
    make_spec: Callable[..., JobSpec], dtype: str, device: str
) -> None:
    settled = with_dtype(resolve(make_spec(dtype=dtype)), device).spec.dtype
    assert settled == str(resolve_dtype(dtype, device)).removeprefix("torch.")
