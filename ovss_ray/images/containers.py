"""Files that stand for many images: tars, Parquet files with images, lists."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator
from itertools import groupby
from threading import Lock
from typing import BinaryIO, NamedTuple
from urllib.parse import urlsplit

import fsspec

from ovss_ray.errors import InputError
from ovss_ray.images.explaining import listing, no_byte_ranges
from ovss_ray.images.inventory import CurrentObjects, Inventory, open_inventory_file, read_inventory
from ovss_ray.images.kept_columns import check_columns, to_json
from ovss_ray.images.list_files import find_columns, read_rows
from ovss_ray.images.members import check_container, tar_uri
from ovss_ray.images.parquet_images import find_image_column, row_images
from ovss_ray.images.reach import USERS_WORD, Reach
from ovss_ray.images.references import ImageRef, Wanted, extension_of
from ovss_ray.images.stores import StorageOptions, is_local, open_store, protocol_of
from ovss_ray.images.tables import Table, list_format, open_parquet, open_text_table
from ovss_ray.images.tars import READ_AHEAD, SampleFields, TarMember, is_tar, sample_of, tar_members
from ovss_ray.images.versions import version_at


class Container(NamedTuple):
    """A file with many images; its etag where a listing has told it.

    Attributes:
        chosen: whether the user has named it, so that a list counts; in folders, only tars and Parquet files with
            images do.
    """

    uri: str
    etag: str | None = None
    chosen: bool = True


class OtherFiles:
    """Counts files that are no images by their extension; from any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._counts: Counter[str] = Counter()
        self.hidden = 0

    def add_hidden(self) -> None:
        """Count a member of a tar that is left out for its name, whatever it is."""
        with self._lock:
            self.hidden += 1

    def add(self, name: str) -> None:
        """Count a file."""
        kind = f".{extension}" if (extension := extension_of(name)) else "without extension"
        with self._lock:
            self._counts[kind if kind in self._counts or len(self._counts) < 1000 else "of other kinds"] += 1

    @property
    def lists(self) -> bool:
        """Whether there were files among them that are lists if they are named."""
        return any(list_format(f"name{kind}") is not None for kind in self._counts)

    def __bool__(self) -> bool:
        """Whether there were any."""
        return bool(self._counts)

    def by_kind(self) -> str:
        """How many there were of each extension, the most frequent ten by name: "3 files (2 .mov, 1 .txt)"."""
        with self._lock:
            total, kinds = self._counts.total(), self._counts.most_common(10)
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds)
        rest = total - sum(count for _, count in kinds)
        return f"{total} file{'s' if total != 1 else ''} ({listed}{f', {rest} of other kinds' if rest else ''})"

    def __str__(self) -> str:
        """How many there were, and what there was most of."""
        kinds = ", ".join(f"{count} {kind}" for kind, count in self._counts.most_common(5))
        return f"{self._counts.total()} other files were seen ({kinds})"


def is_hidden(relative: str) -> bool:
    """Whether a name, or a folder in it, begins with a dot."""
    name = relative.removeprefix("./")
    return name.startswith(".") or "/." in name


