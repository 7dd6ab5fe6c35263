"""`lookalike batch-search --shards`: a job that goes on where it was stopped, here or on a server."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import grpc

from embedding.errors import InvalidDataset, LookalikeError
from embedding.runtime import settled
from index.batch import Answering, Done, Queries
from index.batch import run as run_job
from index.batch.folder import Conditions, read_manifest
from index.batch.queries import EmbeddingTable, check_model, queries_of
from index.filters import parse_filter
from lookalike import Client
from lookalike.cli import show
from lookalike.cli.backend import Backend
from lookalike.cli.batch_remote import RemoteItems, ServerAnswering
from lookalike.cli.told import told
from lookalike.errors import ResourceExhausted, Unavailable
from lookalike.types import Effort, OperatingPoint

_PAUSES = (1.0, 2.0, 5.0, 10.0, 20.0, 40.0, 60.0, 60.0)
"""Seconds before a job goes on after a server could not answer, from the first again once a shard was written; then it
ends, and is run again by whoever wants it."""
_ROOM = frozenset({"OVERLOADED", "RATE_LIMITED"})


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is asked."""

    source: Path | None
    from_gallery: str | None
    embeddings: str
    gallery: str
    k: int
    """With `within` the most matches of a query."""
    within: bool
    point: OperatingPoint
    filter: str
    effort: Effort | None
    shard_queries: int

    def parameters(self, *, leave_out: bool) -> dict[str, Any]:
        """What of it the shards depend on."""
        allowed = parse_filter(self.filter)
        effort = asdict(self.effort) if self.effort else {}
        return {
            "limit" if self.within else "k": self.k,
            "within": self.within,
            "filter": allowed.text if allowed else "",
            "effort": {name: value for name, value in effort.items() if value},
            "operating_point": {name: value for name, value in asdict(self.point).items() if value is not None},
            "leave_out_itself": leave_out,
            "shard_queries": self.shard_queries,
        }


def run(backend: Backend, job: Job, folder: Path, *, restart: bool) -> None:
    """Run the job and tell how it goes, on stderr, and what came of it."""
    parse_filter(job.filter)  # before anything is begun
    queries = queries_of(job.source, job.embeddings) if job.source else None
    queries, answering, conditions = (
        _on_server(backend, job, queries) if isinstance(backend, Client) else _here(backend, job, queries)
    )
    if isinstance(queries, EmbeddingTable):
        check_model(queries.table, conditions.model)
    if not queries.total:
        raise InvalidDataset(f"there is nothing to search for in {job.source or job.from_gallery}; nothing was written")
    with settled(), told(show.console(stderr=True), "batch-search", "queries") as tell:
        try:
            done = _patiently(
                lambda anew: run_job(
                    folder,
                    queries,
                    answering,
                    conditions,
                    shard_queries=job.shard_queries,
                    restart=anew,
                    on_progress=lambda progress: tell(progress.done, progress.total),
                ),
                lambda: _answered(folder),
                restart=restart,
                say=lambda text: show.console(stderr=True).print(text),
            )
        except KeyboardInterrupt:
            show.console(stderr=True).print(f"stopped; run the same command again to go on in {folder}")
            raise
    print(summary(done, folder))
    if done.totals.errors == done.totals.queries:
        raise InvalidDataset(
            f"no query could be answered, the first because {_first_error(folder)}; the column error of the shards has "
            "the reason of each"
        )


def _patiently(
    attempt: Callable[[bool], Done], answered: Callable[[], int], *, restart: bool, say: Callable[[str], None]
) -> Done:
    """Go on with the job after a server had no room or was away, as long as waiting may help.

    `answered` counts the queries of whole shards: where there are more of them, patience begins anew.
    """
    pauses, before = iter(_PAUSES), 0
    while True:
        try:
            return attempt(restart)
        except (Unavailable, ResourceExhausted) as error:
            has_room_later = error.reason in _ROOM or error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED
            if isinstance(error, ResourceExhausted) and not has_room_later:
                raise
            if (now := answered()) > before:
                pauses, before = iter(_PAUSES), now
            pause = next(pauses, None)
            if pause is None:
                raise
            wait = max(pause, error.retry_after or 0.0)
            say(f"the server cannot answer now ({error}); going on from the last whole shard in {wait:,.0f} s")
            restart = False
            time.sleep(wait * random.uniform(1, 1.25))  # not all who wait come back at once


