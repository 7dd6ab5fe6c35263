"""Parquet files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from embedding.errors import AlreadyExists, StorageFailed


class ParquetTable:
    """A table written in row groups beside `path` and renamed to it when the block ends without an error.

    Raises AlreadyExists unless `overwrite`, and StorageFailed when the disk refuses; neither leaves anything behind.
    """

    def __init__(self, path: Path, schema: pa.Schema, *, overwrite: bool = False) -> None:
        if path.is_dir() or (path.exists() and not overwrite):
            raise AlreadyExists(f"{path} exists; choose another file, or replace it with --overwrite")
        self.path = path
        self._schema = schema

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, partial = tempfile.mkstemp(prefix=f".{self.path.name}.partial-", dir=self.path.parent)
        except OSError as error:
            raise self._refused(error) from error
        self._partial = Path(partial)
        self._file = os.fdopen(descriptor, "wb")
        self._writer = pq.ParquetWriter(self._file, self._schema)
        return self

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as one row group."""
        try:
            self._writer.write_table(pa.Table.from_pylist(list(rows), schema=self._schema))
        except OSError as error:
            raise self._refused(error) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._publish()
        finally:
            self._writer.is_open = False  # else its destructor writes the footer into a file that is closed
            with contextlib.suppress(OSError):  # a table that was published has nothing left to flush
                self._file.close()
            self._partial.unlink(missing_ok=True)

    def _publish(self) -> None:
        try:
            self._writer.close()
            self._file.flush()
            os.fsync(self._file.fileno())
            self._partial.chmod(0o644)
            self._partial.replace(self.path)
        except OSError as error:
            raise self._refused(error) from error

    def _refused(self, error: OSError) -> StorageFailed:
        return StorageFailed(f"cannot write {self.path}: {error.strerror or error}; nothing was left there")
