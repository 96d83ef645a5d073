"""Reading a run, finished or not: its label maps, its statistics, and SQL over both."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from ovss_ray.errors import IMAGE_FAILURES, DamagedRunError, OvssError, SettingError, nearest
from ovss_ray.images.stores import StorageOptions, explained, is_local, open_store
from ovss_ray.labels.additions import grown, read_additions
from ovss_ray.labels.codecs import LabelMap, decode_confidence_map, decode_label_map
from ovss_ray.labels.connections import Connections
from ovss_ray.labels.layout import SHARDS_FOLDER, Manifest
from ovss_ray.labels.outcomes import Outcomes, count_outcomes
from ovss_ray.labels.pixels import RgbImage
from ovss_ray.labels.record import RunRecord, explain_missing, parse_record
from ovss_ray.labels.relation import Relation
from ovss_ray.labels.rows import explain_query, nothing_written
from ovss_ray.labels.schema import load_schema
from ovss_ray.labels.shard import list_shards
from ovss_ray.labels.views import BULKY_COLUMNS
from ovss_ray.vocabulary import Vocabulary

if TYPE_CHECKING:
    from PIL import Image

_LOOKUP_COLUMNS = ["image_id", "uri", "status", "error", "height", "width", "label_map"]
_STATUSES = ("ok", *IMAGE_FAILURES)


def open_run(path: str | PathLike[str], storage_options: StorageOptions | None = None) -> Run:
    """Open a run directory for reading; the run may still be going on.

    Args:
        path: the run directory, local or in an object store.
        storage_options: fsspec options by protocol, e.g. `{"s3": {"endpoint_url": ...}}`.

    Raises:
        SettingError: if there is no run there; says what is there instead.
        OvssError: if the store cannot be reached, or the run was written by a newer version of this package.
    """
    if not isinstance(path, str | PathLike):
        raise SettingError(f"open_run({path!r}): give the path or URI of a run directory")
    uri = fspath(path).rstrip("/")
    fs, root = open_store(uri or "/", storage_options)
    with explained(uri):
        try:
            stored = fs.cat_file(f"{root}/run.json")
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            raise SettingError(explain_missing(fs, root, uri)) from None
    record, planned = parse_record(stored, uri)
    return Run(uri, root, record, planned, storage_options)


@dataclass(frozen=True, eq=False)
class StoredImage:
    """One image as a shard holds it; `labels` is [H, W] class ids, None unless `status` is "ok"."""

    image_id: int
    uri: str
    status: str
    error: str | None
    labels: LabelMap | None


class Run:
    """One labelling run; use `open_run`.

    Iterating gives the images that have labels, one `StoredImage` each, shard by shard; `len` is their number, by one
    small request per shard. Also a context manager, which closes the SQL connection. A run can be pickled and used in
    other processes, forked ones too: each connects by itself. Storage options are part of the pickle.

    Attributes:
        uri: the run directory as it was given.
        job: the resolved settings of the run.
        fingerprint: SHA-256 over everything that changes the labels.
        warnings: why labels mean nothing, for a run with random weights, or with the demo's model and other classes.
        vocabulary: the classes.
        additions: images added later or labelled again, oldest first.
        manifest: the images and how they divide into shards, those of the additions included.
    """

    def __init__(
        self, uri: str, root: str, record: RunRecord, planned: Manifest, storage_options: StorageOptions | None = None
    ) -> None:
        self.uri = uri
        self.job: dict[str, Any] = record.job
        self.fingerprint = record.fingerprint
        self.warnings = record.warnings
        self.vocabulary: Vocabulary = record.vocabulary
        self._planned = planned
        # A pickle may be opened in another working directory.
        place = root if is_local(uri) else uri
        self._connections = Connections(place, root, uri, self.job, self.vocabulary, storage_options)
        self._read_additions()

    @property
    def num_images(self) -> int:
        """Number of images in the manifest."""
        return self.manifest.images

    @property
    def num_shards(self) -> int:
        """Number of shards, those that label images again included."""
        return self.manifest.shards

    def __len__(self) -> int:
        return self.status_counts().get("ok", 0)

    def __bool__(self) -> bool:
        return True  # without counting

    def __iter__(self) -> Iterator[StoredImage]:
        done = self.shards_done()
        superseded = self.superseded(done)
        for shard in done:
            for image in self.rows_of(shard, without=superseded.get(shard, frozenset())):
                if image.labels is not None:
                    yield image

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the SQL connection, if `sql`, `images` or `segments` opened one; their relations end with it."""
        self._connections.close()

    def __repr__(self) -> str:
        return f"Run({self.uri!r}, {self.num_images} images, {self.vocabulary.num_classes} classes)"

    def shards_done(self) -> list[int]:
        """Numbers of the shards that are written, ascending; one listing."""
        with explained(self.uri):
            found = list_shards(self._connections.fs, f"{self._connections.root}/{SHARDS_FOLDER}")
            if found and found[-1] >= self.manifest.shards:
                self._read_additions()  # the run has grown since it was opened
        if found and found[-1] >= self.manifest.shards:
            raise DamagedRunError(
                f"{self._connections.rows.uri_of(found[-1])} is no part of the run, which has {self.manifest.shards} "
                "shards; remove it"
            )
        return found

    def status_counts(self) -> dict[str, int]:
        """Number of images by status, of the shards that are written; a status without images is left out."""
        return self.outcomes().statuses

    def outcomes(self) -> Outcomes:
        """What became of the images of the shards that are written: counts by status, and the reasons of failures."""
        done = self.shards_done()
        with explained(self.uri):
            return count_outcomes(self._open_shard, done, self.superseded(done))

    def images(self, columns: Sequence[str] | None = None, *, status: str | Sequence[str] | None = None) -> pa.Table:
        """One row per image of the shards that are written, by ascending image_id.

        Args:
            columns: names from `schemas/shard.yaml`; if not given all but the maps, segments and components.
            status: only images with this status, or one of these.

        Raises:
            SettingError: for an unknown column or status.
            DamagedRunError: if a shard cannot be read.
            OvssError: if no shard is written yet.
        """
        known = load_schema("shard").names
        chosen = [name for name in known if name not in BULKY_COLUMNS] if columns is None else columns
        for name in chosen:
            if name not in known:
                hint = nearest(name, known) or f"; there are {', '.join(known)}"
                raise SettingError(f"images have no column {name!r}{hint}")
        statuses = [status] if isinstance(status, str) else status
        for value in statuses or ():
            if value not in _STATUSES:
                hint = nearest(str(value).lower(), _STATUSES) or f"; there are {', '.join(_STATUSES)}"
                raise SettingError(f"images have no status {value!r}{hint}")
        literals = ", ".join(f"'{value}'" for value in statuses or ())
        where = "" if statuses is None else f"WHERE status IN ({literals or 'NULL'})"
        table: pa.Table = self.sql(
            f"SELECT {', '.join(chosen)} FROM shard_rows {where} ORDER BY image_id"
        ).to_arrow_table()
        return table

    def segments(self) -> pa.Table:
        """One row per image and class present, by ascending image_id and class_id.

        Columns: image_id, uri, class_id, class_name and the statistics in `segments` of `schemas/shard.yaml`.

        Raises:
            DamagedRunError, OvssError: as `images`.
        """
        table: pa.Table = self.sql("SELECT * FROM segments ORDER BY image_id, class_id").to_arrow_table()
        return table

    def components(self) -> pa.Table:
        """One row per connected component, by ascending image_id and class_id, the largest first.

        Columns: image_id, uri, height and width of the image, class_id, class_name and the fields of `components` in
        `schemas/shard.yaml`. `pycocotools.mask.decode({"size": [height, width], "counts": rle})` is the mask.

        Raises:
            SettingError: the run has none; it was started without `components`.
            DamagedRunError, OvssError: as `images`.
        """
        if self.job.get("components") is None:
            raise SettingError(f"{self.uri} has no components; label with --components 100 (pixels of the smallest)")
        order = "image_id, class_id, pixels DESC, bbox_y, bbox_x"
        table: pa.Table = self.sql(f"SELECT * FROM components ORDER BY {order}").to_arrow_table()
        return table

    def sql(self, query: str) -> Relation:
        """Query the shards that are written with DuckDB.

        Views: `images` (one row per image), `segments` (one row per image and class present), `components` (one row
        per connected component, if the run has any), `classes` (the vocabulary), `shard_rows` (`images` with all other
        columns of `schemas/shard.yaml`).

        Returns:
            A DuckDB relation; nothing is read before `.fetchall()`, `.show()`, `.to_arrow_table()`, or, for a result
            larger than memory, an iteration over `.to_arrow_reader()`.

        Raises:
            SettingError: if the query is not valid.
            DamagedRunError: if a shard cannot be read; the methods of the relation raise both too.
            OvssError: if no shard is written yet.
        """
        done = self.shards_done()
        if not done:
            raise OvssError(nothing_written(self.uri))
        with self._explained_query(done):
            self._connections.views(done[0], self.manifest).update(self.manifest, done)
            relation = self._connections.views(done[0], self.manifest).connection.sql(query)
        if relation is None:
            raise SettingError("the query gives no rows; write a SELECT statement")
        return Relation(relation, partial(explain_query, self._connections.rows, self.manifest, done))

    def label_map(self, image_id: int, *, min_confidence: float | None = None) -> LabelMap:
        """The class ids of one image, [H, W] uint8 or uint16, `vocabulary.ignore_index` where there is none.

        Reads the footer and one row group of one file; of an image that was labelled again, of one file per attempt.

        Args:
            min_confidence: pixels whose class is less probable than this, 0..1, count as unlabelled; for runs with
                confidence maps.

        Raises:
            SettingError: if the run has no such image, or no confidence maps.
            DamagedRunError: if it cannot be read.
            OvssError: if the image failed (with its reason) or its shard is not written yet.
        """
        threshold = self._threshold(min_confidence)
        return self._decode(self._labelled_row(image_id, threshold is not None), threshold)

    def confidence_map(self, image_id: int) -> npt.NDArray[np.uint8]:
        """The probability of the winning class at every pixel of an image, [H, W] uint8: round(255 x probability).

        Pixels without a label, or of the background, have that of the class that was best there, as in
        `confidence_mean`.

        Raises:
            SettingError, DamagedRunError, OvssError: as `label_map`.
        """
        self._require_confidence()
        return self._decode_confidence(self._labelled_row(image_id, True))

    def image(self, image_id: int) -> RgbImage:
        """One image as the segmenter saw it, uint8 [H, W, 3] RGB, from wherever it lies, also in a tar or Parquet file.

        It is fetched again and decoded by the rules and within the limits of the run. Images without labels can be
        asked for too.

        Raises:
            SettingError: if the run has no such image, or `image_id` is no number.
            ImageError: if it cannot be read (any more); `status` and `reason` are those of a row of a shard.
            OvssError: if the run itself cannot be read.
        """
        image_id = self._checked_id(image_id)
        home, _ = self.manifest.home_of(image_id)
        shards = chain(self._connections.rows.retries_of(image_id, self.manifest), [home])
        return self._connections.pixels.read(image_id, self.manifest, shards)

    def plot(
        self, image_id: int, *, photo: bool = True, legend: bool = True, max_side: int | None = None
    ) -> Image.Image:
        """One image with its labels over it and a legend of the classes present, as a Pillow image.

        Args:
            photo: whether the image is fetched; without it the colours stand alone.
            legend: with it, pictures of less than 256 pixels are enlarged.
            max_side: longest side of the picture in pixels; a larger one is reduced, the legend comes on top.

        Raises:
            SettingError, DamagedRunError, OvssError: as `label_map`; also if the image has another size by now.
            ImageError: as `image`; `photo=False` draws the labels alone.
        """
        from ovss_ray.labels.pictures import draw_labels

        labels = self.label_map(image_id)
        pixels = self.image(image_id) if photo else None
        if pixels is not None and pixels.shape[:2] != labels.shape:
            raise OvssError(
                f"image {image_id} of {self.uri} is {pixels.shape[1]} x {pixels.shape[0]} by now, its label map "
                f"{labels.shape[1]} x {labels.shape[0]}; photo=False draws the labels alone"
            )
        return draw_labels(labels, self.vocabulary, pixels, legend=legend, max_side=max_side)

    def label_maps(self, *, min_confidence: float | None = None) -> Iterator[tuple[int, LabelMap]]:
        """All label maps as (image_id, [H, W] class ids), shard by shard; images that failed are left out.

        Holds one row group in memory. The images of a shard that labels some again come with that shard.

        Args:
            min_confidence: as for `label_map`.

        Raises:
            SettingError, DamagedRunError: as `label_map`.
        """
        threshold = self._threshold(min_confidence)
        done = self.shards_done()
        superseded = self.superseded(done)
        for shard in done:
            for row in self._rows_of(shard, threshold is not None):
                if row["status"] == "ok" and row["image_id"] not in superseded.get(shard, frozenset()):
                    yield row["image_id"], self._decode(row, threshold)

    def rows_of(self, shard: int, *, without: Set[int] = frozenset()) -> Iterator[StoredImage]:
        """All images of one shard that is written, labelled or not, by ascending image_id; holds one row group.

        Args:
            shard: its number.
            without: images to leave out, such as those that are `superseded`.
        """
        for row in self._rows_of(shard):
            if row["image_id"] not in without:
                labels = self._decode(row) if row["status"] == "ok" else None
                yield StoredImage(row["image_id"], row["uri"], row["status"], row["error"], labels)

    def superseded(self, done: Sequence[int]) -> Mapping[int, Set[int]]:
        """Of these shards, the images whose row does not count, because that of a later shard does; by shard."""
        if not done or not self.manifest.retry_shards:
            return {}
        with self._explained_query(done):
            views = self._connections.views(done[0], self.manifest)
            views.update(self.manifest, done)
            return views.superseded()

    def _rows_of(self, shard: int, confidence: bool = False) -> Iterator[dict[str, Any]]:
        columns = [*_LOOKUP_COLUMNS, "confidence_map"] if confidence else _LOOKUP_COLUMNS
        with explained(self.uri), self._open_shard(shard) as parquet:
            for group in range(parquet.num_row_groups):
                yield from parquet.read_row_group(group, columns=columns).to_pylist()

    def _labelled_row(self, image_id: int, confidence: bool) -> dict[str, Any]:
        number = self._checked_id(image_id)
        columns = [*_LOOKUP_COLUMNS, "confidence_map"] if confidence else _LOOKUP_COLUMNS
        row = self._connections.rows.row_of(number, self.manifest, columns)
        if row["status"] != "ok":
            raise OvssError(f"image {number} ({row['uri']}) has no label map: {row['status']}, {row['error']}")
        return row

    def _decode(self, row: Mapping[str, Any], threshold: float | None = None) -> LabelMap:
        try:
            labels = decode_label_map(row["label_map"], row["height"], row["width"], self.vocabulary.label_dtype)
        except OvssError as error:
            raise self._damaged_image(row, error) from error
        if threshold is not None:
            labels[self._decode_confidence(row) < threshold] = self.vocabulary.ignore_index
        return labels

    def _decode_confidence(self, row: Mapping[str, Any]) -> npt.NDArray[np.uint8]:
        if "confidence_map" not in row:
            raise DamagedRunError(f"the shard of image {row['image_id']} of {self.uri} has no column confidence_map")
        try:
            return decode_confidence_map(row["confidence_map"], row["height"], row["width"])
        except OvssError as error:
            raise self._damaged_image(row, error) from error

    def _damaged_image(self, row: Mapping[str, Any], error: Exception) -> DamagedRunError:
        return DamagedRunError(f"image {row['image_id']} of {self.uri}: {error}")

    def _threshold(self, min_confidence: float | None) -> float | None:
        if min_confidence is None:
            return None
        try:
            usable = 0 <= min_confidence <= 1
        except TypeError:
            usable = False
        if not usable:
            raise SettingError(f"min_confidence is {min_confidence!r}; give a probability from 0 to 1")
        self._require_confidence()
        return 255 * min_confidence

    def _require_confidence(self) -> None:
        if self.job.get("confidence_map", "none") == "none":
            raise SettingError(f"{self.uri} has no confidence maps; label with --confidence-map uint8")

    def _checked_id(self, image_id: int) -> int:
        try:
            number = operator.index(image_id)
        except TypeError:
            raise SettingError(f"image_id is {image_id!r}; give the number of an image, from 0") from None
        if not 0 <= number < self.num_images:
            raise SettingError(f"{self.uri} has no image {number}: its image ids are 0 to {self.num_images - 1}")
        return number

    def _read_additions(self) -> None:
        with explained(self.uri):
            found = read_additions(self._connections.fs, self._connections.root, self.uri)
        self.additions = tuple(found)
        self.manifest = grown(self._planned, self.additions)

    @contextmanager
    def _open_shard(self, shard: int) -> Iterator[pq.ParquetFile]:
        with self._connections.rows.open(shard, self.manifest) as parquet:
            yield parquet

    @contextmanager
    def _explained_query(self, done: Sequence[int]) -> Iterator[None]:
        try:
            yield
        except duckdb.Error as error:
            raise explain_query(self._connections.rows, self.manifest, done, error) from error
