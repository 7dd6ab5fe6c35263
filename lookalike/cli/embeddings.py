"""Items of a Parquet table that has their embeddings: as `gallery export` writes it, or made elsewhere."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedding.decision import Vectors
from embedding.errors import InvalidDataset
from index.batch.queries import IDS, columns_of, vectors_of
from lookalike.cli import show
from lookalike.cli.rows import identity_in, metadata_in
from lookalike.types import JSON, NewItem

_ROWS_AT_ONCE = 1024


@dataclass(frozen=True, slots=True)
class EmbeddedItem:
    """A row of the table."""

    name: str
    embedding: Vectors
    columns: Mapping[str, Any]
    """What else stands in the row, but for its id."""

    def item(self) -> NewItem:
        """The row as an item to store. Raises InvalidDataset."""
        if self.embedding.ndim != 1:
            raise InvalidDataset("its embedding is no list of numbers")
        others = dict(self.columns)
        identity, metadata = others.pop("identity", None), others.pop("metadata", None)
        return NewItem(
            id=self.name,
            image=self.embedding,
            identity=identity_in(identity),
            metadata=_object(metadata) | metadata_in(others),
        )


class EmbeddedItems:
    """The rows of a Parquet table, read as they are needed.

    The column `id`, `item` or `path` names the item, the first that is there, and `identity` whose it is; `metadata`
    holds a JSON object, to which the other columns are added. Raises InvalidDataset where no column names the items, or
    two rows name the same.
    """

    def __init__(self, table: Path, column: str) -> None:
        names = columns_of(table)
        found = next((name for name in IDS if name in names and name != column), None)
        if found is None:
            raise InvalidDataset(f"{table} has no column that names its items; give it one: {', '.join(IDS)}")
        self._table, self._column, self._id = table, column, found
        with pq.ParquetFile(table) as file:
            self._check_names(file.read([found]).column(0))
            self._rows = int(file.metadata.num_rows)

    def __len__(self) -> int:
        return self._rows

    def __iter__(self) -> Iterator[EmbeddedItem]:
        with pq.ParquetFile(self._table) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE):
                embeddings = vectors_of(batch.column(self._column))
                others = batch.drop_columns([self._column]).to_pylist()
                for emb_D, columns in zip(embeddings, others, strict=True):
                    yield EmbeddedItem(str(columns.pop(self._id)), emb_D, columns)

    def _check_names(self, names: pa.ChunkedArray) -> None:
        kind = names.type
        if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_integer(kind)):
            raise InvalidDataset(f"{self._table}: {self._id} holds {kind}; items are named by text or whole numbers")
        if names.null_count:
            rows = show.counted(names.null_count, "row")
            raise InvalidDataset(f"{self._table}: {rows} without {self._id}; name each item")
        counts = pc.value_counts(names)
        repeated = counts.filter(pc.greater(counts.field("counts"), 1))
        if len(repeated):
            name, count = repeated[0].as_py()["values"], repeated[0].as_py()["counts"]
            raise InvalidDataset(f"{self._table}: {count:,} rows would be item {name!r}; keep one of them")


def _object(metadata: Any) -> dict[str, JSON]:
    if isinstance(metadata, str):
        try:
            metadata = json.loads(metadata or "{}")
        except (ValueError, RecursionError) as error:
            raise InvalidDataset(f"its metadata is no JSON ({error})") from error
    if not isinstance(metadata, dict | None):
        raise InvalidDataset(f"its metadata is no JSON object but {type(metadata).__name__}")
    return metadata or {}
