"""Parquet files that appear whole or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from lookalike.cli.whole_file import refusals, whole_file

Append: TypeAlias = Callable[[Sequence[Mapping[str, Any]]], None]
"""Writes rows as one row group."""


@contextmanager
def parquet_table(path: Path, schema: pa.Schema, *, overwrite: bool = False) -> Iterator[Append]:
    """A table written in row groups to a `whole_file`, raising what that does."""
    with whole_file(path, overwrite=overwrite) as file:
        writer = pq.ParquetWriter(file, schema)

        def append(rows: Sequence[Mapping[str, Any]]) -> None:
            with refusals(path):
                writer.write_table(pa.Table.from_pylist(list(rows), schema=schema))

        try:
            yield append
            with refusals(path):
                writer.close()
        finally:
            writer.is_open = False  # else its destructor writes the footer into a file that is closed
