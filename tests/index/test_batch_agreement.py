"""Jobs say what Search and Verify say, bit for bit, over every structure, and the same bytes wherever they went on."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from embedding.decision import Judge, OperatingPoint, Vectors, distance
from embedding.errors import Cancelled
from index import Catalog, Exact, Gallery, IndexSettings, Item, ModelRef, Progress, Recall
from index import batch as jobs
from index.batch import run
from index.batch.queries import Array
from index.batch.search import GalleryAnswering, Wanted
from index.engine import Effort

WIDTH, ROWS = 16, 2000


def clustered(rows: int, seed: int) -> Vectors:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(40, WIDTH))
    vectors = centres[rng.integers(40, size=rows)] + 0.3 * rng.normal(size=(rows, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


STORED = clustered(ROWS, 2)
STORED[1:40:2] = STORED[0:40:2]  # some stand twice, and tie
DECIDED = ("distance", "threshold", "match_probability", "far", "far_upper95", "frr")
NAMES = {f"{i:04}": vector for i, vector in enumerate(STORED)}


@pytest.fixture(scope="module", params=["exact", "ivf-flat", "ivf-pq", "hnsw"])
def structured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gallery]:
    """One segment of this structure, and fresh rows."""
    with Catalog(tmp_path_factory.mktemp("galleries")) as catalog:
        gallery = catalog.create(
            "g",
            ModelRef(name="wide", fingerprint="1" * 64, embedding_dim=WIDTH),
            settings=IndexSettings(structure=request.param, min_recall=0.9, margin=0.5),
        )
        items = [
            Item(name=name, embedding=vector, identity=f"of {name[:3]}" if int(name) % 3 else None)
            for name, vector in NAMES.items()
        ]
        gallery.upsert(items[:-50])
        gallery.seal()
        gallery.upsert(items[-50:])
        yield gallery


@settings(max_examples=8, deadline=None, phases=[Phase.generate], suppress_health_check=[HealthCheck.too_slow])
@given(
    seed=st.integers(0, 2**32 - 1),
    count=st.integers(1, 40),
    k=st.integers(1, 100),
    within=st.booleans(),
    threshold=st.floats(0.1, 1.2),
    effort=st.sampled_from([None, Exact(), Recall(0.8)]),
    shard_queries=st.integers(1, 12),
    stop=st.integers(0, 40),
)
def test_rows_are_those_of_search_and_verify_wherever_the_job_was_stopped(
    structured: Gallery,
    judge_at: Callable[[float], Judge],
    seed: int,
    count: int,
    k: int,
    within: bool,
    threshold: float,
    effort: Effort | None,
    shard_queries: int,
    stop: int,
) -> None:
    queries_QD = clustered(count, seed)
    queries_QD[::4] = STORED[np.random.default_rng(seed).integers(60, size=len(queries_QD[::4]))]
    judge = Judge(judge_at(0.5).calibration, OperatingPoint(threshold=threshold), model="wide")
    with tempfile.TemporaryDirectory() as made, pytest.MonkeyPatch.context() as patched:
        patched.setattr(jobs, "_TELL_SECONDS", 0)
        patched.setattr(os, "fsync", lambda _: None)  # thousands of them, and no power is cut here
        place = Path(made)
        np.save(place / "queries.npy", queries_QD)
        wanted = Wanted(judge=judge, k=k, within=within, effort=effort)

        def ran(folder: str, stopped_at: int = 10**9) -> None:
            queries, answering = Array(place / "queries.npy"), GalleryAnswering(structured, wanted, images=False)

            def tell(progress: Progress) -> None:
                if stopped_at <= progress.done < count:
                    raise Cancelled("stopped")

            stated = answering.conditions(queries, {"k": k})
            run(place / folder, queries, answering, stated, shard_queries=shard_queries, on_progress=tell)

        ran("whole")
        with suppress(Cancelled):  # it looks after each batch, the last of which may be all there is
            ran("stopped", stop)
        ran("stopped")
        assert shards(place / "stopped") == shards(place / "whole")
        rows = [row for path in sorted((place / "whole").glob("part-*")) for row in pq.read_table(path).to_pylist()]

    expected = []
    for number, query_D in enumerate(queries_QD):
        found = (
            structured.matches(query_D, judge=judge, limit=k, effort=effort)
            if within
            else structured.search(query_D, k=k, judge=judge, effort=effort)
        )
        for rank, near in enumerate(found.neighbors, 1):
            decided = tuple(getattr(near.decision, name) for name in DECIDED)
            verdict = near.decision.verdict.value
            expected.append((number, rank, near.item.name, near.item.identity, found.truncated, verdict, *decided))
    names = ("query_row", "rank", "item", "identity", "truncated", "verdict", *DECIDED)
    assert [tuple(row[name] for name in names) for row in rows] == expected
    for row in rows:  # Verify decides on the distance of the two embeddings
        verified = judge.judge(distance(queries_QD[row["query_row"]], NAMES[row["item"]]))
        assert (verified.distance, verified.verdict.value) == (row["distance"], row["verdict"])
        assert (verified.match_probability, verified.is_match) == (row["match_probability"], row["is_match"])


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != ".lock"}
