"""What a `Run` holds open: the store, the SQL connection, the reader of images; made anew in every process."""

from __future__ import annotations

import os
from typing import Any

import fsspec

from ovss_ray.images.stores import StorageOptions, open_store
from ovss_ray.labels.layout import SHARDS_FOLDER, Manifest
from ovss_ray.labels.pixels import PixelReader
from ovss_ray.labels.rows import RowReader
from ovss_ray.labels.views import ShardViews
from ovss_ray.vocabulary import Vocabulary


class Connections:
    """Opened on first use, and again in a process that got a pickle or was forked.

    Args:
        place: the run directory, absolute.
        root: the run directory on its file system.
        uri: the run directory as users write it, for messages.
        job: the resolved settings of the run.
        vocabulary: the classes.
        storage_options: fsspec options by protocol.
    """

    def __init__(
        self,
        place: str,
        root: str,
        uri: str,
        job: dict[str, Any],
        vocabulary: Vocabulary,
        storage_options: StorageOptions | None,
    ) -> None:
        self.root = root
        self._place = place
        self._uri = uri
        self._job = job
        self._vocabulary = vocabulary
        self._storage_options = storage_options
        self._opened: dict[str, Any] = {}
        self._process = os.getpid()

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system on which the run lies."""
        opened = self._own()
        if "fs" not in opened:
            opened["fs"], _ = open_store(self._place, self._storage_options)
        return opened["fs"]

    @property
    def rows(self) -> RowReader:
        """Reads single rows."""
        opened = self._own()
        if "rows" not in opened:
            opened["rows"] = RowReader(self.fs, self.root, self._uri)
        reader: RowReader = opened["rows"]
        return reader

    @property
    def pixels(self) -> PixelReader:
        """Reads images."""
        opened = self._own()
        if "pixels" not in opened:
            opened["pixels"] = PixelReader(self.fs, self.root, self._uri, self._job, self._storage_options)
        reader: PixelReader = opened["pixels"]
        return reader

    def views(self, shard: int, manifest: Manifest) -> ShardViews:
        """The SQL views; `shard` is one that is written, which tells what columns there are."""
        opened = self._own()
        if "views" not in opened:
            with self.rows.open(shard, manifest) as parquet:  # refuses shards of a newer version
                columns = parquet.schema_arrow.names
            opened["views"] = ShardViews(self.fs, f"{self.root}/{SHARDS_FOLDER}", self._vocabulary, columns)
        views: ShardViews = opened["views"]
        return views

    def close(self) -> None:
        """Close the SQL connection, if there is one."""
        views: ShardViews | None = self._own().pop("views", None)
        if views is not None:
            views.connection.close()

    def _own(self) -> dict[str, Any]:
        """What this process has opened; a fork leaves what its parent has opened alone, and does not close it."""
        if self._process != os.getpid():
            self._inherited, self._opened, self._process = self._opened, {}, os.getpid()
        return self._opened

    def __getstate__(self) -> dict[str, Any]:
        return {**{name: value for name, value in vars(self).items() if name != "_inherited"}, "_opened": {}}
