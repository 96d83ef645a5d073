"""The images of a run, one at a time: from folders, patterns, lists, tars, Parquet files and inventories."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from itertools import chain, groupby, islice
from pathlib import Path
from urllib.parse import urlsplit

from ovss_ray.errors import InputError, SettingError
from ovss_ray.images import explaining
from ovss_ray.images.addresses import storable
from ovss_ray.images.containers import Container, ContainerReader, OtherFiles, is_hidden, path_in
from ovss_ray.images.drivers import open_bounded
from ovss_ray.images.globs import GlobPattern, expand_braces, has_magic, is_enumeration
from ovss_ray.images.members import file_of
from ovss_ray.images.parallel import flat_map_ordered
from ovss_ray.images.reach import Reach
from ovss_ray.images.references import ImageRef, Wanted, extension_of
from ovss_ray.images.s3_listing import walk_s3
from ovss_ray.images.stores import StorageOptions, is_local, local_path, open_store, protocol_of
from ovss_ray.images.tables import list_format
from ovss_ray.images.tars import is_tar, names_compressed_tar, refuse_compressed
from ovss_ray.images.versions import Version, version_at, version_of_info
from ovss_ray.images.walking import StoredFile, s3_folders, walk_local, walk_store
from ovss_ray.naming import setting_name

__all__ = ["DEFAULT_EXTENSIONS", "ImageRef", "list_images"]

_LOG = logging.getLogger(__name__)

DEFAULT_EXTENSIONS = (
    *("jpg", "jpeg", "jpe", "jfif", "jif", "png", "webp", "tif", "tiff", "bmp", "gif"),
    *("heic", "heif", "hif", "avif"),
)

_ADDRESSES_LOOKED_AT = 1000
_LISTING_ATTEMPTS, _LISTING_TIMEOUT_S = 5, 30.0


def list_images(
    source: str | os.PathLike[str],
    *,
    extensions: Iterable[str] = DEFAULT_EXTENSIONS,
    limit: int | None = None,
    sample: float | None = None,
    uri_column: str | None = None,
    image_column: str | None = None,
    keep_columns: Iterable[str] = (),
    storage_options: StorageOptions | None = None,
    without: str | None = None,
    reach: Reach | None = None,
) -> Iterator[ImageRef]:
    """List images in a fixed order and in memory that does not grow with their number.

    Args:
        source: a folder (searched recursively), a pattern (`photos/**/*.jpg`, `s3://bucket/2024-*/**.{jpg,png}`), a
            tar or a range of them (`train-{000..499}.tar`), a Parquet file with the bytes of images, a list (.txt with
            one URI a line, .csv, .tsv, .jsonl, .parquet, also compressed), the manifest.json of an S3 Inventory, or one
            image; local or on s3, gs, az; all but folders and wildcards also on http(s).
        extensions: which files of folders, patterns, tars and inventories are images, in any case of letters; lists are
            taken as they are.
        limit: stop after this many images (1 or more).
        sample: the fraction of images to keep (0 < sample <= 1), chosen by a hash of each URI: whatever the order and
            whatever else is there; a smaller sample is contained in a larger one.
        uri_column: the column of a list; by default the first of uri, url, path, image, file_name.
        image_column: the column of a Parquet file that holds the bytes of images; see `find_image_column`.
        keep_columns: columns of lists and Parquet files, or fields of WebDataset samples, for `ImageRef.extra`.
        storage_options: see `open_store`.
        without: a folder that is left out where it lies inside the source: a run directory among its images.
        reach: what addresses in the source may lead to; by default what its place allows (docs/security.md). Single
            addresses that are not allowed are listed all the same, and refused where they are read.

    Returns:
        An iterator of `ImageRef`. Names that begin with a dot are skipped. Folders come depth-first and sorted, with
        the contents of tars and of Parquet files with images in their place. Duplicates in lists are kept.

    Raises:
        InputError: nothing is there, no permission, no image, a damaged file, no address that may be read; raised at
            the call where the first image shows it, later where only a later page, file or row does.
        SettingError: an argument that cannot be used.
    """
    uri = os.fspath(source)
    if limit is not None and limit < 1:
        raise SettingError(f"limit is {limit}; give the number of images to take, 1 or more")
    if sample is not None and not 0 < sample <= 1:
        raise SettingError(f"sample is {sample}; give the fraction of images to keep, above 0 and at most 1")
    wanted = Wanted.of(extensions, uri_column, image_column, keep_columns)
    listing = _Listing(uri, wanted, storage_options, without, reach or Reach(uri))
    refs = listing.sampled(sample)
    first = next(refs, None)
    if first is None:
        raise InputError(listing.why_empty(sample))
    return listing.told(islice(chain([first], refs), limit))


class _Listing:
    """One pass over a source; counts what it leaves out, so that an empty result can be explained."""

    def __init__(
        self,
        source: str,
        wanted: Wanted,
        storage_options: StorageOptions | None,
        without: str | None,
        reach: Reach,
    ) -> None:
        self._source = source
        self._wanted = wanted
        self._storage_options = storage_options
        self._without = without
        self._other_files = OtherFiles()
        self._reach = reach
        self._reader = ContainerReader(wanted, storage_options, self._other_files, reach)
        self._images = 0
        self._fs, self._path = open_store(source, storage_options, reach)

    def sampled(self, sample: float | None) -> Iterator[ImageRef]:
        with explaining.listing(self._source):
            for ref in self._allowed(self._opened(self._found())):
                self._images += 1
                if (uri := storable(ref.uri)) != ref.uri:
                    ref = replace(ref, uri=uri)
                if sample is None or _uniform(uri) < sample:
                    yield ref

    def told(self, refs: Iterator[ImageRef]) -> Iterator[ImageRef]:
        """The same images; after the last one, what was left out on the way."""
        yield from refs
        if self._other_files.hidden:
            _LOG.warning(
                "%d members of tars are left out: they, or a folder in their name, begin with a dot",
                self._other_files.hidden,
            )
        if self._other_files:
            _LOG.warning(
                "%s: left out %s; images are told by their extension: %s (--extensions)",
                self._source,
                self._other_files.by_kind(),
                ", ".join(sorted(self._wanted.extensions)),
            )

    def _allowed(self, refs: Iterator[ImageRef]) -> Iterator[ImageRef]:
        """All images; but where none of the first thousand may be read, this is no input."""
        held = []
        for ref in refs:
            refusal = self._reach.refusal(file_of(ref.uri))
            held.append(ref)
            if refusal is None:
                break
            if len(held) == _ADDRESSES_LOOKED_AT:
                raise self._unreachable(held[0].uri, refusal)
        else:
            if held:
                raise self._unreachable(held[0].uri, refusal or "")
        return chain(held, refs)

    def _unreachable(self, uri: str, refusal: str) -> InputError:
        return InputError(f"no image that {self._source} names may be read ({uri} ...): {refusal}")

    def _opened(self, found: Iterator[ImageRef | Container]) -> Iterator[ImageRef]:
        """Put the images of containers in their place, several containers at once."""
        for is_container, group in groupby(found, lambda entry: isinstance(entry, Container)):
            if is_container:
                yield from self._opened(flat_map_ordered(self._reader.images, group))  # type: ignore[arg-type]
            else:
                yield from group  # type: ignore[misc]

    def why_empty(self, sample: float | None) -> str:
        if self._images:
            return (
                f"none of the {self._images} images of {self._source} falls into a sample of {sample:g}; "
                "use a larger sample"
            )
        if list_format(self._name) is not None and not has_magic(self._source) and not self._other_files:
            return f"the list {self._source} names no image"
        if not self._other_files:
            return f"no image found in {self._source}: no file is there{self._nearest_folder()}"
        lists = "; lists in a folder are named by a pattern such as folder/*.parquet" if self._other_files.lists else ""
        return (
            f"no image found in {self._source}: {self._other_files}; "
            f"images are told by their extension: {', '.join(sorted(self._wanted.extensions))}{lists}"
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
        return path_in(self._source, self._path)

    def _found(self) -> Iterator[ImageRef | Container]:
        if is_enumeration(self._path) and not (is_local(self._source) and os.path.lexists(self._path)):
            return chain.from_iterable(map(self._enumerated, expand_braces(self._source)))
        return self._named(self._source)

    def _enumerated(self, uri: str) -> Iterator[ImageRef | Container]:
        """One name of a range. It is taken as it is: what is missing is noticed where it is read."""
        path = open_store(uri, self._storage_options)[1]
        entry = self._file(path if is_local(uri) else uri)
        return self._named(uri) if entry is None else iter([entry])

    def _named(self, uri: str) -> Iterator[ImageRef | Container]:
        if is_local(uri):
            return self._local(open_store(uri)[1])
        if protocol_of(uri) in ("http", "https"):
            return self._web(uri)
        return self._remote(uri)

    def _local(self, path: str) -> Iterator[ImageRef | Container]:
        if Path(path).is_dir():
            return self._local_folder(path, None)
        if os.path.lexists(path):
            return iter([self._file(path) or self._refused(path)])
        if has_magic(path):
            pattern = GlobPattern(path)
            if Path(pattern.base).is_dir():
                return self._local_folder(pattern.base, pattern)
            path = pattern.base
        raise InputError(f"there is no {path}{explaining.nearest_name(path)}; check the path")

    def _local_folder(self, folder: str, pattern: GlobPattern | None) -> Iterator[ImageRef | Container]:
        files = walk_local(folder, partial(_enter, pattern))
        return self._selected(files, pattern, lambda relative: os.path.join(folder, relative))  # noqa: PTH118

    def _web(self, uri: str) -> Iterator[ImageRef | Container]:
        entry = self._file(uri)
        if isinstance(entry, Container):
            return iter([entry])
        info = {} if uri.endswith("/") else self._fs.info(uri)
        if uri.endswith("/") or info.get("mimetype") == "text/html":
            raise InputError(
                f"{uri} is a web page or folder, and folders cannot be listed over HTTP; "
                "give a list of image addresses (.txt, .csv, .parquet), a range such as {000..499}.tar, or one image"
            )
        if entry is None and extension_of(path_in(uri, uri)):
            self._refused(uri)
        return iter([_versioned(uri, version_of_info(info))])

    def _remote(self, uri: str) -> Iterator[ImageRef | Container]:
        fs, path = open_store(uri, self._storage_options)
        if has_magic(path):
            pattern = GlobPattern(path)
            return self._remote_folder(uri, pattern.base, pattern)
        entry = None if uri.endswith("/") else self._file(uri)
        if isinstance(entry, ImageRef):
            return iter([_versioned(uri, version_at(fs, path))])
        return self._remote_folder(uri, path, None) if entry is None else iter([entry])

    def _remote_folder(self, uri: str, folder: str, pattern: GlobPattern | None) -> Iterator[ImageRef | Container]:
        protocol = protocol_of(uri)
        if not folder:
            raise InputError(f"{uri} names no bucket; write {protocol}://bucket/folder")
        if protocol in ("s3", "s3a"):
            fs, _ = open_bounded(
                uri, self._storage_options or {}, requests=_LISTING_ATTEMPTS, timeout_s=_LISTING_TIMEOUT_S
            )
            bucket, inner, _ = fs.split_path(folder)  # which knows the names of access points
            prefix = f"{inner}/" if inner else ""
            files = walk_s3(fs, bucket, prefix, pattern.literal[len(bucket) + 1 :] if pattern else prefix)
            authority = bucket
        else:
            inner = folder.partition("/")[2]
            prefix = f"{inner}/" if inner else ""
            files = walk_store(self._fs, folder, partial(_enter, pattern))
            authority = urlsplit(uri).netloc  # names the account too on Azure
        return self._selected(files, pattern, lambda relative: f"{protocol}://{authority}/{prefix}{relative}")

    def _selected(
        self, files: Iterator[StoredFile], pattern: GlobPattern | None, uri_of: Callable[[str], str]
    ) -> Iterator[ImageRef | Container]:
        wants_lists = pattern is not None and list_format(pattern.pattern) is not None
        left_out = _inside(self._without, uri_of(""))
        for file in files:
            if left_out is not None and file.relative.startswith(left_out):
                continue
            if _is_hidden(file.relative, pattern) or (pattern and not pattern.matches(file.relative)):
                continue
            ref = ImageRef(uri_of(file.relative), file.size_bytes, file.etag)
            if file.unlisted:
                yield ref
                continue
            if wants_lists and list_format(file.relative) is not None:
                yield Container(ref.uri, ref.etag)
            elif (entry := self._reader.classified(file.relative, ref)) is not None:
                yield self._checked(entry)
            elif names_compressed_tar(file.relative):
                if pattern is not None:
                    refuse_compressed(ref.uri)
                _LOG.warning("%s is left out: images cannot be read out of a compressed tar; decompress it", ref.uri)

    def _file(self, uri: str) -> ImageRef | Container | None:
        """A file that the user has named, by its extension; None if it may be a folder."""
        name = path_in(uri, uri)
        refuse_compressed(name)
        if is_tar(name) or list_format(name) is not None or extension_of(name) == "json":
            return Container(uri)
        return self._checked(ImageRef(uri)) if self._wanted.is_image(name) else None

    def _checked(self, entry: ImageRef | Container) -> ImageRef | Container:
        if self._wanted.keep_columns and isinstance(entry, ImageRef):
            raise InputError(
                f"{entry.uri} is an image of its own and has no columns to keep; leave "
                f"{setting_name('keep_columns')} out, or give a list"
            )
        return entry

    def _refused(self, uri: str) -> ImageRef:
        if not extension_of(uri):
            return ImageRef(uri)
        raise InputError(
            f"{uri} is neither a folder, nor a tar, nor a list (.txt, .csv, .tsv, .jsonl, .parquet), nor an image "
            f"({', '.join(sorted(self._wanted.extensions))})"
        )


def _enter(pattern: GlobPattern | None, folder: str) -> bool:
    return not _is_hidden(folder, pattern) and (pattern is None or pattern.may_contain(folder))


def _is_hidden(relative: str, pattern: GlobPattern | None) -> bool:
    return is_hidden(relative) and not (pattern is not None and pattern.wants_hidden)


def _inside(folder: str | None, base: str) -> str | None:
    """The path of a folder below another one, with a slash at its end; None if it lies elsewhere."""
    if folder is None or is_local(folder) != is_local(base):
        return None
    if is_local(folder):
        inner, outer = (f"{Path(local_path(place)).resolve()}/" for place in (folder, base))
    else:  # whatever the protocol: s3 and s3a are one store
        inner, outer = (f"{place.partition('://')[2].rstrip('/')}/" for place in (folder, base))
    return inner[len(outer) :] or None if inner.startswith(outer) else None


def _versioned(uri: str, version: Version) -> ImageRef:
    return ImageRef(uri, version.size_bytes, version.mark if version.tag or version.modified else None)


def _uniform(uri: str) -> float:
    digest = hashlib.blake2b(uri.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2.0**64
