"""Manifests: a CSV or Parquet table of images with columns path, identity and, optionally, split."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from embedding.errors import InvalidDataset
from training.config import Side
from training.images import check_inside
from training.sections import did_you_mean

_SIDES: dict[str, Side | None] = {
    "train": "train",
    "calibration": "calibration",
    "val": "calibration",
    "validation": "calibration",
    "test": "test",
    "": None,
}
"""Accepted values of the split column, in any case; an empty one leaves the side to the recipe's shares."""


@dataclass(frozen=True, slots=True)
class Row:
    """One image of a manifest."""

    path: str
    """Relative to the manifest's image root, with forward slashes."""
    identity: str
    side: Side | None


def parse_manifest(data: bytes, *, where: str) -> list[Row]:
    """The rows of a manifest whose file name `where` ends in .csv or .parquet.

    Raises InvalidDataset naming the row, counted from 1 without the header, and the column.
    """
    match PurePath(where).suffix.lower():
        case ".csv":
            table = _csv(data, where)
        case ".parquet":
            table = _parquet(data, where)
        case other:
            raise InvalidDataset(f"{where}: a manifest ends in .csv or .parquet; got {other!r}", field="data.path")
    rows = [
        _row(path, identity, side, where=f"{where}, row {at}") for at, (path, identity, side) in enumerate(table, 1)
    ]
    if not rows:
        raise InvalidDataset(f"{where} lists no images; give at least two identities of two images", field="data.path")
    return rows


def _row(path: Any, identity: Any, side: Any, *, where: str) -> Row:
    if not isinstance(path, str) or not path:
        raise InvalidDataset(f"{where}: path must be text; got {path!r}", field="data.path")
    check_inside(path, where=where)
    # Identities are text or integers: a float would make 7 and 7.0 two identities, or two large ones the same.
    if isinstance(identity, bool) or not isinstance(identity, str | int) or identity == "":
        raise InvalidDataset(f"{where}: identity must be text or an integer; got {identity!r}", field="data.path")
    name = "" if side is None else str(side).strip().lower()
    if name not in _SIDES:
        accepted = [value for value in _SIDES if value]
        raise InvalidDataset(
            f"{where}: split got {side!r}{did_you_mean(name, accepted)}; accepted: {', '.join(accepted)}, or empty",
            field="data.path",
        )
    return Row(path=path.replace("\\", "/"), identity=str(identity), side=_SIDES[name])


def _csv(data: bytes, where: str) -> Iterator[tuple[Any, Any, Any]]:
    try:
        reader = csv.DictReader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
        _check_columns(reader.fieldnames or [], where)
        for row in reader:
            yield row["path"], row["identity"], row.get("split")
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidDataset(f"{where} is not a CSV table in UTF-8 ({error})", field="data.path") from error


def _parquet(data: bytes, where: str) -> Iterator[tuple[Any, Any, Any]]:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
        _check_columns(file.schema_arrow.names, where)
        columns = [name for name in ("path", "identity", "split") if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=columns):
            values = batch.to_pydict()
            yield from zip(
                values["path"], values["identity"], values.get("split", [None] * batch.num_rows), strict=True
            )
    except (pyarrow.ArrowException, OSError) as error:
        raise InvalidDataset(f"{where} is not a Parquet table ({error})", field="data.path") from error


def _check_columns(names: Sequence[str], where: str) -> None:
    for needed in ("path", "identity"):
        if needed not in names:
            raise InvalidDataset(
                f"{where} has no column {needed!r}; it has {', '.join(names) or 'none'}, and a manifest needs path and "
                "identity, and may have split",
                field="data.path",
            )
