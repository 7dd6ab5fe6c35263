"""Parquet files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from lookalike.cli.whole_file import WholeFile


class ParquetTable:
    """A table written in row groups to a `WholeFile`, and raising what that does."""

    def __init__(self, path: Path, schema: pa.Schema, *, overwrite: bool = False) -> None:
        self._whole = WholeFile(path, overwrite=overwrite)
        self._schema = schema

    def __enter__(self) -> Self:
        self._whole.__enter__()
        self._writer = pq.ParquetWriter(self._whole.file, self._schema)
        return self

    def append(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write rows as one row group."""
        with self._whole.refusals():
            self._writer.write_table(pa.Table.from_pylist(list(rows), schema=self._schema))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._whole.refusals():
                    self._writer.close()
        except BaseException as refused:
            self._writer.is_open = False
            self._whole.__exit__(type(refused), refused, refused.__traceback__)
            raise
        self._writer.is_open = False  # else its destructor writes the footer into a file that is closed
        self._whole.__exit__(kind, error, traceback)
