"""Log lines as text and JSON: of the command, of workers in Ray, and from the threads of a worker."""

from __future__ import annotations

import io
import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import ray
from PIL import Image

from ovss_ray.images import backoff
from ovss_ray.images.stores import open_store
from ovss_ray.run.driver import run_job
from ovss_ray.run.logs import (
    ContextThreadPool,
    JsonFormatter,
    LogSettings,
    TextFormatter,
    configure_logging,
    log_context,
    package_level,
)
from ovss_ray.spec import JobSpec
from tests.faults import FaultyEndpoint, status
from tests.run.conftest import CLIP, draw_photos
from tests.run.faulty import METHOD

MakeSpec = Callable[..., JobSpec]
BROKEN = b"\xff\xd8\xff broken"


@pytest.fixture
def photos_and_broken(tmp_path: Path) -> Path:
    """Seven good pictures and, as image 7, a broken one: the last of the second shard of four."""
    folder = draw_photos(tmp_path / "photos", 7)
    (folder / "z-br\u00f6ken\nname.jpg").write_bytes(BROKEN)
    return folder


def label(folder: Path, run: Path, *flags: str, noise: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ovss_ray", "label", str(folder), str(run), "--classes", "cat,dog", "--clip", CLIP]
    command += ["--templates", "single", "--engine", "local", "--shard-size", "4", "--fetch-concurrency", "1", *flags]
    environment = {**os.environ, "NOISE": noise} if noise else None
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


def objects(text: str) -> list[dict[str, Any]]:
    """Every line as the object that it is."""
    lines = [json.loads(line) for line in text.splitlines()]
    for line in lines:
        assert datetime.fromisoformat(line["time"]).utcoffset() == timedelta(0)
        assert {"level", "logger", "message"} <= line.keys()
    return lines


@pytest.fixture
def captured(caplog: pytest.LogCaptureFixture) -> Iterator[io.StringIO]:
    """What this process logs, as JSON."""
    caplog.set_level(logging.DEBUG, "ovss_ray")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    logging.getLogger().addHandler(handler)
    yield stream
    logging.getLogger().removeHandler(handler)


def test_every_line_of_a_run_is_json_and_that_of_a_failed_image_says_where(
    photos_and_broken: Path, tmp_path: Path
) -> None:
    result = label(photos_and_broken, tmp_path / "first", "--log-format", "json", "-vv")
    assert result.returncode == 0, result.stderr
    lines = objects(result.stderr)
    assert {line["run"] for line in lines} == {"first"}
    (failed,) = [line for line in lines if "corrupt" in line["message"]]
    assert (failed["level"], failed["shard"], failed["attempt"], failed["image_id"]) == ("DEBUG", 1, 1, 7)
    assert failed["uri"] == str(photos_and_broken / "z-br\u00f6ken\nname.jpg")
    finished = {line["shard"]: line["message"] for line in lines if line["message"].startswith("finished")}
    assert finished.keys() == {0, 1}
    assert "4 images, 1 without labels" in finished[1]


@pytest.fixture
def photos_and_damaged_tiffs(photos_and_broken: Path) -> Path:
    """libtiff itself writes to standard error about such files, by whatever name its compression has."""
    for name in ("tiff_adobe_deflate", "tiff_lzw"):
        path = photos_and_broken / f"{name}.tif"
        Image.effect_noise((90, 70), 80).save(path, compression=name)
        data = bytearray(path.read_bytes())
        data[8:200] = bytes(192)
        path.write_bytes(data)
    return photos_and_broken


def test_standard_error_and_output_hold_json_only_whoever_writes(
    photos_and_damaged_tiffs: Path, tmp_path: Path
) -> None:
    result = label(
        photos_and_damaged_tiffs,
        tmp_path / "first",
        *("--log-format", "json", "--method", METHOD, "--max-failed-fraction", "1"),
        noise="yes",
    )
    assert result.returncode == 0, result.stderr
    lines = objects(result.stderr)
    foreign = [line["message"] for line in lines if line["logger"] == "stderr"]
    assert {line["run"] for line in lines} == {"first"}
    assert foreign.count("native code\x1b[1m says") == 1
    assert foreign.count("a child process says") == 1
    assert foreign.count("Python says") == 1
    assert [message for message in foreign if message.startswith("downloading")] == [
        f"downloading {percent} %" for percent in (0, 50, 100)
    ]
    assert any("careless" in line["message"] for line in lines if line["logger"] == "py.warnings")
    assert json.loads(result.stdout)["statuses"] == {"ok": 7, "corrupt": 3}


def test_the_last_words_of_a_process_that_crashes_are_json_too() -> None:
    code = """
import ctypes, faulthandler, logging
from ovss_ray.run.logs import LogSettings, configure_logging
configure_logging(LogSettings(logging.INFO, "json", {"run": "first"}))
faulthandler.enable()
logging.getLogger("ovss_ray").info("before")
ctypes.string_at(0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert result.returncode < 0
    lines = objects(result.stderr)
    assert [line["message"] for line in lines][:1] == ["before"]
    assert "Fatal Python error: Segmentation fault" in [line["message"] for line in lines]
    assert {line["run"] for line in lines} == {"first"}


def test_the_error_that_ends_a_run_is_json_too(photos_and_broken: Path, tmp_path: Path) -> None:
    shards = tmp_path / "run" / "shards"
    shards.mkdir(parents=True)
    (shards / "00000000.parquet").touch()
    result = label(photos_and_broken, tmp_path / "run", "--log-format", "json")
    assert result.returncode == 5
    last = objects(result.stderr)[-1]
    assert last["level"] == "ERROR"
    assert "holds 1 shards but no run.json" in last["message"]
    assert "Continue with:\n  ovss-ray label" in last["message"]


def test_text_lines_show_shard_and_attempt_and_failed_images_only_on_request(
    photos_and_broken: Path, tmp_path: Path
) -> None:
    result = label(photos_and_broken, tmp_path / "run")
    assert " INFO [shard 1, attempt 1] finished: 4 images, 1 without labels" in result.stderr
    assert "no labels" not in result.stderr


def test_workers_in_ray_log_as_the_driver_does(
    make_spec: MakeSpec, photos_and_broken: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "ovss_ray")
    context = ray.init(
        address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False
    )
    try:
        spec = make_spec(input=str(photos_and_broken), engine="ray", workers=1, shard_size=4, log_format="json")
        run_job(spec)
        folder = Path(context.address_info["session_dir"]) / "logs"
        written = "".join(path.read_text() for path in folder.glob("worker-*.err"))
    finally:
        ray.shutdown()
    # Ray puts marks of its own (":job_id:...") into these files.
    lines = objects("\n".join(line for line in written.splitlines() if not line.startswith(":")))
    assert {(line["run"], line["worker"]) for line in lines} == {("run", "worker-1")}
    (failed,) = [line for line in lines if "corrupt" in line["message"]]
    assert (failed["level"], failed["shard"], failed["attempt"], failed["image_id"]) == ("DEBUG", 1, 1, 7)
    assert {line["shard"] for line in lines if line["message"].startswith("finished")} == {0, 1}


def test_retries_are_counted_and_logged_with_their_image(
    make_spec: MakeSpec,
    s3: str,
    s3_endpoint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    captured: io.StringIO,
) -> None:
    fs, root = open_store(s3)
    fs.put(f"{draw_photos(tmp_path / 'photos', 8)}/", f"{root}/photos/", recursive=True)
    monkeypatch.setattr(backoff, "FIRST_WINDOW_S", 0.01)
    with FaultyEndpoint(s3_endpoint) as endpoint:
        endpoint.plan.add(status(503), method="GET", path="*/0005.jpg", first=2)
        endpoint.plan.add(status(500), method="GET", path="*/0004.jpg", first=1)
        summary = run_job(
            make_spec(
                input=f"{s3}/photos",
                shard_size=4,
                fetch_concurrency=1,
                storage_options={"s3": {"endpoint_url": endpoint.url}},
            )
        )
    assert summary.session is not None
    lines = [line for line in objects(captured.getvalue()) if line["message"].startswith("asking once more")]
    assert sum(summary.session["fetch_retries"].values()) == len(lines) == 3
    assert summary.session["fetch_retries"]["throttled"] == 2
    uris = sorted(
        (line["uri"].rsplit("/", 1)[-1], line["image_id"] // 4 == line["shard"], line["attempt"]) for line in lines
    )
    assert uris == [("0004.jpg", True, 1), ("0005.jpg", True, 1), ("0005.jpg", True, 1)]


def test_a_pool_carries_the_context_of_each_task(captured: io.StringIO) -> None:
    log = logging.getLogger("ovss_ray.test")
    with ContextThreadPool(2) as pool, ThreadPoolExecutor(1) as other:
        for shard in range(6):
            with log_context(shard=shard), log_context(attempt=2):
                pool.submit(log.info, "carried %d", shard)
                other.submit(log.info, "not carried")
        log.info("outside")
    lines = objects(captured.getvalue())
    about = {line["message"]: (line.get("shard"), line.get("attempt")) for line in lines}
    expected = {f"carried {shard}": (shard, 2) for shard in range(6)}
    assert about == {**expected, "not carried": (None, None), "outside": (None, None)}


@pytest.mark.parametrize(("level", "shown"), [("INFO", False), ("DEBUG", True)])
def test_the_tracebacks_that_gcsfs_logs_for_what_it_raises_too_are_left_out(level: str, shown: bool) -> None:
    code = f"""
import logging
from ovss_ray.run.logs import LogSettings, configure_logging
configure_logging(LogSettings(logging.{level}))
logging.getLogger("gcsfs").error("_request out of retries on exception", exc_info=ValueError("no host"))
logging.getLogger("google.auth").warning("kept")
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ("out of retries" in result.stderr) is shown
    assert "kept" in result.stderr


def test_warnings_exceptions_and_odd_names_are_lines_of_json() -> None:
    code = """
import logging, warnings
from ovss_ray.run.logs import LogSettings, configure_logging
configure_logging(LogSettings(logging.INFO, "json", {"run": "first"}))
logging.getLogger("ray").warning("from ray")
import ray
configure_logging(LogSettings(logging.INFO, "json", {"run": "first"}))
logging.getLogger("ray").error("from ray, once it is there")
warnings.warn("careful\\nnow")
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("ovss_ray").exception("name %s", "\\udcff", extra={"uri": "a\\u00e9\\udcff.jpg", "shard": 3})
logging.getLogger("ovss_ray").debug("below the level")
raise RuntimeError("the end")
"""
    environment = {"PYTHONIOENCODING": "ascii:strict", "PATH": "/usr/bin"}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=environment)
    assert result.returncode == 1
    ray_first, ray_later, warned, failed, last = objects(result.stderr)
    assert (ray_first["logger"], ray_first["message"]) == ("ray", "from ray")
    assert (ray_later["level"], ray_later["message"]) == ("ERROR", "from ray, once it is there")
    assert warned["logger"] == "py.warnings"
    assert "careful\nnow" in warned["message"]
    assert (failed["uri"], failed["shard"], failed["message"]) == ("a\u00e9\udcff.jpg", 3, "name \udcff")
    assert failed["exception"].startswith("Traceback")
    assert failed["exception"].endswith("ZeroDivisionError: division by zero")
    assert (last["level"], last["message"], last["run"]) == ("CRITICAL", "RuntimeError: the end", "first")


def test_text_names_worker_shard_and_attempt_only_where_they_are_known() -> None:
    record = logging.LogRecord("ovss_ray", logging.WARNING, __file__, 1, "%d images", (3,), None)
    formatter = TextFormatter({"worker": "worker-2", "run": "first"})
    assert formatter.format(record).endswith(" WARNING [worker-2] 3 images")
    with log_context(shard=4, attempt=2, image_id=9):
        assert formatter.format(record).endswith(" WARNING [worker-2, shard 4, attempt 2] 3 images")
    assert TextFormatter().format(record).endswith(" WARNING 3 images")


def test_logging_that_is_configured_already_stays(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "ovss_ray")
    before = list(logging.getLogger().handlers)
    assert before
    configure_logging(LogSettings(logging.DEBUG))
    assert logging.getLogger().handlers == before
    assert package_level() == logging.DEBUG
