"""What `Run.sql` gives: a DuckDB relation whose errors are those of this package, also when they come late."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import duckdb
import pyarrow as pa


class Relation:
    """A query over a run that is not carried out yet.

    It has all methods of a `duckdb.DuckDBPyRelation`: `fetchall()`, `show()`, `df()`, `pl()`, `to_arrow_table()`,
    `filter(...)`, `limit(...)` and so on; `to_arrow_reader()` streams a large result.

    Args:
        relation: the query.
        explain: makes of what DuckDB raises what users should see.
    """

    def __init__(self, relation: duckdb.DuckDBPyRelation, explain: Callable[[Exception], Exception]) -> None:
        self._relation = relation
        self._explain = explain

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # numpy and pickle ask for what is not there
            raise AttributeError(name)
        return self._guarded(lambda: getattr(self._relation, name))

    def __getitem__(self, name: str) -> Any:
        return self._guarded(lambda: self._relation[name])

    def __contains__(self, name: str) -> bool:
        return name in self._relation.columns

    def __len__(self) -> int:
        return int(self._guarded(lambda: len(self._relation)))

    def __str__(self) -> str:
        return str(self._guarded(lambda: str(self._relation)))

    def __repr__(self) -> str:
        return str(self)

    def to_arrow_reader(self) -> pa.RecordBatchReader:
        """The result as a stream of record batches, for one that is larger than memory."""
        reader = self._guarded(lambda: pa.RecordBatchReader.from_stream(self._relation))
        return pa.RecordBatchReader.from_batches(reader.schema, self._batches(reader))

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        """For `pa.table(relation)` and other libraries; a late error loses its class on this way."""
        return self.to_arrow_reader().__arrow_c_stream__(requested_schema)

    def _batches(self, reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
        while True:
            try:
                yield self._guarded(reader.read_next_batch)
            except StopIteration:
                return

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            result = work()
        except (duckdb.Error, pa.ArrowException, OSError) as error:
            explained = self._explain(error)
            if explained is error:
                raise
            raise explained from error
        if isinstance(result, duckdb.DuckDBPyRelation):
            return Relation(result, self._explain)
        if callable(result) and not isinstance(result, type):
            return lambda *arguments, **options: self._guarded(lambda: result(*arguments, **options))
        return result
