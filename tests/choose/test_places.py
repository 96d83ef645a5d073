"""Calls in this process and as Ray tasks: what comes back, and how failures are told."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray

from ovss_ray.choose.places import Place, open_place
from ovss_ray.errors import OvssError, RunFailedError, SettingError
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import load_vocabulary


def spec_of(engine: str, **settings: Any) -> JobSpec:
    values = {"input": "photos", "run": "RUN", "classes": "cat,dog", "engine": engine, "device": "cpu", **settings}
    return JobSpec.build(values, source="test")


@pytest.fixture(scope="module")
def on_ray() -> Iterator[Place]:
    assert not ray.is_initialized()
    with open_place(spec_of("ray")) as place:
        yield place
    assert not ray.is_initialized()


def test_calls_in_this_process_come_in_order() -> None:
    with open_place(spec_of("local")) as place:
        assert place.device == "cpu"
        assert list(place.calls(math.gcd, {"b": (12, 18), "a": (7, 5), "c": (4, 8)})) == [("b", 6), ("a", 1), ("c", 4)]


def test_every_ray_task_answers_under_its_name(on_ray: Place) -> None:
    assert on_ray.device == "cpu"
    assert dict(on_ray.calls(math.gcd, {"b": (12, 18), "a": (7, 5), "c": (4, 8)})) == {"b": 6, "a": 1, "c": 4}


@pytest.mark.parametrize(
    ("function", "arguments", "kind", "sentence"),
    [
        (load_vocabulary, ("",), SettingError, "the vocabulary is empty"),
        (operator.truediv, (1, 0), RunFailedError, "sclip failed: ZeroDivisionError: division by zero"),
        (os._exit, (3,), RunFailedError, "sclip failed: "),
    ],
)
def test_what_fails_in_a_task_is_told(
    on_ray: Place, function: Callable[..., Any], arguments: tuple[Any, ...], kind: type[OvssError], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        list(on_ray.calls(function, {"sclip": arguments}))


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_gpu_that_is_not_there_is_refused(engine: str, request: pytest.FixtureRequest) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    if engine == "ray":
        request.getfixturevalue("on_ray")
    with pytest.raises(SettingError, match="device = 'cuda'"), open_place(spec_of(engine, device="cuda")):
        pass
