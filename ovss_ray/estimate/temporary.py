"""A temporary run directory, where a run is tried out and nothing is kept."""

from __future__ import annotations

import logging
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from ovss_ray.errors import InputError
from ovss_ray.images.stores import StorageOptions, is_local, local_path
from ovss_ray.run.directory import RunDirectory

log = logging.getLogger(__name__)


@contextmanager
def temporary_directory(run: str, storage_options: StorageOptions) -> Iterator[RunDirectory]:
    """A run directory beside `run`: on the same disk or in the same bucket, hidden from listings, removed at the end.

    Args:
        run: a run directory, which need not exist and is not touched.

    Raises:
        InputError: no folder can be made there.
    """
    if is_local(run):
        beside = next(folder for folder in Path(local_path(run)).parents if folder.is_dir())
        try:
            uri = tempfile.mkdtemp(prefix=".ovss-ray-estimate-", dir=beside)
        except OSError as error:
            raise InputError(
                f"no temporary folder can be made in {beside}, where the run directory would be: {error.strerror}; "
                "check the permissions, or give another run directory"
            ) from error
        try:
            yield RunDirectory(uri, storage_options)
        finally:
            shutil.rmtree(uri, ignore_errors=True)
        return
    directory = RunDirectory(_hidden_beside(run), storage_options)
    try:
        yield directory
    finally:
        _remove_stored(directory)


def _hidden_beside(run: str) -> str:
    """An address in the same bucket that listings of images skip."""
    parent, _, name = run.rstrip("/").rpartition("/")
    if not urlsplit(run).path.strip("/"):  # the bucket itself
        parent, name = run.rstrip("/"), "run"
    return f"{parent}/.{name}.estimate-{uuid.uuid4().hex}"


def _remove_stored(directory: RunDirectory) -> None:
    try:
        directory.fs.invalidate_cache()
        directory.fs.rm(directory.root, recursive=True)
    except FileNotFoundError:
        pass
    except Exception as error:  # stores raise errors of their own; the estimate is good all the same
        log.warning("%s could not be removed (%s); remove it by hand", directory.uri, error)
