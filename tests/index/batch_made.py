"""Jobs for tests, what they leave on disk, and what brute force finds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from embedding.decision import Judge, Vectors, distance
from index import Gallery, Progress
from index.batch import Done, Queries, run
from index.batch.folder import Conditions
from index.batch.search import GalleryAnswering, Wanted
from index.batch.shards import SCHEMA
from tests.index.batch_killed import SHARD_QUERIES


def ran(
    folder: Path,
    gallery: Gallery,
    queries: Queries,
    judge: Judge,
    *,
    restart: bool = False,
    on_progress: Callable[[Progress], None] = lambda _: None,
    leave_out: bool = False,
    shard_queries: int = SHARD_QUERIES,
    changed: dict[str, Any] | None = None,
    **wanted: Any,
) -> Done:
    answering = GalleryAnswering(gallery, Wanted(judge=judge, **wanted), images=False, leave_out=leave_out, threads=1)
    stated = answering.conditions(queries, {"k": 5})
    return run(
        folder,
        queries,
        answering,
        Conditions(**{**stated.model_dump(), **(changed or {})}),
        shard_queries=shard_queries,
        restart=restart,
        on_progress=on_progress,
    )


def rows(folder: Path) -> list[dict[str, Any]]:
    found = []
    for path in sorted(folder.glob("part-*.parquet")):
        with pq.ParquetFile(path) as file:
            assert file.schema_arrow.equals(SCHEMA)
            found += file.read().to_pylist()
    return found


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}


def truth(queries: Sequence[tuple[str, Vectors, str]], pool: Vectors, judge: Judge, most: int, within: bool) -> Any:
    """Brute force: (query, rank, item, distance, verdict, probability) of each."""
    found = []
    for name, query, itself in queries:
        near = sorted((float(distance(query, vector)), f"item-{i:02}") for i, vector in enumerate(pool))
        near = [(d, item) for d, item in near if item != itself and (not within or d <= judge.threshold)][:most]
        for rank, (d, item) in enumerate(near, 1):
            decided = judge.judge(d)
            found.append((name, rank, item, d, decided.verdict.value, decided.match_probability, decided.is_match))
    return found


def told(folder: Path) -> Any:
    names = ("query", "rank", "item", "distance", "verdict", "match_probability", "is_match")
    return [tuple(row[name] for name in names) for row in rows(folder)]
