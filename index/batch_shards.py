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
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import BufferedWriter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from embedding.decision import VERDICTS, Decisions, Vectors, Verdict
from embedding.durable import sync_folder
from index.batch_folder import PARTIAL, Conditions, Shard, refused
from index.sums import FileSum

GROUP_ROWS = 65_536
"""Rows that are held in memory until they are written as a row group."""

FOOTER = b"lookalike"
"""The key of the footer's JSON object among the metadata of a shard's file."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """What all decisions of a job rest on."""

    threshold: float
    far: float
    far_upper95: float
    frr: float
    model: str
    calibration: int


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """What one query found, nearest first."""

    items: Sequence[str]
    identities: Sequence[str | None]
    distance_R: Vectors
    verdict_R: NDArray[np.int8]
    """Places in `VERDICTS`."""
    probability_R: NDArray[np.float64]
    evidence: Evidence | None
    """None where nothing was found and none is known."""
    generation: int
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Failure:
    """Why one query has no answer."""

    reason: str
    message: str


def evidence_of(decisions: Decisions) -> Evidence:
    """What these decisions share."""
    judge = decisions.judge
    return Evidence(
        threshold=judge.threshold,
        far=judge.rates.far,
        far_upper95=judge.rates.far_upper95,
        frr=judge.rates.frr,
        model=judge.model,
        calibration=judge.calibration.version,
    )


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

    def add(self, query: str, outcome: Answer | Failure) -> None:
        """The outcome of the next query."""
        if isinstance(outcome, Failure):
            self._errors += 1
            self._waiting.fail(query, self._first + self.queries, outcome)
            self.rows += 1
        else:
            self._truncated += outcome.truncated
            if outcome.items:  # of an answer without them a server does not say the evidence
                self._evidence = self._evidence or outcome.evidence
                self._waiting.add(query, self._first + self.queries, outcome)
                self.rows += len(outcome.items)
        self.queries += 1
        self._last_id = query
        if len(self._waiting) >= GROUP_ROWS:
            self._flush()

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
            table, matches_Q = self._waiting.table(stated.model, stated.calibration, stated.generation)
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
    """The rows of a row group to be. Columns, not an object a query: those Python's collector would walk over, again
    and again, until they are written."""

    def __init__(self) -> None:
        self._ids: list[str] = []
        self._places: list[int] = []
        self._counts: list[int] = []
        self._evidence: list[Evidence | None] = []
        self._truncated: list[bool | None] = []
        self._failed: list[bool] = []
        self._messages: list[str | None] = []
        self._reasons: list[str | None] = []
        self._items: list[str | None] = []
        self._identities: list[str | None] = []
        self._distances: list[Vectors] = []
        self._verdicts: list[NDArray[np.int8]] = []
        self._probabilities: list[NDArray[np.float64]] = []

    def __len__(self) -> int:
        return len(self._items)

    def add(self, query: str, place: int, answer: Answer) -> None:
        """An answer that has items."""
        self._begin(query, place, len(answer.items), answer.evidence, answer.truncated, None)
        self._items += answer.items
        self._identities += answer.identities
        self._distances.append(answer.distance_R)
        self._verdicts.append(answer.verdict_R)
        self._probabilities.append(answer.probability_R)

    def fail(self, query: str, place: int, failure: Failure) -> None:
        self._begin(query, place, 1, None, None, failure)
        self._items.append(None)
        self._identities.append(None)
        self._distances.append(np.zeros(1, np.float32))
        self._verdicts.append(np.zeros(1, np.int8))
        self._probabilities.append(np.zeros(1))

    def _begin(
        self,
        query: str,
        place: int,
        count: int,
        evidence: Evidence | None,
        truncated: bool | None,
        failure: Failure | None,
    ) -> None:
        self._ids.append(query)
        self._places.append(place)
        self._counts.append(count)
        self._evidence.append(evidence)
        self._truncated.append(truncated)
        self._failed.append(failure is not None)
        self._messages.append(failure.message if failure else None)
        self._reasons.append(failure.reason if failure else None)

    def table(self, model: str, calibration: int, generation: int) -> tuple[pa.Table, NDArray[np.intp]]:
        """The rows, and the matches of each query that has some."""
        counts_Q = np.array(self._counts)
        at_R = np.repeat(np.arange(len(counts_Q)), counts_Q)
        failed_R = np.array(self._failed)[at_R]
        starts_Q = np.concatenate([[0], np.cumsum(counts_Q)[:-1]])
        verdict_R = np.concatenate(self._verdicts)
        matches_Q = np.bincount(at_R[(verdict_R == _MATCH) & ~failed_R], minlength=len(counts_Q))
        spread_R = pa.array(at_R)

        def spread(kind: Any, values: Sequence[Any]) -> pa.Array:
            """Of one value a query, None for one that failed."""
            return pa.array(values, kind).take(spread_R)

        def shared(name: str) -> pa.Array:
            return spread(SCHEMA.field(name).type, [each and getattr(each, name) for each in self._evidence])

        verdicts = pa.array(verdict_R, pa.int8(), mask=failed_R)
        ranks_R = (np.arange(len(at_R)) - starts_Q[at_R] + 1).astype(np.int32)
        columns = {
            "query_row": spread(pa.int64(), self._places),
            "query": spread(pa.string(), self._ids),
            "rank": pa.array(ranks_R, pa.int32(), mask=failed_R),
            "item": pa.array(self._items, pa.string()),
            "identity": pa.array(self._identities, pa.string()),
            "verdict": _NAMES.take(verdicts),
            "is_match": pc.equal(verdicts, pa.scalar(_MATCH, pa.int8())),
            "distance": pa.array(np.concatenate(self._distances), pa.float32(), mask=failed_R),
            "threshold": shared("threshold"),
            "match_probability": pa.array(np.concatenate(self._probabilities), pa.float64(), mask=failed_R),
            "far": shared("far"),
            "far_upper95": shared("far_upper95"),
            "frr": shared("frr"),
            "model": pa.repeat(pa.scalar(model), len(at_R)),
            "calibration": pa.repeat(pa.scalar(calibration, pa.int32()), len(at_R)),
            "gallery_generation": pa.repeat(pa.scalar(generation, pa.int64()), len(at_R)),
            "truncated": spread(pa.bool_(), self._truncated),
            "error": spread(pa.string(), self._messages),
            "error_reason": spread(pa.string(), self._reasons),
        }
        return pa.table(columns, schema=SCHEMA), matches_Q
