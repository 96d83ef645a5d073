"""Secrets stay out of what is printed, logged, recorded and seen by others in `ps`."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ovss_ray import redaction
from ovss_ray.errors import ImageError, InputError, SettingError
from ovss_ray.redaction import hide_options, redacted, without_secrets
from ovss_ray.run.logs import JsonFormatter, TextFormatter
from ovss_ray.spec import JobSpec

SECRET = "Zq8/w+Vb3xK1nE7t"


@pytest.fixture(autouse=True)
def no_options_of_other_tests() -> Iterator[None]:
    kept = set(redaction._options)
    redaction._options.clear()
    yield
    redaction._options.clear()
    redaction._options.update(kept)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"https://me:{SECRET.replace('/', '_')}@host:9000/a.jpg", "https://me:***@host:9000/a.jpg"),
        ("cannot read https://ghp_token@host/a.jpg: no", "cannot read https://***@host/a.jpg: no"),
        ("https://h/a.jpg?id=7&sig=abc%2Fdef%3D&x=1", "https://h/a.jpg?id=7&sig=***&x=1"),
        ("https://h/?X-Amz-Date=2&X-Amz-Credential=AKIA%2F1&X-Amz-Signature=0af", "https://h/?X-Amz-Date=2&X-Amz-Credential=***&X-Amz-Signature=***"),
        ("az://c/d.jpg?sv=2020-01-01&sp=r&sig=AbC%2B", "az://c/d.jpg?sv=2020-01-01&sp=r&sig=***"),
        ("'https://h/a?access_token=abc'", "'https://h/a?access_token=***'"),
        ("https://h/a?t=eyJhbGciOiJIUzI1NiJ9eyJzdWIiOiIxMjM0", "https://h/a?t=***"),
        ("AccountName=me;AccountKey=ab+/==;EndpointSuffix=core", "AccountName=me;AccountKey=***;EndpointSuffix=core"),
        ("Authorization: Bearer abcdef123456", "Authorization: Bearer ***"),
        ("https://h/a?jwt=eyJhbGci.eyJzdWIi.c2lnbmF0dXJl&x=1", "https://h/a?jwt=***&x=1"),
        ("https://h/a?t=eyJhbGciOiJIUzI1NiIsInR5cCI6IkpXVCJ9.eyJzdWIi.c2ln", "https://h/a?t=***"),
        ("https://h/a?accessToken=abc&authToken=d.e&mySecret=f&apiKey=g", "https://h/a?accessToken=***&authToken=***&mySecret=***&apiKey=***"),
        ("the token eyJhbGciOiJub25lIn0.eyJzdWIi.c2lnbmF0 is expired", "the token *** is expired"),
    ],
)  # fmt: skip
def test_secrets_in_addresses_are_hidden(text: str, shown: str) -> None:
    assert redacted(text) == shown
    assert redacted(shown) == shown


@pytest.mark.parametrize(
    "text",
    [
        "abfs://photos@account.dfs.core.windows.net/a.jpg",
        "s3://bucket/me@home/a=b.jpg",
        "https://h:8080/a@b.jpg?id=5&keyword=cat",
        "https://h/a.jpg?monkey=1&author=me&hockey=2&name=a.b.jpg",
        "max_failed_fraction = 0.2",
        "Basic settings",
    ],
)
def test_what_is_no_secret_stays(text: str) -> None:
    assert redacted(text) == text


def test_values_of_storage_options_are_hidden_wherever_they_turn_up() -> None:
    options = {
        "s3": {"key": "AKIAEXAMPLE", "secret": SECRET, "endpoint_url": "http://minio:9000", "anon": False},
        "https": {"client_kwargs": {"headers": {"Authorization": f"Custom {SECRET}2"}}},
    }
    hide_options(options)
    shown = redacted(f"s3 at http://minio:9000 said: {options}")
    assert SECRET not in shown
    assert "AKIAEXAMPLE" not in shown
    assert "http://minio:9000" in shown


def test_what_a_user_must_read_is_not_hidden() -> None:
    options = {"gs": {"token": "/home/me/keyy.json"}, "s3": {"key": "testing", "secret": "nothing-else"}}
    hide_options(options)
    assert redacted("the file /home/me/keyy.json does not exist") == "the file /home/me/keyy.json does not exist"
    assert redacted("--run s3://testing-photos/run") == "--run s3://testing-photos/run"
    assert redacted("contesting testing.jpg nothing-else-matters") == "contesting testing.jpg nothing-else-matters"
    assert redacted("key 'testing', nothing-else. testing") == "key '***', ***. ***"


@pytest.mark.parametrize(
    "part", ["a.", "a-", "?a=", "&a_", "a://", "eyJ-", "eyJaaaaaaaa.", "Bearer ", "x:y@", "=a", "?"]
)
def test_names_of_any_length_take_no_time(part: str) -> None:
    """With time that grows with the square of the length, this test would take hours."""
    redacted("=@" + part * (2_000_000 // len(part)))
    redacted("=@" + part * (2_000_000 // len(part)) + "!")


def test_errors_rows_and_log_lines_have_no_secrets() -> None:
    hide_options({"s3": {"secret": SECRET}})
    said = f"https://u:pw1234@h/a.jpg?sig=abc refused {SECRET}"
    clean = "https://u:***@h/a.jpg?sig=*** refused ***"
    assert str(InputError(said)) == clean
    assert ImageError("fetch_failed", said).reason == clean
    try:
        raise ValueError(said)
    except ValueError:
        record = logging.LogRecord("ovss_ray", logging.ERROR, "", 0, "%s", (said,), sys.exc_info())
    record.uri = said
    line = json.loads(JsonFormatter().format(record))
    assert (line["message"], line["uri"]) == (clean, clean)
    for text in (TextFormatter().format(record), line["exception"]):
        assert "Traceback" in text
        assert SECRET not in text
        assert "pw1234" not in text


def test_a_wrong_job_is_explained_without_its_storage_options() -> None:
    job = {"input": "in", "run": "run", "classes": "cat"}
    with pytest.raises(SettingError) as told:
        JobSpec.build({**job, "storage_options": {"s3": f"key:{SECRET}"}}, source="command line")
    assert SECRET not in str(told.value)
    spec = JobSpec.build({**job, "storage_options": {"s3": {"secret": SECRET}}}, source="test")
    assert SECRET not in repr(spec)


def test_commands_are_shown_with_the_option_to_give_again() -> None:
    given = ["label", "https://u:pw1234@h/list.txt", "run", "--storage-options", SECRET, f"--storage-options={SECRET}"]
    shown = without_secrets([*given, "--limit", "3"])
    assert shown[1] == "https://u:***@h/list.txt"
    assert shown[3:] == ["--storage-options", "...", "--storage-options=...", "--limit", "3"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the arguments of a process cannot be changed")
def test_nobody_sees_secrets_among_the_arguments_of_the_process_not_even_ray() -> None:
    code = (
        "import sys; from ovss_ray.redaction import hide_arguments; hide_arguments(); from pathlib import Path;"
        "import ray._private.utils as ray; print(Path('/proc/self/cmdline').read_bytes().split(b'\\0')[3:]);"
        "print(ray.get_entrypoint_name()); print(sys.argv[2])"
    )
    arguments = ["--storage-options", SECRET, f"--storage-options={SECRET}", "--limit", "3"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    seen, rays, own = done.stdout.splitlines()
    stars = "*" * len(SECRET)
    assert seen == str(
        [b"--storage-options", stars.encode(), f"--storage-options={stars}".encode(), b"--limit", b"3", b""]
    )
    assert SECRET not in rays
    assert own == SECRET
