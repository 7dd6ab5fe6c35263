"""Batch nearest-neighbour jobs: queries are answered in order, and their answers written as Parquet shards.

A job killed at any moment goes on, when it is run again, with the first query that no whole shard has. A shard begins
with a batch of its own and ends with a batch, so that what is in it depends on the conditions of the job alone and not
on where it was interrupted. Who answers is an `Answering`: a gallery in this process (`index.batch.search`), or a
server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

from embedding.decision import Vectors
from embedding.errors import JobChanged
from index.batch.answers import Answered
from index.batch.folder import Conditions, JobFolder, Shard, Totals
from index.batch.shards import ShardWriter
from index.engine import OnProgress, Progress

SHARD_QUERIES = 10_000
"""Queries after which a shard ends, unless it is asked otherwise."""
SHARD_ROWS = 1_000_000
"""Rows after which it does, at the end of a batch."""
BATCH_ROWS = 100_000
"""Most rows of the answers to one batch."""

_TELL_SECONDS = 0.1


class Query(NamedTuple):
    """What is searched for."""

    id: str
    content: Path | Vectors | None
    """An image file to read, or a unit embedding [D]; None for a stored item whose embedding a server has."""
    item: str = ""
    """The item of the source gallery that it is; left out of its own results where that gallery is searched."""


class Queries(Protocol):
    """Where queries come from. Iterating must give the same queries in the same order while the digest is the same."""

    @property
    def kind(self) -> str: ...

    @property
    def digest(self) -> str:
        """Tells other queries from these."""

    def now(self) -> str:
        """The digest of what is there now."""

    @property
    def total(self) -> int: ...

    def since(self, row: int, after: str) -> Iterator[Query]:
        """The queries from `row` on; `after` is the id of the one before, "" for the first."""


class Answering(Protocol):
    """Who answers queries."""

    def answers(self, queries: Iterable[Query]) -> Generator[Answered, None, None]:
        """The outcomes of all queries in their order, a batch at a time; batches are of one size but for the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """What came of running a job."""

    totals: Totals
    resumed: int
    """Queries that had been answered before it was run."""
    redone: int
    """Shards that were damaged and written again."""
    shards: int


def run(
    folder: Path,
    queries: Queries,
    answering: Answering,
    conditions: Conditions,
    *,
    shard_queries: int = SHARD_QUERIES,
    restart: bool = False,
    on_progress: OnProgress = lambda _: None,
) -> Done:
    """Run a job to its end, or go on with it. What `on_progress` raises ends it between two batches.

    Raises what `JobFolder.open` does; JobChanged when the gallery or its model changes meanwhile; what the queries and
    who answers them raise. Shards written until then are kept.
    """
    with JobFolder.open(folder, conditions, restart=restart) as job:
        resumed = job.manifest.totals.queries
        damaged = job.damaged()
        tell = _Telling(on_progress, queries.total, resumed - sum(shard.queries for shard in damaged))
        for shard in damaged:
            _redo(job, shard, queries, answering, tell)
        shards = job.manifest.shards
        row, after = (shards[-1].first + shards[-1].queries, shards[-1].last_id) if shards else (0, "")
        while row < queries.total:
            shard = _written(job, len(job.manifest.shards), row, after, queries, answering, tell, shard_queries)
            if not shard.queries:
                raise JobChanged(
                    f"there were {queries.total:,} queries, and after {row:,} there are no more; leave the input as "
                    "it is while a job reads it, then run it again with --restart"
                )
            job.add(shard)
            row, after = row + shard.queries, shard.last_id
        if not job.manifest.done:
            _check_input(queries, conditions)
        job.finish()
        return Done(totals=job.manifest.totals, resumed=resumed, redone=len(damaged), shards=len(job.manifest.shards))


def _check_input(queries: Queries, conditions: Conditions) -> None:
    """Refuses to call a job done whose input moved under it: queries may be missing, or be there twice."""
    if queries.now() != conditions.queries_digest:
        raise JobChanged(
            "the queries changed while the job read them, so some may be missing or answered twice; leave the input as "
            "it is while a job runs, and run it again with --restart"
        )


def batch_size(most: int, rows: int) -> int:
    """Queries of a batch of at most `most`, each with at most `rows` rows."""
    return max(1, min(most, BATCH_ROWS // max(1, rows)))


def _redo(job: JobFolder, shard: Shard, queries: Queries, answering: Answering, tell: _Telling) -> None:
    number = job.manifest.shards.index(shard)
    after = job.manifest.shards[number - 1].last_id if number else ""
    job.add(_written(job, number, shard.first, after, queries, answering, tell, shard.queries, exactly=True))


def _written(
    job: JobFolder,
    number: int,
    first: int,
    after: str,
    queries: Queries,
    answering: Answering,
    tell: _Telling,
    most: int,
    *,
    exactly: bool = False,
) -> Shard:
    """The shard of the queries from `first` on; with `exactly` it has `most` of them."""
    conditions = job.manifest.conditions
    writer = ShardWriter(job.path / f"part-{number:05}.parquet", first=first, conditions=conditions)
    try:
        with closing(answering.answers(islice(queries.since(first, after), most))) as batches:
            for batch in batches:
                _check(conditions, batch)
                writer.add(batch)
                tell(len(batch))
                if not exactly and writer.rows >= SHARD_ROWS:
                    break
        return writer.publish()
    finally:
        writer.close()


def _check(conditions: Conditions, answered: Answered) -> None:
    for generation, found in answered.stands:
        if generation != conditions.generation:
            raise JobChanged(
                f"gallery {conditions.gallery!r} was written to while the job ran: it was at generation "
                f"{conditions.generation} and is at {generation}; run the job again with --restart when nobody writes, "
                "or on a gallery restored from a snapshot"
            )
        if found is not None and (found.model, found.calibration) != (conditions.model, conditions.calibration):
            raise JobChanged(
                f"the job was begun with {conditions.model}, calibration {conditions.calibration}, and {found.model}, "
                f"calibration {found.calibration} answers now; activate the first to go on, or run it again with "
                "--restart"
            )


class _Telling:
    """Tells how many queries are answered, ten times a second at most."""

    def __init__(self, on_progress: Callable[[Progress], None], total: int, done: int) -> None:
        self._on_progress, self._total, self._done, self._last = on_progress, total, done, 0.0
        self._tell()

    def __call__(self, answered: int) -> None:
        self._done += answered
        if time.monotonic() - self._last >= _TELL_SECONDS or self._done >= self._total:
            self._tell()

    def _tell(self) -> None:
        self._on_progress(Progress(stage="searching", done=self._done, total=self._total))
        self._last = time.monotonic()
