"""Weights from the hub: its cache first, real retries, and one sentence in seconds where there is no network."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from PIL import Image

from ovss_ray.errors import WeightsError
from ovss_ray.models.hub import unreachable
from ovss_ray.segmenters import load_segmenter

CONTENT = b"not really weights"
REPOSITORY = "timm/vit_base_patch16_clip_224.openai"
ADVICE = "//path/to/open_clip_model.safetensors"
FETCH = f"""
import sys
from ovss_ray.models.hub import NotHereError, hub_file
try:
    print(hub_file("{REPOSITORY}", sys.argv[1:]))
except NotHereError as error:
    print("no file:", error)
"""


class Hub(ThreadingHTTPServer):
    """Answers like the hub: one file of one repository, after a number of failures."""

    name = "open_clip_model.safetensors"
    busy = 0
    refusal: tuple[int, dict[str, str]] | None = None
    asked = 0

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(CONTENT)

    def _answer(self, body: bytes) -> None:
        self.server.asked += 1
        status, headers = 200, {"ETag": '"0123abcd"', "X-Repo-Commit": "f" * 40}
        if self.server.busy:
            self.server.busy -= 1
            status, headers = 503, {}
        elif self.server.refusal is not None:
            status, headers = self.server.refusal
        elif not self.path.endswith(f"/resolve/main/{self.server.name}"):
            status, headers = 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": "f" * 40}
        self.send_response(status)
        for name, value in {"Content-Length": str(len(CONTENT) if status == 200 else 0), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if status == 200:
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(home: Path, endpoint: str, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_") and "proxy" not in name}
    return {**kept, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, **more}


def fetch(settings: dict[str, str], *names: str) -> tuple[str, str]:
    command = [sys.executable, "-c", FETCH, *(names or ("open_clip_model.safetensors", "open_clip_pytorch_model.bin"))]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=settings, check=True)
    return result.stdout.strip(), result.stderr


def test_a_busy_hub_is_asked_again_without_a_word_and_never_for_what_is_cached(tmp_path: Path, hub: Hub) -> None:
    hub.busy = 2
    path, said = fetch(environment(tmp_path, hub.endpoint))
    assert Path(path).read_bytes() == CONTENT
    assert said == ""
    assert Path(path).is_relative_to(tmp_path)
    asked = hub.asked
    assert fetch(environment(tmp_path, hub.endpoint))[0] == path
    assert hub.asked == asked
    assert fetch(environment(tmp_path, hub.endpoint, HF_HUB_OFFLINE="1"))[0] == path


def test_a_repository_without_the_safe_format_gives_the_other(tmp_path: Path, hub: Hub) -> None:
    hub.name = "open_clip_pytorch_model.bin"
    path, said = fetch(environment(tmp_path, hub.endpoint))
    assert (Path(path).name, said) == ("open_clip_pytorch_model.bin", "")
    missing, _ = fetch(environment(tmp_path / "other", hub.endpoint), "elsewhere.bin")
    assert missing == f"no file: {REPOSITORY} has no file elsewhere.bin"


@pytest.mark.parametrize(
    ("refusal", "said"),
    [
        ((403, {"X-Error-Code": "GatedRepo"}), "given only to those who accepted its terms on the hub"),
        ((403, {}), "127.0.0.1 answers 403, is HF_TOKEN right?"),
    ],
)
def test_a_refusal_is_explained(tmp_path: Path, hub: Hub, refusal: tuple[int, dict[str, str]], said: str) -> None:
    hub.refusal = refusal
    answer, noise = fetch(environment(tmp_path, hub.endpoint))
    assert said in answer
    assert noise == ""


def test_label_without_a_network_is_one_line_that_says_how_to_get_the_file(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (40, 30)).save(tmp_path / "photos" / "a.png")
    endpoint = f"http://127.0.0.1:{closed_port()}"
    command = [sys.executable, "-m", "ovss_ray", "label", str(tmp_path / "photos"), str(tmp_path / "run")]
    command += ["--classes", "cat,dog", "--engine", "local"]
    settings = environment(tmp_path / "home", endpoint)
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, env=settings)
    assert result.returncode == 3, result.stderr
    last = result.stderr.splitlines()[-1]
    assert last.startswith("ovss-ray: the weights ViT-B-16-quickgelu/openai are not on this machine")
    assert "127.0.0.1 cannot be reached (connection refused)" in last
    assert f"get {endpoint}/{REPOSITORY}/resolve/main/open_clip_model.safetensors where there is a network" in last
    assert last.endswith(f"give --clip ViT-B-16-quickgelu{ADVICE}")
    assert "Retry" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_python_gets_the_same_sentence_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(WeightsError, match=f"^[^\n]*HF_HUB_OFFLINE is set; get https://[^\n]*{ADVICE}$"):
        load_segmenter("maskclip", clip="ViT-B/16")


def test_a_host_or_its_proxy_that_cannot_be_reached_is_named_without_secrets(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert unreachable(hub.endpoint) is None
    assert unreachable("https://hub.invalid") == "hub.invalid cannot be reached (its name is not known here)"
    monkeypatch.setenv("https_proxy", f"http://user:secret@127.0.0.1:{closed_port()}")
    assert unreachable("https://hub.invalid") == "127.0.0.1 cannot be reached (connection refused)"
    monkeypatch.setenv("https_proxy", hub.endpoint)
    assert unreachable("https://hub.invalid") is None
    monkeypatch.delenv("https_proxy")
    monkeypatch.setenv("ALL_PROXY", hub.endpoint)
    assert unreachable("https://hub.invalid") is None
