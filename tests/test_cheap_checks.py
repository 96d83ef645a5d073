"""Wrong classes, images and run directories are found before torch is imported and weights are looked for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

# In every Python process of the command: whoever imports what weights need, or Ray, says so and fails.
_HOOK = """
import sys
class Forbidden:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "open_clip", "huggingface_hub", "ray"):
            print(name, "must not be imported here", file=sys.stderr, flush=True)
            raise ImportError(name)
sys.meta_path.insert(0, Forbidden())
"""
FLAGS = ("--clip", "ovss-demo/random", "--templates", "single")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, class files and a run of the classes cat and dog; the commands work in it."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "photos").mkdir()
    Image.new("RGB", (40, 30), (90, 30, 60)).save(folder / "photos" / "a.png")
    (folder / "empty").mkdir()
    (folder / "classes.txt").write_text("cat\ndog\n")
    (folder / "table.csv").write_text("cat,dog\n")
    (folder / "file").write_text("")
    command = [sys.executable, "-m", "ovss_ray", "label", "photos", "run", "--classes", "cat,dog", *FLAGS]
    done = subprocess.run([*command, "--engine", "local"], cwd=folder, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    # What was understood is told before anything else happens.
    assert "2 classes (custom): cat, dog; no background; 1 template" in done.stderr
    return folder


CASES = (
    ("label photo new --classes cat,dog", 3, "/photos?); check the path"),
    ("label empty new --classes cat,dog", 3, "no image found in"),
    ("label photos new --classes clases.txt", 2, "did you mean 'classes.txt'?"),
    ("label photos new --classes table.csv", 2, "must begin with a line of headings"),
    ("label photos new --classes cat,dog --background dgo", 2, "did you mean 'dog'?"),
    ("label photos new --classes cat,dog --templates imagenet", 2, "there is no template set 'imagenet'"),
    ("label photos new --classes cat,dog --method nacclip", 2, "did you mean 'naclip'?"),
    ("label photos photos --classes cat,dog", 2, "is the folder of the images"),
    ("label photos file --classes cat,dog", 2, "is a file"),
    ("label photos file/inside --classes cat,dog", 3, "file is not a folder"),
    ("label photos run --classes cat,cow", 4, "mixing labels is refused"),
    ("label empty run --classes cat,dog", 4, "input.place: the run has"),
    ("label photos run --classes cat,dog --method naclip", 4, "method: the run has"),
    ("estimate photo --classes cat,dog", 3, "/photos?); check the path"),
    ("estimate photos --classes clases.txt", 2, "did you mean 'classes.txt'?"),
    ("choose photo --methods naclip --classes cat,dog", 3, "/photos?); check the path"),
    ("choose photos --methods naclip --classes clases.txt", 2, "did you mean 'classes.txt'?"),
    ("choose photos --methods nacclip --classes cat,dog", 2, "did you mean 'naclip'?"),
    ("choose photos --methods naclip --classes cat,dog --out run", 4, "is the directory of a run"),
    ("extend run photo", 3, "/photos?); check the path"),
    ("extend rum photos", 2, "there is no run"),
    ("evaluate rum --ground-truth photos --classes cat,dog", 2, "there is no run"),
    ("evaluate run --ground-truth photos --classes clases.txt", 2, "did you mean 'classes.txt'?"),
)

# One process imports the command and forks for each line of arguments: an import a case would take a minute.
_RUN_ALL = """
import os, pathlib, sys
from ovss_ray.cli import main
for number, arguments in enumerate(sys.argv[1:]):
    if (pid := os.fork()) == 0:
        output = os.open(f"{number}.out", os.O_WRONLY | os.O_CREAT)
        os.dup2(output, 1), os.dup2(output, 2)
        sys.argv = ["ovss-ray", *arguments.split()]
        main()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    pathlib.Path(f"{number}.code").write_text(str(code))
"""


@pytest.fixture(scope="module")
def outcomes(place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """Exit code and output of each case."""
    hook = tmp_path_factory.mktemp("hook")
    (hook / "sitecustomize.py").write_text(_HOOK)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(hook), *sys.path])}
    lines = [arguments + (" " + " ".join(FLAGS) if takes_models(arguments) else "") for arguments, _, _ in CASES]
    subprocess.run([sys.executable, "-c", _RUN_ALL, *lines], cwd=place, env=environment, check=True, timeout=240)
    return {
        arguments: (int((place / f"{number}.code").read_text()), (place / f"{number}.out").read_text())
        for number, (arguments, _, _) in enumerate(CASES)
    }


def takes_models(arguments: str) -> bool:
    return arguments.split()[0] in ("label", "estimate", "choose") and "--templates" not in arguments


@pytest.mark.parametrize(("arguments", "code", "message"), CASES)
def test_it_is_found_without_torch_and_without_weights(
    place: Path, outcomes: dict[str, tuple[int, str]], arguments: str, code: int, message: str
) -> None:
    found, shown = outcomes[arguments]
    assert "must not be imported" not in shown
    assert found == code, shown
    assert message in shown
    assert "Traceback" not in shown
    assert not (place / "new").exists()


def test_the_hook_is_there(place: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_HOOK)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [sys.executable, "-m", "ovss_ray", "label", "photos", "new", "--classes", "cat,dog", *FLAGS]
    result = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=60)
    assert "must not be imported here" in result.stderr
