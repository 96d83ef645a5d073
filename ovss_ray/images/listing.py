"""The images of a run, one at a time: from a folder, a pattern, a list or a single file, wherever they lie."""

from __future__ import annotations

import difflib
import hashlib
import os
import posixpath
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice
from pathlib import Path
from urllib.parse import urlsplit

from ovss_ray.errors import InputError, OvssError, SettingError
from ovss_ray.images.globs import GlobPattern, has_magic
from ovss_ray.images.list_files import list_format, read_list
from ovss_ray.images.stores import (
    StorageOptions,
    is_local,
    open_store,
    protocol_of,
    store_failure,
)
from ovss_ray.images.walking import StoredFile, s3_folders, walk_local, walk_s3, walk_store

DEFAULT_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "tif", "tiff", "bmp", "gif")


@dataclass(frozen=True)
class ImageRef:
    """One image of a run: where it is, and what the listing says about it for nothing.

    Attributes:
        uri: a URI, or an absolute path for a local file; "" for a row of a list that names no image.
        size_bytes: its size where the store's listing gives it (object stores), else None.
        etag: the store's own mark of its content, without quotes, where the listing gives it, else None.
        offset: position inside the file that holds the image among others (byte of a tar, row of a Parquet file); None
            if the image is a file of its own.
        extra: what a list says about the image beside its place, as a JSON object; None if nothing is kept.
    """

    uri: str
    size_bytes: int | None = None
    etag: str | None = None
    offset: int | None = None
    extra: str | None = None


def list_images(
    source: str | os.PathLike[str],
    *,
    extensions: Iterable[str] = DEFAULT_EXTENSIONS,
    limit: int | None = None,
    sample: float | None = None,
    uri_column: str | None = None,
    storage_options: StorageOptions | None = None,
) -> Iterator[ImageRef]:
    """List images in a fixed order and in memory that does not grow with their number.

    Args:
        source: a folder (searched recursively), a pattern (`photos/**/*.jpg`, `s3://bucket/2024-*/**.{jpg,png}`), a
            list (.txt with one URI a line, .csv, .tsv, .jsonl, .parquet, also compressed) or one image; local or on
            s3, gs, az; lists and single images also on http(s).
        extensions: which files of folders and patterns are images, in any case of letters; lists are taken as they are.
        limit: stop after this many images (1 or more).
        sample: the fraction of images to keep (0 < sample <= 1), chosen by a hash of each URI: independent of order
            and of what else is there; a smaller sample is contained in a larger one.
        uri_column: the column of a list; by default the first of uri, url, path, image, file_name.
        storage_options: see `open_store`.

    Returns:
        An iterator of `ImageRef`. Files and folders whose names begin with a dot are skipped. Folders come
        depth-first and sorted. Duplicates in lists are kept.

    Raises:
        InputError: nothing is there, no permission, no credentials, no image; raised at the call where the first
            image shows it, later where only a later page or row does.
        SettingError: an argument that cannot be used.
    """
    uri = os.fspath(source)
    if limit is not None and limit < 1:
        raise SettingError(f"limit is {limit}; give the number of images to take, 1 or more")
    if sample is not None and not 0 < sample <= 1:
        raise SettingError(f"sample is {sample}; give the fraction of images to keep, above 0 and at most 1")
    listing = _Listing(uri, frozenset(name.lower().lstrip(".") for name in extensions), uri_column, storage_options)
    refs = listing.sampled(sample)
    first = next(refs, None)
    if first is None:
        raise InputError(listing.why_empty(sample))
    return islice(chain([first], refs), limit)


