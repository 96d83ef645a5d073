"""Errors name the flag that was typed, the key of the job file, or the argument; the help says what each flag takes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ovss_ray import cli
from ovss_ray.errors import SettingError
from ovss_ray.run.apart import call_apart
from ovss_ray.segmenters import get_method
from ovss_ray.spec import JobSpec

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a command line in this process; returns exit code, standard output and standard error."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["ovss-ray", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    return run


LABEL = ("label", "photos", "run", "--classes", "a,b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*LABEL, "--batch-size", "0"), "--batch-size '0': should be greater than or equal to 1"),
        ((*LABEL, "--batch-size", "many"), "--batch-size 'many': should be a valid integer"),
        ((*LABEL, "--workers", "0"), "--workers '0': must be at least 1, or auto"),
        ((*LABEL, "--max-pixels", "1X"), "--max-pixels '1X': should be a number, as 50000000 or 50M"),
        ((*LABEL, "--max-pixels", "0M"), "--max-pixels 0: should be greater than or equal to 1"),
        ((*LABEL, "--max-pixels", "1e999"), "--max-pixels '1e999': should be a smaller number, as 50000000 or 50M"),
        ((*LABEL, "--max-bytes", "many"), "--max-bytes 'many': should be a number, as 500000000, 500MB or 512MiB"),
        (("label", "s3:/photos/a", "run"), "INPUT 's3:/photos/a': addresses have two slashes: s3://photos/a"),
        (("label", "photos", "GS:/runs/a"), "RUN 'GS:/runs/a': addresses have two slashes: GS://runs/a"),
        ((*LABEL, "--device", "tpu"), "--device 'tpu': should be 'auto', 'cpu' or 'cuda'"),
        ((*LABEL, "--sample", "2"), "--sample '2': should be less than or equal to 1"),
        ((*LABEL, "--max-failed-fraction", "-1"), "--max-failed-fraction '-1': should be greater"),
        ((*LABEL, "--uri-column", "u", "--image-column", "i"), "--uri-column and --image-column exclude each other"),
        (("label", "photos", "run"), "command line: --classes is missing"),
        (("label", "photos", "", "--classes", "a,b"), "command line: RUN '': should have at least 1 character"),
        (("label", "photos"), "missing argument 'RUN' (ovss-ray label --help lists what there is)"),
        ((*LABEL, "--batchsize", "3"), "has no flag --batchsize; did you mean '--batch-size'?"),
        ((*LABEL, "--set", "crop"), "--set 'crop' is not of the form name=value"),
        ((*LABEL, "--set", "crop=["), "the value of --set crop cannot be read as YAML"),
        (("lable", "photos"), "no such command 'lable'; did you mean 'label'?"),
        (("label", "a.jpg", "b.jpg", "c\x1b[31m.jpg"), r"got unexpected extra argument(s) (c\x1b[31m.jpg)"),
        (
            ("label", "a.jpg", "b.jpg", "run", "--classes", "a,b"),
            "put what holds blanks or wildcards in quotation marks",
        ),
        (("label", "photos", "run", "--classes", "cat,", "dog"), "argument(s) (dog); put what holds blanks"),
        (("label", *(f"{index}.jpg" for index in range(99)), "run"), " 16.jpg 17. ...); put what holds blanks"),
        (("status", "a", "b"), "got unexpected extra argument(s) (b) (ovss-ray status --help"),
        (("evaluate", "run", "--workers", "x"), "invalid value for '--workers': should be a valid integer"),
        (("choose", "photos", "--classes", "a,b"), "missing option '--methods'"),
        (("demo", "folder", "--engine", "spark"), "command line: --engine 'spark': should be 'ray' or 'local'"),
        (("estimate", "--classes", "a,b"), "command line: INPUT is missing"),
    ],
)
def test_the_command_line_is_answered_in_its_own_words(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    code, out, err = command(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("ovss-ray: ")
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_job_file_is_answered_by_its_keys_and_what_replaces_them_by_flags(command: Command, tmp_path: Path) -> None:
    job = tmp_path / "job.yaml"
    job.write_text("input: photos\nrun: run\nclasses: [a, b]\nbatch_size: 0\n")
    assert f"{job}: batch_size = 0: should be greater" in command("run", str(job))[2]
    assert "command line: --batch-size '-1': should be greater" in command("run", str(job), "--batch-size", "-1")[2]
    job.write_text("input: photos\nrun: run\n")
    assert f"command line: --classes is missing (nor does {job} have it)" in command("run", str(job))[2]


def test_python_is_answered_by_its_arguments() -> None:
    with pytest.raises(SettingError, match=r"^here: batch_size = 0: should be greater than or equal to 1$"):
        JobSpec.build({"input": "a", "run": "b", "classes": "c,d", "batch_size": 0}, source="here")


def test_settings_of_a_method_are_called_as_they_are_set_in_another_process_too(command: Command) -> None:
    command("label")  # says how this process was started
    for call in (wrong_setting, lambda: call_apart(wrong_setting)):
        with pytest.raises(SettingError, match=r"^command line: --set crop -5: should be greater than or equal to 0$"):
            call()


def test_an_unknown_setting_is_called_as_it_is_set(command: Command) -> None:
    command("label")
    said = r"^command line: --set krop: there is none among the settings of maskclip; did you mean 'crop'\?$"
    with pytest.raises(SettingError, match=said):
        get_method("maskclip").parse_settings({"krop": 5})


def wrong_setting() -> None:
    get_method("maskclip").parse_settings({"crop": -5})


@pytest.mark.parametrize("name", ["label", "run", "estimate", "choose", "extend", "retry", "continue", "evaluate"])
def test_the_help_says_what_each_flag_takes_and_fits_80_columns(command: Command, name: str) -> None:
    code, shown, _ = command(name, "--help")
    assert code == 0
    assert max(map(len, shown.splitlines())) <= 80
    assert "[default: ]" not in shown
    flags = [line.strip("│ ").split() for line in shown.splitlines() if line.startswith("│ --")]
    taking_nothing = {"--verbose", "--help"}
    for words in flags:
        kind = next((word for word in words[1:] if not word.startswith("-")), "")
        if words[0] not in taking_nothing:
            assert kind.startswith("<") or kind.isupper() or "|" in kind, words
