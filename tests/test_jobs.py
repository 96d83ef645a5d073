"""The job files of the repository are valid jobs, and their overrides work as the flags do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ovss_ray.errors import SettingError
from ovss_ray.run.job import resolve
from ovss_ray.segmenters import get_method, load_protocol
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import load_vocabulary

JOBS = sorted((Path(__file__).parent.parent / "jobs").glob("*.yaml"))


@pytest.mark.parametrize("path", JOBS, ids=lambda path: path.name)
def test_every_job_file_is_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BUCKET", "my-bucket")
    spec = JobSpec.from_file(path)
    assert load_vocabulary(spec.classes, templates=spec.templates, background=spec.background).num_classes > 1
    assert get_method(spec.method).parse_settings(spec.settings)


def test_job_file_and_flags_build_the_same_object(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "input: photos\nrun: out\nclasses: cat,dog\nshard_size: 64\nsettings: {crop: 0}\nextensions: [jpg, PNG]\n"
    )
    flags = {"shard_size": "64", "settings": {"crop": 0}, "extensions": "jpg,.png"}
    from_flags = JobSpec.build({"input": "photos", "run": "out", "classes": "cat,dog", **flags}, source="command line")
    assert JobSpec.from_file(job) == from_flags


def test_flags_replace_fields_of_the_file_and_join_its_settings(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("input: photos\nrun: out\nclasses: cat\nsettings: {crop: 0, logit_scale: 50}\n")
    spec = JobSpec.from_file(job, run="other", settings={"logit_scale": 60})
    assert spec.run == "other"
    assert spec.settings == {"crop": 0, "logit_scale": 60}


def test_variables_come_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("input: ${PLACE}/x\nrun: ${RUN:-out}\nclasses: cat\nlimit: ${LIMIT:-10}\n")
    with pytest.raises(SettingError, match=r"job.yaml: \$\{PLACE\} is not set"):
        JobSpec.from_file(job)
    monkeypatch.setenv("PLACE", "s3://bucket")
    spec = JobSpec.from_file(job)
    assert (spec.input, spec.run, spec.limit) == ("s3://bucket/x", "out", 10)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("input: a\nrun: b\n", "job.yaml: setting 'classes' is missing"),
        ("input: a\nrun: b\nclasses: c\nshard_sise: 3\n", "unknown setting 'shard_sise'; did you mean 'shard_size'"),
        ("input: a\nrun: b\nclasses: c\nshard_size: 0\n", "shard_size = 0: must be at least 1, or auto"),
        ("input: a\nrun: b\nclasses: c\nlabel_map: jpg\n", "label_map = 'jpg': should be 'png' or 'zstd'"),
        ("input: a\nrun: b\nclasses: c\nsample: 1.5\n", "sample = 1.5: should be less than or equal to 1"),
        ("input: a\nrun: b\nclasses: c\ndevice: tpu\n", "device = 'tpu': should be 'auto', 'cpu' or 'cuda'"),
        ("input: a\nrun: b\nclasses: c\nworkers: many\n", "workers = 'many': .*'auto'"),
        ("- a\n- b\n", "must hold 'field: value' lines"),
        ("input: [a\n", "cannot be read as YAML: line 2, column 1: expected"),
        ("input: a\nrun: b\nclases: c\n", "unknown setting 'clases'; did you mean 'classes'"),
    ],
)
def test_a_wrong_job_file_gets_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(text)
    with pytest.raises(SettingError, match=said) as caught:
        JobSpec.from_file(job)
    assert "\n" not in str(caught.value)


def test_a_protocol_sets_what_is_not_given() -> None:
    spec = _following("sclip/voc21")
    assert (spec.method, spec.classes, spec.templates) == ("sclip", "voc21", "imagenet_80")
    assert spec.settings == load_protocol("sclip/voc21").settings


def test_what_is_given_wins_over_the_protocol_setting_by_setting() -> None:
    spec = _following("sclip/voc21", method="sclip", classes="cat,dog", settings={"area_thd": 0, "pamr": 10})
    assert (spec.classes, spec.templates) == ("cat,dog", "imagenet_80")
    assert spec.settings == {**load_protocol("sclip/voc21").settings, "area_thd": 0, "pamr": 10}


def test_a_stored_job_is_not_changed_by_its_protocol() -> None:
    spec = _following("sclip/voc21", settings={"logit_scale": 50, "crop": 0})
    assert JobSpec.build(spec.model_dump(mode="json"), source="run.json") == spec


def test_a_protocol_of_a_file_and_flags_beside_it(tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("input: photos\nrun: out\nprotocol: sclip/voc21\nsettings: {crop: 0}\n")
    spec = JobSpec.from_file(job, protocol="naclip/voc20:pamr", settings={"pamr": 5})
    assert (spec.method, spec.classes) == ("naclip", "voc20")
    assert spec.settings == {**load_protocol("naclip/voc20:pamr").settings, "crop": 0, "pamr": 5}


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"protocol": "sclip/voc2012"}, "test: there is no protocol 'sclip/voc2012'; .*did you mean 'voc2[01]'"),
        ({"protocol": 21}, "test: protocol = 21: should be a valid string"),
        (
            {"protocol": "sclip/voc21", "method": "naclip"},
            "test: protocol sclip/voc21 is for method sclip, not naclip;",
        ),
        ({"protocol": "sclip/voc21", "settings": "crop"}, "test: settings = 'crop': should be a valid dictionary"),
    ],
)
def test_a_wrong_protocol_gets_one_sentence(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said) as caught:
        JobSpec.build({"input": "photos", "run": "out", **fields}, source="test")
    assert "\n" not in str(caught.value)


def _following(protocol: str, **fields: Any) -> JobSpec:
    return JobSpec.build({"input": "photos", "run": "out", "protocol": protocol, **fields}, source="test")


def test_a_missing_job_file_suggests_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "street.yaml").write_text("")
    with pytest.raises(SettingError, match="stret.yaml does not exist; did you mean 'street.yaml'"):
        JobSpec.from_file(tmp_path / "stret.yaml")


def test_resolving_fills_in_what_the_method_leaves_open() -> None:
    values = {"input": "photos", "run": "out", "classes": "voc21", "clip": "ovss-demo/random"}
    resolved = resolve(JobSpec.build(values, source="test"))
    assert Path(resolved.spec.input).is_absolute()
    settings = resolved.spec.settings
    assert (settings["short_side"], settings["crop"], settings["stride"]) == (144, 96, 48)
    assert set(resolved.label_settings) == set(settings) - {"window_batch"}
    assert resolved.vocabulary.names[resolved.vocabulary.background or 0] == "background"


@pytest.mark.parametrize(
    ("written", "meant"),
    [("50M", 50_000_000), ("1.5 MP", 1_500_000), ("2e6", 2_000_000), ("64Ki", 65_536), ("1_000", 1000), (7, 7)],
)
def test_limits_may_have_the_prefix_of_a_unit(written: object, meant: int) -> None:
    job = JobSpec.build({"input": "a", "run": "b", "classes": "a,b", "max_pixels": written}, source="test")
    assert job.max_pixels == meant
