"""What can be found wrong with a job in a second, before weights are looked for: classes, run directory, images.

Nothing here imports torch or starts a process that does.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from ovss_ray.errors import InputError, RunMismatchError
from ovss_ray.images.references import ImageRef
from ovss_ray.images.stores import is_local, local_path
from ovss_ray.labels.additions import read_additions
from ovss_ray.labels.layout import FORMAT_VERSION, RUN_FILE
from ovss_ray.run.directory import RunDirectory
from ovss_ray.run.job import ResolvedSpec, absolute_places, images_of, take_over
from ovss_ray.run.vacancy import check_place
from ovss_ray.segmenters.registry import check_method_name
from ovss_ray.spec import JobSpec
from ovss_ray.vocabulary import Vocabulary, load_vocabulary


def check_words(spec: JobSpec, vocabulary: Vocabulary | None = None) -> Vocabulary:
    """The classes of a job, whose method has a name that exists.

    Args:
        spec: the job.
        vocabulary: the classes of a run that exists; by default they are read as the job says.

    Raises:
        SettingError: there is no such method; the vocabulary, its templates or its background cannot be used.
    """
    check_method_name(spec.method)
    if vocabulary is not None:
        return vocabulary
    return load_vocabulary(spec.classes, templates=spec.templates, background=spec.background)


def open_images(spec: JobSpec, vocabulary: Vocabulary) -> Iterator[ImageRef] | None:
    """The listing of a new run's images, at its first one; None for a run that exists, whose manifest has them.

    Args:
        spec: the job.
        vocabulary: its classes.

    Raises:
        SettingError: the run directory holds something else, or a setting of the listing is wrong.
        InputError: the run directory cannot be read or written, or there are no images.
        RunMismatchError: the run in it was started with other settings, as far as can be told without the weights.
    """
    check_place(spec)
    directory = RunDirectory(spec.run, spec.storage_options)
    record = directory.read_json(RUN_FILE)
    if record is None:
        check_writable(spec.run)
        return images_of(spec.model_copy(update=absolute_places(spec)))
    if record.get("format_version") != FORMAT_VERSION:
        raise RunMismatchError(
            f"{directory.uri}/{RUN_FILE} has format {record.get('format_version')}, this version of ovss-ray writes "
            f"{FORMAT_VERSION}; continue it with ovss-ray {record.get('package_version', 'of that time')}"
        )
    # What takes torch to tell is taken to be as the run has it.
    stored = record["identity"]
    known = spec.model_copy(update={**absolute_places(spec), "clip": stored["clip"]})
    additions = read_additions(directory.fs, directory.root, directory.uri)
    take_over(ResolvedSpec(known, vocabulary, stored["weights"], stored["settings"]), record, additions,
              run=directory.uri)  # fmt: skip
    return None


def check_images(spec: JobSpec) -> None:
    """Make sure that the input has an image; raises as `list_images` does."""
    next(images_of(spec.model_copy(update={"sample": None, "limit": None})))


def check_writable(place: str) -> None:
    """Make sure that a folder on a local disk could be made, without making it.

    Raises:
        InputError: what is there of its path is a file, or may not be written to.
    """
    if not is_local(place):
        return
    path = Path(local_path(place))
    there = next((folder for folder in (path, *path.parents) if os.path.lexists(folder)), path)
    if not there.is_dir():
        raise InputError(f"the run directory {path} cannot be made: {there} is not a folder; name another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InputError(f"the run directory {path} cannot be written: {there} is read-only; check the permissions")
