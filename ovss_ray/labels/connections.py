"""What a `Run` holds open: the store, the SQL connection, the reader of images; made anew in every process."""

from __future__ import annotations

import ctypes
import os
from typing import Any
from weakref import WeakSet

import fsspec

from ovss_ray.images.stores import StorageOptions, open_store
from ovss_ray.labels.layout import SHARDS_FOLDER, Manifest
from ovss_ray.labels.pixels import PixelReader
from ovss_ray.labels.rows import FIRST_COLUMNS, RowReader
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
        _living.add(self)

    @property
    def fs(self) -> fsspec.AbstractFileSystem:
        """The file system on which the run lies."""
        opened = self._opened
        if "fs" not in opened:
            opened["fs"], _ = open_store(self._place, self._storage_options)
        return opened["fs"]

    @property
    def rows(self) -> RowReader:
        """Reads single rows."""
        opened = self._opened
        if "rows" not in opened:
            opened["rows"] = RowReader(self.fs, self.root, self._uri)
        reader: RowReader = opened["rows"]
        return reader

    @property
    def pixels(self) -> PixelReader:
        """Reads images."""
        opened = self._opened
        if "pixels" not in opened:
            opened["pixels"] = PixelReader(self.fs, self.root, self._uri, self._job, self._storage_options)
        reader: PixelReader = opened["pixels"]
        return reader

    def views(self, shard: int, manifest: Manifest) -> ShardViews:
        """The SQL views; `shard` is one that is written, which tells what columns there are.

        A run that was begun before there were confidence maps and components has no such settings, and its shards have
        no such columns, but for those that a later version labelled again.
        """
        opened = self._opened
        if "views" not in opened:
            with self.rows.open(shard, manifest) as parquet:  # refuses shards of a newer version
                columns = [name for name in parquet.schema_arrow.names if name in self._job or name in FIRST_COLUMNS]
            opened["views"] = ShardViews(self.fs, f"{self.root}/{SHARDS_FOLDER}", self._vocabulary, columns)
        views: ShardViews = opened["views"]
        return views

    def close(self) -> None:
        """Close the SQL connection, if there is one."""
        views: ShardViews | None = self._opened.pop("views", None)
        if views is not None:
            views.connection.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_opened": {}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _living.add(self)

    def leave_to_parent(self) -> None:
        """Forget what is opened, in a child process that was forked, and never close it.

        DuckDB's destructor waits for threads that are not there in a forked process, and ends it by a signal. An object
        that has a reference left at the end of its process is spared it; DuckDB then says on stderr that some leaked.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._opened))
        self._opened = {}


_living: WeakSet[Connections] = WeakSet()


def _leave_all_to_parent() -> None:
    for connections in list(_living):
        connections.leave_to_parent()


os.register_at_fork(after_in_child=_leave_all_to_parent)
