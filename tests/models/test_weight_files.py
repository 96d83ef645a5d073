"""Weight files from anywhere: none runs code, and one that cannot be used ends the job before there is a run."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save as safetensors_bytes

from ovss_ray.choose.choose import Question, choose
from ovss_ray.errors import OvssError, WeightsError
from ovss_ray.estimate import estimate_job
from ovss_ray.models import weight_files
from ovss_ray.models.clip import load_clip
from ovss_ray.models.sources import file_digest, register_demo
from ovss_ray.run.driver import run_job
from ovss_ray.segmenters import load_segmenter, resolve_weights
from ovss_ray.spec import JobSpec
from tests import tiny_models
from tests.weight_archives import save_archive, save_tampered

ARCHITECTURE = "ovss-demo"

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # what torch says of TorchScript


class Attack:
    """Runs a command when it is unpickled."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.victim}",)


def demo_state() -> dict[str, torch.Tensor]:
    path = resolve_weights("demo").path
    assert path is not None
    return weight_files.read_state(Path(path))[0]


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., JobSpec]:
    (tmp_path / "photos").mkdir()
    for number in range(2):
        Image.effect_noise((40, 30), 80).convert("RGB").save(tmp_path / "photos" / f"{number}.png")

    def make(path: Path, **fields: Any) -> JobSpec:
        values = {"input": str(tmp_path / "photos"), "run": str(tmp_path / "run"), "classes": "circle,star"}
        clip = f"{ARCHITECTURE}//{path}"
        return JobSpec.build({**values, "clip": clip, "engine": "local", "templates": "single", **fields}, source="t")

    return make


def pickled_attack(folder: Path, victim: Path) -> Path:
    torch.save({"state_dict": {"visual.proj": torch.zeros(2)}, "args": Attack(victim)}, folder / "epoch_9.pt")
    return folder / "epoch_9.pt"


def scripted_attack(folder: Path, victim: Path) -> Path:
    return save_tampered(folder / "ViT-B-16.pt", victim)


def scripted_attack_under_another_name(folder: Path, victim: Path) -> Path:
    return save_tampered(folder / "model.safetensors", victim)


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        (pickled_attack, "holds more than tensors (posix.system) and is not opened for safety"),
        (scripted_attack, "is a TorchScript archive, which runs code of its own when it is opened"),
    ],
)
def test_label_does_not_run_what_is_in_a_weight_file(
    tmp_path: Path, job: Callable[..., JobSpec], attack: Callable[[Path, Path], Path], said: str
) -> None:
    victim = tmp_path / "victim"
    spec = job(attack(tmp_path, victim))
    flags = ["--classes", "circle,star", "--templates", "single", "--engine", "local", "--clip", spec.clip]
    command = [sys.executable, "-m", "ovss_ray", "label", spec.input, spec.run, *flags]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert result.returncode == 3, result.stderr
    assert "Traceback" not in result.stderr
    assert said in result.stderr.splitlines()[-1]
    assert not victim.exists()
    assert not Path(spec.run, "run.json").exists()


@pytest.mark.parametrize("attack", [pickled_attack, scripted_attack, scripted_attack_under_another_name])
def test_every_door_leaves_it_alone(
    tmp_path: Path, job: Callable[..., JobSpec], attack: Callable[[Path, Path], Path]
) -> None:
    victim = tmp_path / "victim"
    spec = job(attack(tmp_path, victim))
    doors: list[Callable[[], object]] = [
        lambda: load_segmenter("maskclip", clip=spec.clip),
        lambda: run_job(spec),
        lambda: estimate_job(spec),
        lambda: choose(spec, Question(["maskclip"])),
        lambda: choose(spec.model_copy(update={"clip": "demo"}), Question(["maskclip"], judge=spec.clip)),
    ]
    for door in doors:
        with pytest.raises(WeightsError):
            door()
    assert not victim.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["photos", Path(spec.clip).name])