class _Listing:
    """One pass over a source; counts what it leaves out, so that an empty result can be explained."""

    def __init__(
        self, source: str, extensions: frozenset[str], uri_column: str | None, storage_options: StorageOptions | None
    ) -> None:
        self._source = source
        self._extensions = extensions
        self._uri_column = uri_column
        self._other_files: Counter[str] = Counter()
        self._images = 0
        self._fs, self._path = open_store(source, storage_options)

    def sampled(self, sample: float | None) -> Iterator[ImageRef]:
        try:
            for ref in self._refs():
                self._images += 1
                _check_storable(ref.uri)
                if sample is None or _uniform(ref.uri) < sample:
                    yield ref
        except OvssError:
            raise
        except Exception as error:  # every store raises exceptions of its own, from drivers that may not be installed
            raise InputError(_why_unreadable(self._source, error)) from error

    def why_empty(self, sample: float | None) -> str:
        if self._images:
            return (
                f"none of the {self._images} images of {self._source} falls into a sample of {sample:g}; "
                "use a larger sample"
            )
        if list_format(self._name) is not None and not has_magic(self._source):
            return f"the list {self._source} names no image"
        if not self._other_files:
            return f"no image found in {self._source}: no file is there{self._nearest_folder()}"
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._other_files.most_common(5))
        return (
            f"no image found in {self._source}: {self._other_files.total()} other files were seen ({kinds}); "
            f"images are told by their extension: {', '.join(sorted(self._extensions))}"
        )

    def _nearest_folder(self) -> str:
        if protocol_of(self._source) not in ("s3", "s3a") or has_magic(self._path):
            return ""
        bucket, _, folder = self._path.partition("/")
        parent = folder.rpartition("/")[0]
        beside = s3_folders(self._fs, bucket, f"{parent}/" if parent else "")
        close = difflib.get_close_matches(folder, beside, n=1)
        return f" (did you mean {protocol_of(self._source)}://{bucket}/{close[0]}?)" if close else ""

    @property
    def _name(self) -> str:
        web = protocol_of(self._source) in ("http", "https")
        return urlsplit(self._path).path if web else self._path

    def _refs(self) -> Iterator[ImageRef]:
        if is_local(self._source):
            return self._local_refs()
        if protocol_of(self._source) in ("http", "https"):
            return self._web_refs()
        return self._remote_refs()

    def _local_refs(self) -> Iterator[ImageRef]:
        path = self._path
        if Path(path).is_dir():
            return self._local_folder(path, None)
        if os.path.lexists(path):
            return self._list_refs() if list_format(path) else self._single(ImageRef(path))
        if has_magic(path):
            pattern = GlobPattern(path)
            if Path(pattern.base).is_dir():
                return self._local_folder(pattern.base, pattern)
            path = pattern.base
        raise InputError(f"there is no {path}{_nearest_name(path)}; check the path")

    def _local_folder(self, folder: str, pattern: GlobPattern | None) -> Iterator[ImageRef]:
        files = walk_local(folder, partial(_enter, pattern))
        return self._selected(files, pattern, lambda relative: os.path.join(folder, relative))  # noqa: PTH118

    def _web_refs(self) -> Iterator[ImageRef]:
        if list_format(self._name):
            return self._list_refs()
        info = {} if self._source.endswith("/") else self._fs.info(self._path)
        if self._source.endswith("/") or info.get("mimetype") == "text/html":
            raise InputError(
                f"{self._source} is a web page or folder, and folders cannot be listed over HTTP; "
                "give a list of image addresses (.txt, .csv, .parquet) or a single image"
            )
        return self._single(ImageRef(self._source, info.get("size"), None))

    def _remote_refs(self) -> Iterator[ImageRef]:
        if has_magic(self._path):
            pattern = GlobPattern(self._path)
            return self._remote_folder(pattern.base, pattern)
        if list_format(self._path):
            return self._list_refs()
        if self._extension(self._path) in self._extensions and not self._source.endswith("/"):
            info = self._fs.info(self._path)
            etag = info.get("ETag") or info.get("etag")
            return self._single(ImageRef(self._source, info.get("size"), str(etag).strip('"') if etag else None))
        return self._remote_folder(self._path, None)

    def _remote_folder(self, folder: str, pattern: GlobPattern | None) -> Iterator[ImageRef]:
        protocol = protocol_of(self._source)
        if not folder:
            raise InputError(f"{self._source} names no bucket; write {protocol}://bucket/folder")
        if protocol in ("s3", "s3a"):
            bucket, inner, _ = self._fs.split_path(folder)  # which knows the names of access points
            prefix = f"{inner}/" if inner else ""
            files = walk_s3(self._fs, bucket, prefix, pattern.literal[len(bucket) + 1 :] if pattern else prefix)
            authority = bucket
        else:
            inner = folder.partition("/")[2]
            prefix = f"{inner}/" if inner else ""
            files = walk_store(self._fs, folder, partial(_enter, pattern))
            authority = urlsplit(self._source).netloc  # names the account too on Azure
        return self._selected(files, pattern, lambda relative: f"{protocol}://{authority}/{prefix}{relative}")

    def _selected(
        self, files: Iterator[StoredFile], pattern: GlobPattern | None, uri_of: Callable[[str], str]
    ) -> Iterator[ImageRef]:
        for file in files:
            if _is_hidden(file.relative, pattern) or (pattern and not pattern.matches(file.relative)):
                continue
            extension = self._extension(file.relative)
            if extension in self._extensions:
                yield ImageRef(uri_of(file.relative), file.size_bytes, file.etag)
                continue
            kind = f".{extension}" if extension else "without extension"
            if kind in self._other_files or len(self._other_files) < 1000:
                self._other_files[kind] += 1

    def _list_refs(self) -> Iterator[ImageRef]:
        return map(ImageRef, read_list(self._fs, self._path, self._source, self._uri_column))

    def _single(self, ref: ImageRef) -> Iterator[ImageRef]:
        extension = self._extension(self._name)
        if extension and extension not in self._extensions:
            raise InputError(
                f"{self._source} is neither a folder, nor a list (.txt, .csv, .tsv, .jsonl, .parquet), nor an image "
                f"({', '.join(sorted(self._extensions))})"
            )
        yield ref

    @staticmethod
    def _extension(path: str) -> str:
        return posixpath.splitext(path)[1].lower().lstrip(".")


