"""The rows of a batch job, and the Parquet files that they become. The columns are a contract: added to, never
changed.

One row a query and neighbour, in the order of queries and by rising (distance, name). A query that was not answered has
one row, with `error` and without an item; one that found nothing has none. The footer says once, under the key
`FOOTER`, what all rows rest on. Equal rows under equal conditions give equal bytes.

Shapes: R rows.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from io import BufferedWriter
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedding.decision import VERDICTS, Verdict
from embedding.durable import sync_folder
from index.batch.answers import Answered, Column, Evidence, Failure
from index.batch.folder import FOOTER, PARTIAL, Conditions, Shard, refused
from index.sums import FileSum
from index.texts import Texts

GROUP_ROWS = 65_536
"""Rows that are held in memory until they are written as a row group."""

SCHEMA = pa.schema(
    [
        pa.field("query_row", pa.int64(), nullable=False),  # place of the query in the input, from 0
        pa.field("query", pa.string(), nullable=False),
        pa.field("rank", pa.int32()),
        pa.field("item", pa.string()),
        pa.field("identity", pa.string()),
        pa.field("verdict", pa.string()),
        pa.field("is_match", pa.bool_()),
        pa.field("distance", pa.float32()),
        pa.field("threshold", pa.float32()),
        pa.field("match_probability", pa.float64()),
        pa.field("far", pa.float64()),
        pa.field("far_upper95", pa.float64()),
        pa.field("frr", pa.float64()),
        pa.field("model", pa.string(), nullable=False),
        pa.field("calibration", pa.int32(), nullable=False),
        pa.field("gallery_generation", pa.int64(), nullable=False),
        pa.field("truncated", pa.bool_()),  # whether the query has more matches than were asked for
        pa.field("error", pa.string()),
        pa.field("error_reason", pa.string()),
    ]
)

_MATCH = VERDICTS.index(Verdict.MATCH)
_NAMES = pa.array([verdict.value for verdict in VERDICTS])


class ShardWriter:
    """Writes one shard: beside its name, and under it once it is whole and on the disk.

    Raises StorageFailed when the disk refuses; then, and when `close` is called without `publish`, nothing is left.
    """

    def __init__(self, path: Path, *, first: int, conditions: Conditions) -> None:
        self._path, self._partial = path, path.with_name(f"{PARTIAL}{path.name}")
        self._first, self._conditions = first, conditions
        self._evidence: Evidence | None = None
        self.queries = self.rows = 0
        self._errors = self._matched = self._matches = self._truncated = 0
        self._last_id = ""
        self._file: BufferedWriter | None = None
        self._writer: pq.ParquetWriter | None = None
        self._waiting = _Waiting()

    def add(self, answered: Answered) -> None:
        """The outcomes of the next queries."""
        for start, end in self._groups(answered):
            self._take(answered.cut(start, end))
            if len(self._waiting) >= GROUP_ROWS:
                self._flush()

    def _groups(self, answered: Answered) -> Iterator[tuple[int, int]]:
        """Where to cut these so that each row group ends with the query that fills it, however many come at once."""
        after_Q = _rows_of(answered).cumsum()
        start = 0
        while start < len(answered):
            before = int(after_Q[start - 1]) if start else 0
            filled = int(np.searchsorted(after_Q, before + GROUP_ROWS - len(self._waiting)))
            end = min(filled + 1, len(answered))
            yield start, end
            start = end

    def _take(self, answered: Answered) -> None:
        if not len(answered):
            return
        self._errors += len(answered.failures)
        self._truncated += int(np.count_nonzero(answered.truncated_Q))
        if self._evidence is None and len(answered.distance_P):  # of an answer without items it is not always known
            self._evidence = next((evidence for _, evidence in answered.stands if evidence), None)
        self._waiting.add(answered, self._first + self.queries)
        self.rows += len(answered.distance_P) + len(answered.failures)
        self.queries += len(answered)
        self._last_id = answered.ids[-1]

    def publish(self) -> Shard:
        """The shard, whole and durable under its name."""
        self._flush()

        def complete() -> None:
            writer = self._opened()
            writer.add_key_value_metadata({FOOTER: self._footer()})
            writer.close()
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            self._writer = None

        self._on_disk(complete)
        try:
            found = FileSum.of(self._partial)
            self._partial.replace(self._path)
            sync_folder(self._path.parent)
        except OSError as error:
            raise refused(self._path, error) from error
        return Shard(
            name=self._path.name,
            first=self._first,
            queries=self.queries,
            errors=self._errors,
            matched=self._matched,
            matches=self._matches,
            truncated=self._truncated,
            rows=self.rows,
            last_id=self._last_id,
            sum=found,
        )

    def close(self) -> None:
        """Leave nothing of a shard that was not published."""
        if self._writer is not None:
            self._writer.is_open = False  # else its destructor writes a footer
            self._writer = None
        if self._file is not None:
            with suppress(OSError):  # a disk that refused may refuse again
                self._file.close()
        self._partial.unlink(missing_ok=True)

    def _footer(self) -> bytes:
        stated = self._conditions
        said = {
            "lookalike": version("lookalike"),
            "model": stated.model,
            "fingerprint": stated.fingerprint,
            "calibration": stated.calibration,
            "gallery": stated.gallery,
            "gallery_created": stated.gallery_created,
            "gallery_generation": stated.generation,
            "asked": stated.parameters,
            "first_query_row": self._first,
            "queries": self.queries,
        }
        if self._evidence:
            known = asdict(self._evidence)
            said |= {name: known[name] for name in ("threshold", "far", "far_upper95", "frr")}
        return json.dumps(said, ensure_ascii=False, sort_keys=True).encode("utf-8", "surrogatepass")

    def _flush(self) -> None:
        if len(self._waiting):
            stated = self._conditions
            table, matches_Q = self._waiting.table(stated, self._evidence)
            self._on_disk(lambda: self._opened().write_table(table, row_group_size=len(table)))
            self._matches += int(matches_Q.sum())
            self._matched += int(np.count_nonzero(matches_Q))
            self._waiting = _Waiting()

    def _opened(self) -> Any:
        if self._writer is None:
            self._file = self._partial.open("wb")
            self._writer = pq.ParquetWriter(self._file, SCHEMA, compression="zstd")
        return self._writer

    def _on_disk(self, act: Callable[[], None]) -> None:
        try:
            act()
        except OSError as error:
            raise refused(self._path, error) from error


class _Waiting:
    """The rows of a row group to be."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Answered]] = []
        self._rows = 0

    def __len__(self) -> int:
        return self._rows

    def add(self, answered: Answered, place: int) -> None:
        """The outcomes of queries from this place of the input on."""
        rows = len(answered.distance_P) + len(answered.failures)
        if rows:
            self._parts.append((place, answered))
            self._rows += rows

    def table(self, stated: Conditions, evidence: Evidence | None) -> tuple[pa.Table, NDArray[np.intp]]:
        """The rows, and the matches of each query that has some."""
        places_Q = np.concatenate([np.arange(place, place + len(each)) for place, each in self._parts])
        whole = Answered.joined([each for _, each in self._parts])
        counts_Q = _rows_of(whole)
        at_R = np.repeat(np.arange(len(counts_Q)), counts_Q)
        failed_R = whole.failed()[at_R]
        starts_Q = counts_Q.cumsum() - counts_Q
        rows = _Rows(failed_R)
        matched_P = whole.verdict_P == _MATCH
        matches_Q = np.bincount(at_R[~failed_R][matched_P], minlength=len(counts_Q))
        spread_R = pa.array(at_R)

        def said(of: Callable[[Failure], str]) -> pa.Array:
            """Of one text a failure, which is of one row."""
            if not whole.failures:
                return pa.nulls(len(at_R), pa.string())
            texts = {at: of(failure) for at, failure in whole.failures.items()}
            return pa.array([texts.get(at) for at in range(len(counts_Q))], pa.string()).take(spread_R)

        def shared(name: str) -> pa.Array:
            kind = SCHEMA.field(name).type
            if evidence is None:
                return pa.nulls(len(at_R), kind)
            return rows.masked(pa.repeat(pa.scalar(getattr(evidence, name), kind), len(at_R)))

        verdicts = rows.numbers(whole.verdict_P, pa.int8())
        ranks_R = (np.arange(len(at_R)) - starts_Q[at_R] + 1).astype(np.int32)
        columns = {
            "query_row": pa.array(places_Q[at_R], pa.int64()),
            "query": pa.array(whole.ids, pa.string()).take(spread_R),
            "rank": pa.array(ranks_R, pa.int32(), mask=failed_R if rows.some_failed else None),
            "item": rows.texts(whole.items),
            "identity": rows.texts(whole.identities, empty_is_null=True),
            "verdict": _NAMES.take(verdicts),
            "is_match": pc.equal(verdicts, pa.scalar(_MATCH, pa.int8())),
            "distance": rows.numbers(whole.distance_P, pa.float32()),
            "threshold": shared("threshold"),
            "match_probability": rows.numbers(whole.probability_P, pa.float64()),
            "far": shared("far"),
            "far_upper95": shared("far_upper95"),
            "frr": shared("frr"),
            "model": pa.repeat(pa.scalar(stated.model), len(at_R)),
            "calibration": pa.repeat(pa.scalar(stated.calibration, pa.int32()), len(at_R)),
            "gallery_generation": pa.repeat(pa.scalar(stated.generation, pa.int64()), len(at_R)),
            "truncated": rows.masked(pa.array(whole.truncated_Q[at_R])),
            "error": said(attrgetter("message")),
            "error_reason": said(attrgetter("reason")),
        }
        return pa.table(columns, schema=SCHEMA), matches_Q