class ContainerReader:
    """Reads what is in containers, one call per file, in any thread.

    Args:
        wanted: what counts as an image, and what is kept.
        storage_options: see `open_store`.
        other_files: counts what is left out.
        reach: which containers an inventory may name.
    """

    def __init__(
        self,
        wanted: Wanted,
        storage_options: StorageOptions | None,
        other_files: OtherFiles,
        reach: Reach = USERS_WORD,
    ) -> None:
        self._wanted = wanted
        self._reach = reach
        self._storage_options = storage_options
        self._other_files = other_files

    def images(self, container: Container) -> Iterator[ImageRef | Container]:
        """The images in a file in its order; of an inventory, also the containers that it names.

        Raises:
            InputError: the file cannot be read, or not to its end; after everything before.
        """
        with listing(container.uri):
            fs, path = self._open(container.uri)
            name = path_in(container.uri, path)
            if is_tar(name):
                yield from self._tar(fs, path, container)
            elif list_format(name) == ".parquet":
                yield from self._parquet(fs, path, container)
            elif extension_of(name) == "json":
                yield from self._inventory(read_inventory(fs, path, container.uri))
            else:
                kind = list_format(name) or ".txt"
                with open_text_table(fs, path, container.uri, kind=kind) as table:
                    yield from self._rows(table, container.uri)

    def _open(self, uri: str) -> tuple[fsspec.AbstractFileSystem, str]:
        refusal = self._reach.refusal(uri)
        if refusal is not None:
            raise InputError(f"{uri} is not opened: {refusal}")
        return open_store(uri, self._storage_options, self._reach)

    def _tar(self, fs: fsspec.AbstractFileSystem, path: str, container: Container) -> Iterator[ImageRef]:
        check_container(container.uri)
        buffered = {} if is_local(container.uri) else {"block_size": READ_AHEAD, "cache_type": "readahead"}
        etag = container.etag or version_at(fs, path).mark  # first: of a file that is replaced meanwhile, the old one
        with fs.open(path, "rb", **buffered) as file:
            size_bytes = file.seek(0, io.SEEK_END)
            found = tar_members(file, size_bytes, container.uri, wanted=self._wanted.is_image)
            members = (member for member in found if not self._is_hidden(member))
            if self._wanted.keep_columns:
                yield from self._samples(file, members, container.uri, etag)
                return
            for member in members:
                if self._wanted.is_image(member.name):
                    yield _tar_image(member, container.uri, etag, None)
                else:
                    self._other_files.add(member.name)

    def _is_hidden(self, member: TarMember) -> bool:
        hidden = is_hidden(member.name)
        if hidden and self._wanted.is_image(member.name):
            self._other_files.add_hidden()
        return hidden

    def _samples(
        self, file: BinaryIO, members: Iterator[TarMember], source: str, etag: str | None
    ) -> Iterator[ImageRef]:
        names = self._wanted.keep_columns
        fields = SampleFields(names)
        found = False
        for _, sample in groupby(members, key=lambda member: sample_of(member.name)[0]):
            images = []
            for member in sample:
                if self._wanted.is_image(member.name):
                    images.append(member)
                else:
                    fields.add(file, member, source)
                    self._other_files.add(member.name)
            extra = to_json(names, fields.take(), source)
            yield from (_tar_image(member, source, etag, extra) for member in images)
            found = found or bool(images)
        if found:
            check_columns(names, list(fields.seen), source)

    def _parquet(
        self, fs: fsspec.AbstractFileSystem, path: str, container: Container
    ) -> Iterator[ImageRef | Container]:
        etag = container.etag or version_at(fs, path).mark
        with open_parquet(fs, path, container.uri) as table:
            column = find_image_column(table.schema, container.uri, self._wanted)
            if column is not None:
                check_container(container.uri)
                if not table.by_ranges:
                    raise no_byte_ranges(container.uri)
                yield from row_images(table, column, container.uri, etag, self._wanted)
            elif container.chosen:
                yield from self._rows(table, container.uri)
            else:
                self._other_files.add(path)

    def _inventory(self, inventory: Inventory) -> Iterator[ImageRef | Container]:
        for uri in inventory.files:
            with listing(uri):
                fs, path = self._open(uri)
                with open_inventory_file(fs, path, uri, inventory) as table:
                    yield from self._rows(CurrentObjects(table, inventory), uri, of_inventory=True)

    def _rows(self, table: Table, source: str, *, of_inventory: bool = False) -> Iterator[ImageRef | Container]:
        columns = find_columns(table.columns, source, self._wanted)
        if of_inventory and not columns.is_inventory:  # of what else it names, nobody could tell that it stood here
            raise InputError(f"{source} is no file of an S3 Inventory: it is read by its columns bucket and key alone")
        refs = read_rows(table, columns, source)
        if not columns.is_inventory:
            return refs
        keys = ((ref.uri.partition("://")[2], ref) for ref in refs)
        objects = (self.classified(key, ref) for key, ref in keys if not is_hidden(key))
        return (found for found in objects if found is not None)

    def classified(self, name: str, ref: ImageRef) -> ImageRef | Container | None:
        """What an object of a listing is, by its name: an image, a container, or neither, which is counted."""
        if self._wanted.is_image(name):
            return ref
        if is_tar(name) or list_format(name) == ".parquet":
            return Container(ref.uri, ref.etag, chosen=False)
        self._other_files.add(name)
        return None


def path_in(uri: str, path: str) -> str:
    """The path of a URI without the query that web addresses may have."""
    return urlsplit(path).path if protocol_of(uri) in ("http", "https") else path


def _tar_image(member: TarMember, tar: str, etag: str | None, extra: str | None) -> ImageRef:
    return ImageRef(tar_uri(member.name, tar), member.size_bytes, etag, member.offset, extra, member.header_bytes)