def _enter(pattern: GlobPattern | None, folder: str) -> bool:
    return not _is_hidden(folder, pattern) and (pattern is None or pattern.may_contain(folder))


def _is_hidden(relative: str, pattern: GlobPattern | None) -> bool:
    if pattern is not None and pattern.wants_hidden:
        return False
    return relative.startswith(".") or "/." in relative


def _uniform(uri: str) -> float:
    digest = hashlib.blake2b(uri.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64


def _check_storable(uri: str) -> None:
    try:
        uri.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"the file name {uri!r} is not valid UTF-8 and cannot be stored; rename it") from error


def _nearest_name(path: str) -> str:
    missing = Path(path)
    while not missing.parent.is_dir():
        missing = missing.parent
    try:
        names = [entry.name for entry in islice(os.scandir(missing.parent), 10_000)]
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, names, n=1)
    return f" (did you mean {missing.parent / close[0]}?)" if close else f" ({missing.parent} exists)"


def _why_unreadable(source: str, error: Exception) -> str:
    failure = store_failure(error)
    detail = " ".join(str(error).split())[:200] or type(error).__name__
    place = getattr(error, "filename", None) or source
    if failure == "not_found":
        return f"{place} does not exist; check the address"
    if failure == "forbidden":
        return f"no permission to read {place}; check the rights of this user or its credentials ({detail})"
    if failure == "credentials":
        return (
            f"no credentials for {source}; set them in the environment (AWS_PROFILE, AWS_ACCESS_KEY_ID, "
            'GOOGLE_APPLICATION_CREDENTIALS ...) or, for a public bucket, storage_options {"s3": {"anon": true}}'
        )
    if failure == "unreachable":
        return f"the store of {source} cannot be reached; check the endpoint and the network ({detail})"
    return f"{source} cannot be listed: {detail}"