def test_the_torchscript_of_these_tests_does_something_when_it_is_opened(tmp_path: Path) -> None:
    torch.jit.load(str(save_tampered(tmp_path / "w.pt", tmp_path / "victim")))  # type: ignore[no-untyped-call]
    assert (tmp_path / "victim").exists()


def test_torchscript_that_is_vouched_for_labels_and_leaves_the_fingerprint(
    tmp_path: Path, job: Callable[..., JobSpec]
) -> None:
    register_demo()
    model = open_clip.create_model(ARCHITECTURE, pretrained=resolve_weights("demo").path)
    path = save_archive(tmp_path / "w.pt", model, openai=False)
    with pytest.raises(WeightsError, match="--trust-weights"):
        run_job(job(path))
    assert run_job(job(path, trust_weights=True)).labelled == 2
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["job"]["trust_weights"] is True
    assert "trust" not in json.dumps(record["identity"])
    assert record["identity"]["weights"] == file_digest(path)


def test_openais_archives_are_known_by_their_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = weight_files.openai_digests()
    assert "40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af" in known  # ViT-B/32
    assert len(known) == 9
    register_demo()
    path = save_archive(tmp_path / "w.pt", open_clip.create_model(ARCHITECTURE))
    published = {"url": f"https://openaipublic.azureedge.net/clip/models/{file_digest(path)}/w.pt"}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED["ViT-B-16"], "test", published)
    weight_files.openai_digests.cache_clear()
    try:
        state, is_openai = weight_files.read_state(path)
    finally:
        weight_files.openai_digests.cache_clear()
    assert is_openai
    assert "visual.proj" in state


def zipped(**members: bytes) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(f"archive/{name}.pkl", content)
    return data.getvalue()


def arrays() -> bytes:
    data = io.BytesIO()
    np.savez(data, weight=np.zeros(3))
    return data.getvalue()


def tarred() -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("model.safetensors"))
    return data.getvalue()


def saved(content: object, **how: Any) -> bytes:
    data = io.BytesIO()
    torch.save(content, data, **how)
    return data.getvalue()


