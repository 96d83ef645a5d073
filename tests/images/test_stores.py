"""Which file system holds a URI, and what is said when there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ovss_ray.errors import SettingError
from ovss_ray.images import open_store


@pytest.mark.parametrize("form", ["{path}", "file://{path}", "{relative}", "{home}", "file://{escaped}"])
def test_a_local_file_opens_in_every_notation(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "my photo.bin"
    path.write_bytes(b"content")
    uri = form.format(path=path, relative="./x/../my photo.bin", home="~/my photo.bin", escaped=path.as_uri()[7:])
    fs, inside = open_store(uri)
    assert inside == str(path)
    assert fs.cat_file(inside) == b"content"


def test_a_bucket_opens_by_its_environment(s3: str) -> None:
    fs, path = open_store(f"{s3}/folder/key")
    fs.pipe_file(path, b"content")
    assert open_store(f"{s3}/folder/key")[0].cat_file(path) == b"content"
    assert path == s3.removeprefix("s3://") + "/folder/key"


def test_a_bucket_opens_by_its_options(s3: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    fs, path = open_store(f"s3a{s3[2:]}/key", {"s3": {"endpoint_url": s3_endpoint}})
    fs.pipe_file(path, b"content")
    assert fs.cat_file(path) == b"content"


def test_an_unknown_protocol_names_the_known_ones() -> None:
    with pytest.raises(SettingError, match=r"unknown protocol ftp://.*s3://.*gs://"):
        open_store("ftp://host/a.jpg")


def test_options_that_are_not_grouped_by_protocol_are_refused() -> None:
    with pytest.raises(SettingError, match=r"endpoint_url.*group.*s3"):
        open_store("s3://bucket/a", {"endpoint_url": "http://host"})  # type: ignore[dict-item]


@pytest.mark.parametrize(("uri", "driver", "extra"), [("s3://b/k", "s3fs", "s3"), ("az://c/k", "adlfs", "azure")])
def test_a_missing_driver_names_the_extra_to_install(uri: str, driver: str, extra: str) -> None:
    script = (
        f"import sys; sys.modules[{driver!r}] = None\n"
        "from ovss_ray.errors import SettingError\nfrom ovss_ray.images import open_store\n"
        f"try: open_store({uri!r})\nexcept SettingError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert f'pip install "ovss-ray[{extra}]"' in done.stdout
    assert "\n" not in done.stdout.strip()


def test_importing_images_stays_light() -> None:
    script = "import sys, ovss_ray.images; print([m for m in ('torch', 'ray', 'pyarrow', 's3fs') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