class _Rows:
    """Columns of the neighbours, with nothing in the rows of queries that failed."""

    def __init__(self, failed_R: NDArray[np.bool_]) -> None:
        self.some_failed = bool(failed_R.any())
        self._failed_R = failed_R
        found_R = (~failed_R).cumsum() - 1
        self._places = pa.array(found_R, mask=failed_R) if self.some_failed else None

    def masked(self, column: pa.Array) -> pa.Array:
        """A value a row."""
        return pc.if_else(pa.array(self._failed_R), None, column) if self.some_failed else column

    def numbers(self, values_P: NDArray[Any], kind: Any) -> pa.Array:
        column = pa.array(values_P, kind)
        return column if self._places is None else column.take(self._places)

    def texts(self, texts: Column | None, *, empty_is_null: bool = False) -> pa.Array:
        if texts is None:
            return pa.nulls(len(self._failed_R), pa.string())
        column = _strings(texts) if isinstance(texts, Texts) else pa.array(texts, pa.string())
        if empty_is_null:
            column = pc.if_else(pc.equal(column, ""), None, column)
        return column if self._places is None else column.take(self._places)


def _strings(texts: Texts) -> pa.Array:
    """The bytes as they are, without the end of each."""
    ends_N = texts.ends_N - np.arange(1, len(texts) + 1)
    offsets_N = np.concatenate([[0], ends_N]).astype(np.int32)
    kept_B = np.ones(len(texts.data_B), np.bool_)
    kept_B[texts.ends_N - 1] = False
    data_B = texts.data_B[kept_B]
    return pa.StringArray.from_buffers(len(texts), pa.py_buffer(offsets_N), pa.py_buffer(data_B))


def _rows_of(answered: Answered) -> NDArray[np.intp]:
    """How many rows each query takes: one that failed takes one."""
    return answered.counts_Q + answered.failed()
