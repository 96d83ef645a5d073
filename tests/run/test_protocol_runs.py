"""A run that follows a published protocol is the run of the settings that the protocol stands for."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from ovss_ray import open_run
from ovss_ray.errors import RunMismatchError
from ovss_ray.run.driver import run_job
from ovss_ray.segmenters import load_protocol
from ovss_ray.spec import JobSpec

MakeSpec = Callable[..., JobSpec]
SMALL = {"short_side": 32, "crop": 32, "stride": 16}


@pytest.fixture
def following(make_spec: MakeSpec) -> MakeSpec:
    """A job by SCLIP's protocol for VOC, on two photos that are made small."""

    def make(**settings: float) -> JobSpec:
        return make_spec(protocol="sclip/voc21", classes="voc21", settings={**SMALL, **settings}, limit=2)

    return make


def test_the_run_holds_what_the_protocol_stands_for(following: MakeSpec, make_spec: MakeSpec) -> None:
    spec = following()
    run_job(spec)
    with open_run(spec.run) as run:
        job, settings = run.job, run.job["settings"]
    assert (job["protocol"], job["method"], job["classes"]) == ("sclip/voc21", "sclip", "voc21")
    assert (settings["logit_scale"], settings["area_thd"], settings["crop"]) == (65, 0.1, 32)
    # The same, spelled out, continues it.
    spelled = {**load_protocol("sclip/voc21").settings, **SMALL}
    again = run_job(make_spec(method="sclip", classes="voc21", settings=spelled, limit=2))
    assert again.images == again.labelled == 2


def test_the_same_command_continues_it_and_another_setting_does_not(following: MakeSpec) -> None:
    run_job(following())
    assert run_job(following()).labelled == 2
    with pytest.raises(RunMismatchError, match=r"settings.logit_scale: the run has 65.0, asked for 50.0"):
        run_job(following(logit_scale=50))
