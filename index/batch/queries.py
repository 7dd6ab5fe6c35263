"""Queries of batch jobs: images of a folder or a table, embeddings of an array or a table, the items of a gallery.

Each is read as it is needed, so that memory does not grow with their number. D embedding width.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from embedding.decision import Vectors
from embedding.errors import InvalidDataset, InvalidInput
from index.batch import Queries, Query
from index.batch.folder import FOOTER
from index.batch.images import ImageFolder
from index.engine import Filter, GalleryEngine
from index.items import page_token_after

EMBEDDING = "embedding"
"""The column of embeddings, unless another is named."""
IDS = ("id", "item", "path")
"""Columns that may name a row of embeddings: the first that is there does."""
_PAGE = 1000
_ROWS_AT_ONCE = 1024


def queries_of(source: Path, embeddings: str = "") -> Queries:
    """The queries of a folder of images, a .csv or .parquet of their paths, a .npy of embeddings [N, D], or a .parquet
    with a column of embeddings: that named `embeddings`, else "embedding" where there is one and no column "path".

    Raises InvalidDataset.
    """
    if not source.exists():
        raise InvalidDataset(f"no such folder or file: {source}; check the path")
    suffix = source.suffix.lower()
    if source.is_dir() and not embeddings:
        return ImageFolder(source)
    if suffix == ".npy" and not embeddings:
        return Array(source)
    if column := embeddings_column(source, embeddings):
        return EmbeddingTable(source, column)
    if suffix in {".csv", ".parquet"}:
        return PathTable(source)
    raise InvalidDataset(
        f"{source} is neither a folder, nor a .csv or .parquet table, nor a .npy array; give one of these"
    )


def embeddings_column(table: Path, named: str = "") -> str:
    """The column of embeddings: that `named`, else "embedding" where there is one and no column "path"; "" where the
    table is none of embeddings. Raises InvalidDataset where it is none and a column is named."""
    if table.suffix.lower() != ".parquet":
        if named:
            raise InvalidDataset(f"{table} is no .parquet table, which alone has a column of embeddings")
        return ""
    names = columns_of(table)
    if named and named not in names:
        raise InvalidDataset(f"{table} has no column {named!r}; it has {', '.join(map(repr, names))}")
    return named or (EMBEDDING if EMBEDDING in names and "path" not in names else "")


def check_model(table: Path, model: str) -> None:
    """Raises InvalidInput where the footer of a table, as `lookalike gallery export` writes it, names another model."""
    import pyarrow.parquet as pq

    try:
        said = json.loads((pq.read_metadata(table).metadata or {}).get(FOOTER, b"{}"))
    except ValueError:
        return
    made_by = said.get("model", model) if isinstance(said, dict) else model
    if made_by != model:
        raise InvalidInput(
            f"{table} holds embeddings of model {made_by}, and the gallery's are of {model}: distances between them "
            "mean nothing; give a gallery of that model, or the images themselves"
        )


class PathTable:
    """The images that a CSV or Parquet table names in its column `path`, relative to the table. The paths are ids."""

    kind = "table of paths"

    def __init__(self, table: Path) -> None:
        self._table = table
        self.digest = _stamp(table)

    def now(self) -> str:
        return _stamp(self._table)

    @cached_property
    def total(self) -> int:
        return sum(1 for _ in self._paths())

    def since(self, row: int, after: str) -> Iterator[Query]:
        for path in islice(self._paths(), row, None):
            yield Query(path, self._table.parent / path)

    def _paths(self) -> Iterator[str]:
        rows = _csv_column(self._table) if self._table.suffix.lower() == ".csv" else _parquet_column(self._table)
        for number, path in enumerate(rows, start=1):
            if not isinstance(path, str) or not path:
                raise InvalidDataset(
                    f"{self._table}, row {number}: the column path must name an image; got {path!r}; for embeddings "
                    "name their column with --embeddings"
                )
            yield path


class Array:
    """The rows of a .npy file: unit float32 embeddings [N, D]. Their ids are row numbers, from 0."""

    kind = "array"

    def __init__(self, path: Path) -> None:
        try:
            self._rows_ND = np.load(path, mmap_mode="r", allow_pickle=False)
        except (ValueError, EOFError, OSError) as error:
            raise InvalidDataset(f"{path} is not an array in NumPy's format ({error})") from error
        if self._rows_ND.ndim != 2 or self._rows_ND.dtype.kind != "f":
            raise InvalidDataset(
                f"{path} holds {self._rows_ND.dtype} {list(self._rows_ND.shape)}; embeddings are float32 [N, D]"
            )
        self._path = path
        self.digest = _stamp(path)
        self.total = len(self._rows_ND)

    def now(self) -> str:
        return _stamp(self._path)

    def since(self, row: int, after: str) -> Iterator[Query]:
        for start in range(row, self.total, _ROWS_AT_ONCE):
            block_ND = np.array(self._rows_ND[start : start + _ROWS_AT_ONCE], np.float32)
            for at, emb_D in enumerate(block_ND, start):
                yield Query(str(at), emb_D)


class EmbeddingTable:
    """The rows of a Parquet table with a column of embeddings, and one of ids where there is one; else row numbers."""

    kind = "table of embeddings"

    def __init__(self, table: Path, column: str) -> None:
        import pyarrow.parquet as pq

        names = columns_of(table)
        self.table, self._column = table, column
        self._id = next((name for name in IDS if name in names), None)
        self.digest = f"{_stamp(table)} {column}"
        with pq.ParquetFile(table) as file:
            self.total = int(file.metadata.num_rows)

    def now(self) -> str:
        return f"{_stamp(self.table)} {self._column}"

    def since(self, row: int, after: str) -> Iterator[Query]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.table) as file:
            groups: list[int] = []
            skip = row
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if groups or skip < rows:
                    groups.append(group)
                else:
                    skip -= rows
            at = row - skip
            wanted = [self._column, *([self._id] if self._id else [])]
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=groups, columns=wanted):
                vectors = vectors_of(batch.column(self._column))
                ids = batch.column(self._id).to_pylist() if self._id else [None] * len(vectors)
                for vector, given in zip(vectors, ids, strict=True):
                    if at >= row:
                        yield Query(str(at if given is None else given), vector)
                    at += 1


class GalleryItems:
    """The items of a gallery by name, with their stored embeddings."""

    kind = "gallery"

    def __init__(self, gallery: GalleryEngine, allowed: Filter | None = None) -> None:
        self._gallery, self._allowed = gallery, allowed
        self.total = gallery.size if allowed is None else gallery.count(allowed)
        self.digest = self.now()

    def now(self) -> str:
        gallery, allowed = self._gallery, self._allowed
        text = allowed.text if allowed else ""
        return gallery_digest(gallery.id, gallery.created.isoformat(), gallery.generation, text)

    def since(self, row: int, after: str) -> Iterator[Query]:
        token = page_token_after(after) if after else ""
        while True:
            items, token = self._gallery.list(page_size=_PAGE, page_token=token, allowed=self._allowed)
            for item in items:
                yield Query(item.name, item.embedding, item.name)
            if not token:
                return


def gallery_digest(gallery: str, created: str, generation: int, allowed: str = "") -> str:
    """Tells the items of a gallery from others; the same here and on a server, so that one goes on for the other."""
    return json.dumps([gallery, created, generation, allowed])


def _stamp(path: Path) -> str:
    """Size and time of the last change: summing many gigabytes would take longer than reading them once."""
    stat = path.stat()
    return f"{stat.st_size} bytes of {stat.st_mtime_ns}"


def vectors_of(column: Any) -> list[Vectors] | Vectors:
    """Whatever stands in an Arrow column, as float32; what is no embedding has another shape."""
    import pyarrow as pa
    import pyarrow.compute as pc

    if pa.types.is_list(column.type) or pa.types.is_fixed_size_list(column.type):
        widths = pc.unique(pc.list_value_length(column)).to_pylist()
        values = column.flatten()
        are_numbers = pa.types.is_floating(values.type) or pa.types.is_integer(values.type)
        if are_numbers and len(widths) == 1 and widths[0] and not column.null_count and not values.null_count:
            return np.asarray(values.to_numpy(zero_copy_only=False), np.float32).reshape(len(column), widths[0])
    return [_vector(value) for value in column.to_pylist()]


def _vector(value: Any) -> Vectors:
    try:
        return np.asarray([] if value is None else value, np.float32)
    except (TypeError, ValueError):
        return np.empty(0, np.float32)


def _csv_column(table: Path) -> Iterator[Any]:
    try:
        with table.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file, strict=True):
                yield row.get("path")
    except (csv.Error, UnicodeDecodeError) as error:
        raise InvalidDataset(f"{table} is not a CSV table in UTF-8 ({error})") from error


def _parquet_column(table: Path) -> Iterator[Any]:
    import pyarrow.parquet as pq

    if "path" not in columns_of(table):
        yield None
        return
    with pq.ParquetFile(table) as file:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=["path"]):
            yield from batch.column("path").to_pylist()


def columns_of(table: Path) -> list[str]:
    """The columns of a Parquet table. Raises InvalidDataset."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.read_schema(table).names)
    except (pa.ArrowInvalid, OSError) as error:
        raise InvalidDataset(f"{table} is not a Parquet table ({error})") from error