SAFE = safetensors_bytes({"visual.proj": torch.zeros(64, 64)})
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:5806e77c\nsize 351\n"
FOREIGN: list[tuple[str, bytes, str]] = [
    ("w.pt", b"", "is empty"),
    ("w.safetensors", LFS, "is a Git LFS pointer, not the weights; run `git lfs pull`"),
    ("w.pt", b"<!DOCTYPE html><html><body>403</body></html>", "is a web page, not weights"),
    ("w.bin", b"\n<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "is a web page, not weights"),
    (
        "w.bin",
        b'{"error": "Invalid credentials"}\x1b[2J',
        'is a text that begins with \'{"error": "Invalid credentials',
    ),
    ("w.safetensors", SAFE[:-9], f"is cut off: it has {len(SAFE) - 9:,} of {len(SAFE):,} bytes"),
    ("w.safetensors", SAFE[:40], "is cut off: it has 40 of "),
    ("w.safetensors", (200).to_bytes(8, "little") + b"{" + b" " * 300, "cannot be read"),
    ("w.pt", saved({"a": torch.zeros(999)})[:-99], "is cut off or damaged"),
    ("w.pt", saved({"a": torch.zeros(9)}, _use_new_zipfile_serialization=False)[:-9], "cannot be read"),
    ("w.npz", arrays(), "is a NumPy archive (.npz)"),
    ("w.ckpt", zipped(data=b"x" * 999), "is a zip archive without weights"),
    ("w.h5", b"\x89HDF\r\n\x1a\n" + b"\0" * 99, "is an HDF5 file"),
    ("w.pt", tarred(), "is a tar archive; unpack it first"),
    ("w.pt.gz", b"\x1f\x8b\x08" + b"\0" * 99, "is compressed with gzip; unpack it first"),
    ("w.pt", b"\xff\xd8\xff\xe0 a photo", "is in no format of weights that is read here"),
    ("w.pt", saved([1, 2]), "holds no named tensors"),
    ("w.ckpt", saved({"epoch": 3, "state_dict": {}}), "holds no named tensors"),
]


@pytest.mark.parametrize(("name", "content", "said"), FOREIGN, ids=[f"{name}-{said}" for name, _, said in FOREIGN])
def test_a_file_that_holds_no_weights_is_called_what_it_is(
    tmp_path: Path, job: Callable[..., JobSpec], name: str, content: bytes, said: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(WeightsError, match="^[^\n\x1b]*$") as caught:
        run_job(job(tmp_path / name))
    assert str(caught.value).startswith(f"the weight file {tmp_path / name} ")
    assert said in str(caught.value)
    assert caught.value.exit_code == 3
    assert not (tmp_path / "run").exists()


def lacks_some(state: dict[str, torch.Tensor]) -> None:
    for name in sorted(state)[:5]:
        del state[name]


def of_the_transformers_library(state: dict[str, torch.Tensor]) -> None:
    state.clear()
    state["vision_model.embeddings.class_embedding"] = torch.zeros(4)


def with_holes(state: dict[str, torch.Tensor]) -> None:
    state["visual.proj"] = torch.full_like(state["visual.proj"], torch.nan)


def with_integers(state: dict[str, torch.Tensor]) -> None:
    state["visual.proj"] = state["visual.proj"].to(torch.int8)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lacks_some,
            " is not a ovss-demo: it lacks 'positional_embedding', 'text_projection', 'logit_scale' and 2 more",
        ),
        (of_the_transformers_library, "these are weights for the transformers library: take open_clip_model.safe"),
        (with_holes, "'visual.proj' holds values that are no numbers"),
        (with_integers, "'visual.proj' is int8 instead of float32"),
    ],
)
def test_weights_that_are_others_end_the_job_before_there_is_a_run(
    tmp_path: Path, job: Callable[..., JobSpec], name: str, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    state = {key: value.clone() for key, value in demo_state().items()}
    change(state)
    (tmp_path / name).write_bytes(safetensors_bytes(state) if name.endswith("safetensors") else saved(state))
    with pytest.raises(WeightsError, match="^[^\n]*$") as caught:
        run_job(job(tmp_path / name))
    assert said in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_unreadable_file_and_a_folder_are_one_sentence(tmp_path: Path, job: Callable[..., JobSpec]) -> None:
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "model.safetensors").write_bytes(SAFE)
    with pytest.raises(OvssError, match="is a folder without open_clip_model.*it has model.safetensors") as caught:
        run_job(job(tmp_path / "repository"))
    assert caught.value.exit_code == 3
    if os.geteuid():  # root reads everything
        (tmp_path / "w.pt").touch(mode=0)
        with pytest.raises(WeightsError, match="cannot be read: Permission denied"):
            run_job(job(tmp_path / "w.pt"))


@pytest.mark.parametrize("inside", ["", "snapshots/0123abcd"])
def test_a_copy_of_a_repository_is_taken_with_the_safe_format_first(
    tmp_path: Path, tiny_architectures: tuple[str, str], inside: str
) -> None:
    place = tmp_path / "CLIP-ViT" / inside
    place.mkdir(parents=True, exist_ok=True)
    state = tiny_models.build().state_dict()
    (place / "open_clip_pytorch_model.bin").write_bytes(b"not looked at")
    (place / "open_clip_model.safetensors").write_bytes(safetensors_bytes(state))
    (place / "open_clip_config.json").write_text(json.dumps({"model_cfg": tiny_models.config(quick_gelu=True)}))
    loaded = load_clip(f"tiny-ViT-quickgelu//{tmp_path}/CLIP-ViT", torch.device("cpu"), torch.float32)
    assert loaded.weights.path == str(place / "open_clip_model.safetensors")
