"""The command as a user meets it: help, one-sentence errors, exit codes, start-up without heavy imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from ovss_ray.commands.methods import allowed_values, as_typed
from ovss_ray.flags import LISTING
from ovss_ray.run.job import LISTING_SETTINGS
from ovss_ray.segmenters import get_method, method_names, protocol_names
from ovss_ray.spec import JobSpec
from ovss_ray.version import __version__
from tests.processes import ovss_ray

CLIP = "ovss-demo/random"


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for number in range(3):
        Image.new("RGB", (40 + number, 30), (60 * number, 90, 30)).save(folder / f"{number}.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff broken")
    return folder


def test_every_setting_is_a_flag_with_its_description() -> None:
    shown = " ".join(ovss_ray("label", "--help").stdout.split())
    for name in JobSpec.model_fields.keys() - {"input", "run", "evaluate"}:
        assert f"--{name.replace('_', '-')}" in shown
    assert "Exit codes" in shown


@pytest.mark.parametrize(
    "command",
    ["label", "run", "choose", "evaluate", "status", "continue", "extend", "retry", "verify", "methods", "demo"],
)
def test_every_command_explains_itself(command: str) -> None:
    result = ovss_ray(command, "--help")
    assert result.returncode == 0
    assert len(result.stdout) > 200


def test_the_version_needs_no_command() -> None:
    result = ovss_ray("--version")
    assert (result.returncode, result.stdout) == (0, f"ovss-ray {__version__}\n")


def test_help_and_library_import_neither_torch_nor_ray() -> None:
    code = "import sys, ovss_ray, ovss_ray.cli, ovss_ray.run.status"
    code += "; print([name for name in ('torch', 'ray') if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.stdout.strip() == "[]", result.stderr


def test_label_then_status_then_the_same_from_a_job_file(photos: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    flags = [
        "--classes",
        "cat,dog",
        "--clip",
        CLIP,
        "--engine",
        "local",
        "--templates",
        "single",
        "--set",
        "prob_thd=0.2",
    ]
    labelled = ovss_ray("label", str(photos), run, *flags, "--shard-size", "2")
    assert labelled.returncode == 0, labelled.stderr
    assert f"3 of 4 images labelled in {run}" in labelled.stdout
    assert "corrupt" in labelled.stdout

    state = json.loads(ovss_ray("status", run, "--json").stdout)
    assert (state["images_done"], state["shards_done"], state["statuses"]) == (4, 2, {"ok": 3, "corrupt": 1})
    assert "shards  2 of 2 finished" in ovss_ray("status", run).stdout

    job = tmp_path / "job.yaml"
    job.write_text(
        f"input: {photos}\nrun: {run}\nclasses: [cat, dog]\nclip: {CLIP}\nengine: local\ntemplates: single\n"
        "settings: {prob_thd: 0.2}\n"
    )
    again = ovss_ray("run", str(job), "--shard-size", "2")
    assert again.returncode == 0, again.stderr
    assert f"3 of 4 images labelled in {run}" in again.stdout

    refused = ovss_ray("run", str(job), "--classes", "cat,cow")
    assert refused.returncode == 4
    assert "mixing labels is refused" in refused.stderr
    assert "cow" in refused.stderr


def test_extend_offers_the_settings_of_a_listing() -> None:
    assert set(LISTING) == set(LISTING_SETTINGS)


def test_a_run_is_extended_verified_and_labelled_again(tmp_path: Path) -> None:
    photos, run = tmp_path / "photos", str(tmp_path / "run")
    photos.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (40, 30), (90, 30, 60)).save(photos / name)
    (photos / "c.jpg").write_bytes(b"\xff\xd8\xff broken")
    flags = ["--classes", "cat,dog", "--clip", CLIP, "--engine", "local", "--templates", "single", "--shard-size", "2"]
    assert ovss_ray("label", str(photos), run, *flags).returncode == 0

    Image.new("RGB", (40, 30), (90, 30, 60)).save(photos / "d.png")
    planned = ovss_ray("extend", run, "--plan-only")
    assert (planned.returncode, planned.stdout) == (0, f"1 new images added to {run}\n"), planned.stderr
    unfinished = ovss_ray("verify", run)
    assert unfinished.returncode == 5
    assert "missing  shards 2\n" in unfinished.stdout
    state = ovss_ray("status", run).stdout
    assert "shards  2 of 3 finished" in state
    assert "extend  1 images at " in state
    nothing_new = ovss_ray("extend", run, "--batch-size", "3")
    assert nothing_new.returncode == 0, nothing_new.stderr
    assert "nothing to add: the run has every image of the input" in nothing_new.stdout
    assert f"3 of 4 images labelled in {run}" in nothing_new.stdout

    assert "no image failed with timeout" in ovss_ray("retry", run, "--status", "timeout").stdout
    Image.new("RGB", (50, 30), (90, 30, 60)).save(photos / "c.jpg")
    again = ovss_ray("retry", run, "--fetch-attempts", "2")
    assert again.returncode == 0, again.stderr
    assert f"1 images to label again added to {run}" in again.stdout
    assert f"4 of 4 images labelled in {run}" in again.stdout
    sound = ovss_ray("verify", run)
    assert (sound.returncode, "Nothing is missing or damaged." in sound.stdout) == (0, True), sound.stdout

    shard = tmp_path / "run" / "shards" / "00000000.parquet"
    shard.write_bytes(shard.read_bytes()[:-9])
    damaged = ovss_ray("verify", run, "--fast")
    assert damaged.returncode == 6
    assert "damaged  shards/00000000.parquet: it cannot be read" in damaged.stdout
    found = json.loads(ovss_ray("verify", run, "--json", "--remove-damaged").stdout)
    assert (found["removed"], found["exit_code"]) == (["shards/00000000.parquet"], 5)
    repaired = ovss_ray("label", str(photos), run, *flags)
    assert repaired.returncode == 0, repaired.stderr
    assert ovss_ray("verify", run).returncode == 0


def test_storage_options_come_as_json(s3: str, s3_endpoint: str, photos: Path) -> None:
    options = {"key": "test", "secret": "test", "endpoint_url": s3_endpoint}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    given = ["--storage-options", json.dumps({"s3": options})]
    job = ["--classes", "cat,dog", "--clip", CLIP, "--engine", "local", "--templates", "single"]
    for arguments in (["label", str(photos), f"{s3}/run", *job], ["status", f"{s3}/run"], ["verify", f"{s3}/run"],
                      ["retry", f"{s3}/run"], ["extend", f"{s3}/run", "--plan-only"]):  # fmt: skip
        result = ovss_ray(*arguments, *given, env=environment)
        assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["label", "{photos}", "{out}", "--classes", "voc22"], 2, "voc2"),
        (["label", "{photos}", "{out}"], 2, "--classes is missing"),
        (["label", "{photos}", "{out}", "--classes", "cat", "--shard-size", "0"], 2, "--shard-size '0'"),
        (["label", "{photos}", "{out}", "--classes", "cat", "--method", "masklip"], 2, "did you mean 'maskclip'?"),
        (["label", "{photos}", "{out}", "--classes", "cat", "--set", "crop"], 2, "not of the form name=value"),
        (["label", "{photos}", "{out}", "--classes", "cat", "--set", "strid=1"], 2, "did you mean 'stride'?"),
        (["label", "{photos}/none", "{out}", "--classes", "cat", "--clip", CLIP], 3, "none"),
        (["label", "{photos}", "{out}", "--classes", "cat", "--clip", "ViT-B-16-quickgelu//no/such.pt"], 3, "such.pt"),
        (["run", "{out}.yaml"], 2, "does not exist"),
        (["status", "{photos}"], 2, "not a run directory"),
        (["verify", "{photos}"], 2, "not a run directory"),
        (["extend", "{photos}"], 2, "not a run directory"),
        (["retry", "{out}"], 2, "there is no run directory"),
        (["status", "{out}", "--storage-options", "s3"], 2, "--storage-options is not a JSON object"),
        (["status", "{out}", "--storage-options", '{{"key": 1}}'], 2, "is not a group of options for a protocol"),
    ],
)
def test_errors_are_one_sentence_with_a_documented_exit_code(
    photos: Path, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    filled = [text.format(photos=photos, out=tmp_path / "out") for text in arguments]
    result = ovss_ray(*filled)
    assert result.returncode == code, result.stderr
    assert said in result.stderr
    *before, sentence = result.stderr.splitlines()
    assert sentence.startswith("ovss-ray: ")
    assert all(" INFO " in line for line in before), result.stderr
    assert not (tmp_path / "out").exists()


def test_methods_are_listed_with_their_papers() -> None:
    cards = json.loads(ovss_ray("methods", "--json").stdout)
    assert {"clipbase", "maskclip"} <= cards.keys()
    assert cards["maskclip"]["published"]
    assert "maskclip" in ovss_ray("methods").stdout


def test_the_settings_of_a_method_are_explained() -> None:
    record = json.loads(ovss_ray("methods", "naclip", "--json").stdout)
    assert list(record["settings"]) == list(get_method("naclip").Settings.model_fields)
    assert record["title"] == "NACLIP"
    shown = " ".join(ovss_ray("methods", "tagclip").stdout.split())
    assert "max_long_side integer >= 16, <= 4096 1024" in shown
    assert list(json.loads(ovss_ray("methods", "naclip", "--protocols", "--json").stdout)) == [
        name for name in protocol_names() if name.startswith("naclip/")
    ]


@pytest.mark.parametrize("method", method_names())
def test_every_setting_has_values_a_description_and_a_default_that_can_be_typed(method: str) -> None:
    settings = get_method(method).Settings
    for name, schema in settings.model_json_schema()["properties"].items():
        typed = yaml.safe_load(as_typed(schema["default"]))
        assert settings(**{name: typed}) == settings(), name
        assert allowed_values(schema) not in ("", "any"), name
        assert schema["description"].endswith("."), name


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 0.5}, "number > 0, < 0.5"),
        ({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "all"}, {"type": "null"}]}, "integer >= 1 or all"),
        ({"type": "array", "items": {"enum": [16, 32]}}, "list of: 16, 32"),
        ({"type": "boolean"}, "true, false"),
    ],
)
def test_the_values_of_a_setting_are_said_in_words(schema: dict[str, Any], words: str) -> None:
    assert allowed_values(schema) == words


def test_protocols_are_listed_one_a_line() -> None:
    records = json.loads(ovss_ray("methods", "--protocols", "--json").stdout)
    assert records["sclip/voc21"]["settings"]["logit_scale"] == 65
    lines = ovss_ray("methods", "--protocols").stdout.splitlines()
    assert [line.split()[0] for line in lines[: len(records)]] == list(records)
    (line,) = (line for line in lines if line.startswith("clearclip/voc21"))
    assert line.split()[1:3] == ["voc21:clearclip", "imagenet_80"]
    assert "prob_thd=0.5" in line