def _first_error(folder: Path) -> str:
    import pyarrow.parquet as pq

    with pq.ParquetFile(folder / "part-00000.parquet") as shard:
        return str(next(shard.iter_batches(1, columns=["error"]))["error"][0])


def _answered(folder: Path) -> int:
    manifest = read_manifest(folder)
    return manifest.totals.queries if manifest else 0


_QUERIES = ("query", "queries")


def summary(done: Done, folder: Path) -> str:
    """What came of a job, in two lines."""
    totals = done.totals
    before = f"; {done.resumed:,} of them were answered before" if done.resumed else ""
    redone = f"; {show.counted(done.redone, 'shard')} written again, damaged" if done.redone else ""
    more = f", {totals.truncated:,} with more than the limit" if totals.truncated else ""
    return (
        f"answered {show.counted(totals.queries, *_QUERIES)} in {show.counted(done.shards, 'shard')} of {folder}"
        f"{before}{redone}\n{show.counted(totals.errors, 'error')}; "
        f"{show.counted(totals.matched, *_QUERIES)} with a match, {show.counted(totals.matches, 'match', 'matches')}"
        f"{more}; {show.counted(totals.rows, 'row')}, {show.counted(totals.bytes, 'byte')}"
    )


def _on_server(client: Client, job: Job, queries: Queries | None) -> tuple[Queries, Answering, Conditions]:
    gallery = client.get_gallery(job.gallery)
    model = client.get_model(gallery.model)
    source = client.get_gallery(job.from_gallery) if job.from_gallery else None
    found = queries or RemoteItems(client, source or gallery)
    answering = ServerAnswering(
        client,
        gallery.id,
        source=source.id if source else "",
        images=source is None and not found.kind.endswith(("array", "embeddings")),
        k=job.k,
        within=job.within,
        point=job.point,
        filter=job.filter,
        effort=job.effort,
    )
    conditions = Conditions(
        queries=found.kind,
        queries_digest=found.digest,
        gallery=gallery.id,
        gallery_created=gallery.create_time.isoformat() if gallery.create_time else "",
        generation=gallery.generation,
        model=model.id,
        fingerprint=model.fingerprint,
        calibration=model.calibration.version,
        parameters=job.parameters(leave_out=source is not None and source.id == gallery.id),
    )
    return found, answering, conditions


def _here(backend: Backend, job: Job, queries: Queries | None) -> tuple[Queries, Answering, Conditions]:
    from lookalike.cli.local import LocalBackend, engine_effort, engine_point

    if not isinstance(backend, LocalBackend):
        raise LookalikeError("a job is run here or on a server")
    from index.batch.queries import GalleryItems
    from index.batch.search import GalleryAnswering, Wanted

    engine = backend.engine
    searched = engine.gallery(job.gallery)
    source = engine.gallery(job.from_gallery) if job.from_gallery else None
    found = queries or GalleryItems(source or searched)
    leave_out = source is not None and source.id == searched.id
    answering = GalleryAnswering(
        searched,
        Wanted(
            judge=engine.judge(engine_point(job.point), searched=searched),
            k=job.k,
            within=job.within,
            effort=engine_effort(job.effort),
            allowed=parse_filter(job.filter),
        ),
        encoder=engine.encoder,
        images=source is None and not found.kind.endswith(("array", "embeddings")),
        leave_out=leave_out,
    )
    return found, answering, answering.conditions(found, job.parameters(leave_out=leave_out))
