"""What batch jobs find and write: right beside brute force."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from embedding.decision import Judge, Vectors
from embedding.errors import (
    InvalidInput,
)
from index import Exact, Gallery, Item
from index.batch.queries import Array, GalleryItems
from index.batch.search import GalleryAnswering, Wanted
from index.filters import parse_filter
from tests.index.batch_killed import SHARD_QUERIES
from tests.index.batch_made import ran, rows, told, truth


@pytest.mark.parametrize(("k", "within"), [(5, False), (60, False), (40, True), (3, True)])
def test_it_is_what_brute_force_finds(
    tmp_path: Path, filled: Gallery, pool: Vectors, array: Path, judge: Judge, k: int, within: bool
) -> None:
    done = ran(tmp_path / "job", filled, Array(array), judge, k=k, within=within)
    expected = truth([(str(i), query, "") for i, query in enumerate(pool[::-1])], pool, judge, k, within)
    assert told(tmp_path / "job") == expected
    assert (done.totals.queries, done.totals.errors, done.shards) == (len(pool), 0, 5)
    assert done.totals.rows == len(expected)
    assert done.totals.matches == sum(row[6] for row in expected)
    assert done.totals.matched == len({row[0] for row in expected if row[6]})
    (row,) = {(r["model"], r["calibration"], r["gallery_generation"], r["threshold"]) for r in rows(tmp_path / "job")}
    assert row == (judge.model, 1, filled.generation, judge.threshold)
    if (k, within) == (3, True):
        cut = {r["query"] for r in rows(tmp_path / "job") if r["truncated"]}
        whole = truth([(str(i), query, "") for i, query in enumerate(pool[::-1])], pool, judge, 99, within)
        assert cut == {r[0] for r in whole if r[1] == 4}
        assert done.totals.truncated == len(cut) > 0


@pytest.mark.parametrize("within", [False, True])
def test_the_footer_of_a_shard_says_what_its_rows_rest_on(
    tmp_path: Path, filled: Gallery, array: Path, judge: Judge, within: bool
) -> None:
    ran(tmp_path / "job", filled, Array(array), judge, k=4, within=within, changed={"parameters": {"k": 4, "ü": [1]}})
    for number in range(5):
        path = tmp_path / "job" / f"part-{number:05}.parquet"
        said = json.loads(pq.read_metadata(path).metadata[b"lookalike"])
        assert said == {
            "lookalike": version("lookalike"),
            "model": judge.model,
            "fingerprint": filled.model.fingerprint,
            "calibration": 1,
            "gallery": "shapes",
            "gallery_created": filled.created.isoformat(),
            "gallery_generation": filled.generation,
            "asked": {"k": 4, "ü": [1]},
            "first_query_row": SHARD_QUERIES * number,
            "queries": min(SHARD_QUERIES, 48 - SHARD_QUERIES * number),
            "threshold": judge.threshold,
            "far": judge.rates.far,
            "far_upper95": judge.rates.far_upper95,
            "frr": judge.rates.frr,
        }


def test_a_shard_without_a_neighbour_claims_no_threshold(
    tmp_path: Path, filled: Gallery, array: Path, judge: Judge
) -> None:
    ran(tmp_path / "job", filled, Array(array), judge, allowed=parse_filter('name = "none"'))
    said = json.loads(pq.read_metadata(tmp_path / "job" / "part-00000.parquet").metadata[b"lookalike"])
    assert (said["model"], said["queries"], "threshold" in said) == (judge.model, SHARD_QUERIES, False)
    assert rows(tmp_path / "job") == []


@pytest.mark.parametrize("within", [False, True])
def test_all_pairs_of_a_gallery_leave_each_item_out_of_its_own(
    tmp_path: Path, filled: Gallery, pool: Vectors, judge: Judge, within: bool
) -> None:
    ran(tmp_path / "job", filled, GalleryItems(filled), judge, k=9, within=within, leave_out=True)
    named = [(f"item-{i:02}", vector, f"item-{i:02}") for i, vector in enumerate(pool)]
    assert told(tmp_path / "job") == truth(named, pool, judge, 9, within)


def test_many_matches_are_all_found(
    tmp_path: Path, gallery: Gallery, pool: Vectors, array: Path, judge: Judge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.batch.search._FIRST", 2)
    gallery.upsert([Item(name=f"item-{i:02}", embedding=vector) for i, vector in enumerate(pool)])
    queries = [(str(i), query, "") for i, query in enumerate(pool[::-1])]
    for effort in (None, Exact()):
        ran(tmp_path / "job", gallery, Array(array), judge, k=40, within=True, effort=effort, restart=True)
        assert told(tmp_path / "job") == truth(queries, pool, judge, 40, within=True)


def test_a_filter_says_what_counts(tmp_path: Path, filled: Gallery, array: Path, judge: Judge) -> None:
    ran(tmp_path / "job", filled, Array(array), judge, k=3, allowed=parse_filter('name < "item-10"'))
    assert {row["item"] < "item-10" for row in rows(tmp_path / "job")} == {True}


def test_limits(filled: Gallery, judge: Judge) -> None:
    with pytest.raises(InvalidInput, match="k must"):
        GalleryAnswering(filled, Wanted(judge=judge, k=0))
    with pytest.raises(InvalidInput, match="limit must"):
        GalleryAnswering(filled, Wanted(judge=judge, k=100_001, within=True))
