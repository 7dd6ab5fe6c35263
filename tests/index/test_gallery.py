"""One gallery, through its public door: what it answers, what it refuses, and in which words."""

from __future__ import annotations

import itertools
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedding.decision import Judge, Vectors, distance
from embedding.errors import (
    DeadlineExceeded,
    InvalidInput,
    InvalidVector,
    LookalikeError,
    ModelMismatch,
    NotFound,
    StaleEtag,
    StorageFailed,
)
from index import (
    MAX_K,
    MAX_MATCHES,
    MAX_METADATA_BYTES,
    MAX_METADATA_DEPTH,
    Catalog,
    Deadline,
    Gallery,
    Item,
    ModelRef,
)
from index.filters import ItemFilter, parse_filter
from index.sealing import moved_most
from index.snapshot import Part
from tests.nested import nested


def test_distances_and_verdicts_are_those_of_a_pair(filled: Gallery, pool: Vectors, judge: Judge) -> None:
    for query in pool:
        for neighbor in filled.search(query, k=len(pool), judge=judge).neighbors:
            item_D = filled.get(neighbor.item.name).embedding
            assert neighbor.decision == judge.judge(float(distance(item_D, query)))


def test_ties_go_by_name_wherever_their_vectors_lie(gallery: Gallery, pool: Vectors, judge: Judge) -> None:
    gallery.upsert([Item(name=name, embedding=pool[0]) for name in ("d", "b")])
    gallery.seal()
    gallery.upsert([Item(name=name, embedding=pool[0]) for name in ("c", "a", "B")])
    for k in (4, 5):
        found = gallery.search(pool[0], k=k, judge=judge).neighbors
        assert [neighbor.item.name for neighbor in found] == ["B", "a", "b", "c", "d"][:k]
    matches = gallery.matches(pool[0], judge=judge, limit=2)
    assert ([neighbor.item.name for neighbor in matches.neighbors], matches.truncated) == (["B", "a"], True)


def test_opposite_vectors_beyond_distance_two_tie(gallery: Gallery, judge: Judge) -> None:
    query = np.array([1, 0, 0, 0, 0, 0], np.float32)
    far = {"b": -1.0009, "a": -1.0, "c": -1.0005}
    gallery.upsert([Item(name=name, embedding=query * np.float32(scale)) for name, scale in far.items()])
    found = gallery.search(query * np.float32(1.0009), k=2, judge=judge).neighbors
    assert [(neighbor.item.name, neighbor.decision.distance) for neighbor in found] == [("a", 2.0), ("b", 2.0)]


def test_excluded_items_make_room_for_others(filled: Gallery, pool: Vectors, judge: Judge) -> None:
    every = [neighbor.item.name for neighbor in filled.search(pool[3], k=20, judge=judge).neighbors]
    without = filled.search(pool[3], k=10, judge=judge, exclude=[*every[:4], "not there"]).neighbors
    assert [neighbor.item.name for neighbor in without] == every[4:14]


def test_k_beyond_the_gallery_gives_all_and_none_from_an_empty_one(
    catalog: Catalog, filled: Gallery, model: ModelRef, pool: Vectors, judge: Judge
) -> None:
    assert len(filled.search(pool[0], k=MAX_K, judge=judge).neighbors) == len(pool)
    empty = catalog.create("empty", model)
    empty.seal()
    assert not empty.search(pool[0], k=5, judge=judge).neighbors
    assert [list(found.neighbors) for found in empty.search_batch(pool[:2], k=5, judge=judge)] == [[], []]
    matches = empty.matches(pool[0], judge=judge)
    assert (len(matches.neighbors), matches.truncated, matches.expected_recall) == (0, False, 1)
    assert (empty.size, empty.list(), list(empty.iterate())) == (0, ([], ""), [])


@pytest.mark.parametrize("k", [0, -1, MAX_K + 1, 10**9])
def test_k_is_bounded(filled: Gallery, pool: Vectors, judge: Judge, k: int) -> None:
    for call in (
        lambda: filled.search(pool[0], k=k, judge=judge),
        lambda: filled.search_batch(pool[:2], k=k, judge=judge),
    ):
        with pytest.raises(InvalidInput, match=rf"^k must lie in 1\.\.10000; got {k}$") as caught:
            call()
        assert caught.value.field == "k"


def test_limits_and_pages_are_bounded(filled: Gallery, pool: Vectors, judge: Judge) -> None:
    with pytest.raises(InvalidInput, match="limit must lie in"):
        filled.matches(pool[0], judge=judge, limit=MAX_MATCHES + 1)
    with pytest.raises(InvalidInput, match="page_size must lie in"):
        filled.list(page_size=0)
    for token in ("!", "_w==", "ä"):
        with pytest.raises(InvalidInput, match="page_token is not one") as caught:
            filled.list(page_token=token)
        assert caught.value.field == "page_token"


def test_embeddings_of_another_model_are_refused(
    catalog: Catalog, filled: Gallery, pool: Vectors, judge: Judge, model: ModelRef, other_model: ModelRef
) -> None:
    other_judge = Judge(judge.calibration, model=other_model.name)
    for call in (
        lambda: filled.search(pool[0], k=1, judge=other_judge),
        lambda: filled.search_batch(pool[:1], k=1, judge=other_judge),
        lambda: filled.matches(pool[0], judge=other_judge),
        lambda: filled.check_model(other_model),
        lambda: catalog.get("shapes", model=other_model),
    ):
        with pytest.raises(ModelMismatch, match=f"{model.name}.*{other_model.name}"):
            call()
    assert catalog.get("shapes", model=model) is filled


@pytest.mark.parametrize(
    ("vector", "message"),
    [
        (np.full(6, np.nan, np.float32), "NaN"),
        (np.ones(6, np.float32), "length 2.449"),
        (np.ones(5, np.float32), r"shape \(6,\); got \(5,\)"),
    ],
)
def test_a_bad_vector_is_named_and_nothing_of_its_batch_is_stored(
    gallery: Gallery, pool: Vectors, judge: Judge, vector: Vectors, message: str
) -> None:
    with pytest.raises(InvalidVector, match=rf"item 'bad'.*{message}") as caught:
        gallery.upsert([Item(name="good", embedding=pool[0]), Item(name="bad", embedding=vector)])
    assert caught.value.field == "items[1].embedding"
    assert gallery.size == 0
    with pytest.raises(InvalidVector, match=message) as caught:
        gallery.search_batch(vector[None], k=1, judge=judge)
    assert caught.value.field == "queries[0]"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"name": ""}, "name"),
        ({"name": "a/b"}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a\ud800"}, "name"),
        ({"name": "x" * 257}, "name"),
        ({"identity": ""}, "identity"),
        ({"identity": "\x00"}, "identity"),
        ({"metadata": {"weight": float("nan")}}, "metadata"),
        ({"metadata": {"when": datetime(2026, 1, 1, tzinfo=UTC)}}, "metadata"),
        ({"metadata": {"text": "\ud800"}}, "metadata"),
        ({"metadata": {"text": "x" * MAX_METADATA_BYTES}}, "metadata"),
        ({"metadata": {"text": "é" * (MAX_METADATA_BYTES // 2)}}, "metadata"),
        ({"metadata": {1: "a", "1": "b"}}, "metadata"),
        ({"metadata": {"inner": [{None: 1}]}}, "metadata"),
        ({"metadata": {"large": 10**400}}, "metadata"),
        ({"metadata": {"inner": [-(10**400)]}}, "metadata"),
        ({"metadata": nested(MAX_METADATA_DEPTH + 1)}, "metadata"),
        ({"metadata": nested(5_000)}, "metadata"),
    ],
)
def test_what_cannot_be_stored_is_refused_by_field(
    gallery: Gallery, pool: Vectors, changes: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidInput) as caught:
        gallery.upsert([replace(Item(name="x", embedding=pool[0]), **changes)])
    assert caught.value.field == f"items[0].{field}"
    assert "\n" not in str(caught.value)


def test_a_name_twice_in_one_batch_is_refused(gallery: Gallery, pool: Vectors) -> None:
    with pytest.raises(InvalidInput, match="'x' is written twice"):
        gallery.upsert([Item(name="x", embedding=pool[0]), Item(name="x", embedding=pool[1])])


def test_items_return_as_they_were_written(gallery: Gallery, pool: Vectors) -> None:
    written = Item(name="mug é 1", embedding=pool[2], identity="mug", metadata={"price": 3.5, "tags": ["a", None]})
    before = datetime.now(UTC)
    (stored,) = gallery.upsert([written])
    for item in (stored, gallery.get("mug é 1"), gallery.list()[0][0]):
        assert (item.name, item.identity, item.metadata) == (written.name, written.identity, written.metadata)
        assert item.embedding.tobytes() == pool[2].tobytes()
        assert (item.etag, item.generation, item.update_time) == (stored.etag, 1, stored.update_time)
    assert stored.update_time is not None
    assert timedelta(0) <= stored.update_time - before + timedelta(milliseconds=1) < timedelta(minutes=1)


def test_a_stale_etag_refuses_the_write(gallery: Gallery, pool: Vectors) -> None:
    (first,) = gallery.upsert([Item(name="x", embedding=pool[0])])
    (second,) = gallery.upsert([Item(name="x", embedding=pool[1], etag=first.etag)])
    with pytest.raises(StaleEtag, match="'x' is not what it was") as caught:
        gallery.upsert([Item(name="new", embedding=pool[3]), Item(name="x", embedding=pool[2], etag=first.etag)])
    assert caught.value.field == "etag"
    assert (gallery.get("x").etag, gallery.size, gallery.generation) == (second.etag, 1, 2)


def test_a_batch_that_fails_midway_leaves_nothing(
    catalog: Catalog, filled: Gallery, pool: Vectors, judge: Judge
) -> None:
    refusing = sqlite3.connect(catalog.root / "shapes" / "store.sqlite")
    refusing.execute(
        "CREATE TRIGGER no BEFORE INSERT ON items WHEN new.name = 'no' BEGIN SELECT RAISE(FAIL, 'no'); END"
    )
    refusing.close()
    before = [item.etag for item in filled.iterate()]
    with pytest.raises(sqlite3.IntegrityError):
        filled.upsert([Item(name=name, embedding=pool[0]) for name in ("item-00", "new", "no")])
    assert [item.etag for item in filled.iterate()] == before
    assert (filled.size, filled.generation) == (len(pool), 2)
    filled.upsert([Item(name="yes", embedding=pool[0])])
    assert len(filled.search(pool[0], k=100, judge=judge).neighbors) == len(pool) + 1


def test_overwritten_versions_are_purged(catalog: Catalog, gallery: Gallery, pool: Vectors) -> None:
    for vector in pool:
        gallery.upsert([Item(name="x", embedding=vector, thumbnail=b"png", origin="there")])
    connection = sqlite3.connect(catalog.root / "shapes" / "store.sqlite")
    for table in ("items", "thumbnails", "origins"):
        (rows,) = connection.execute(f"SELECT count(*) FROM {table}").fetchone()
        assert 1 <= rows <= 2, table
    connection.close()


def test_unknown_items_are_named(filled: Gallery, pool: Vectors) -> None:
    calls: list[Callable[[], object]] = [
        lambda: filled.get("nope"),
        lambda: filled.delete(["item-00", "nope"]),
        lambda: filled.upsert([Item(name="nope", embedding=pool[0])], allow_missing=False),
    ]
    for call in calls:
        with pytest.raises(NotFound, match="no item 'nope'"):
            call()
    assert (filled.size, filled.generation) == (len(pool), 2)


def test_many_writes_seal_themselves(tmp_path: Path, model: ModelRef, pool: Vectors, judge: Judge) -> None:
    with Catalog(tmp_path, seal_after=100) as catalog:
        gallery = catalog.create("many", model)
        for start in range(0, 400, 50):
            gallery.upsert([Item(name=f"{i}", embedding=pool[i % 48]) for i in range(start, start + 50)])
        deadline = time.monotonic() + 30
        while not list((tmp_path / "many" / "segments").glob("*/manifest.json")):
            assert time.monotonic() < deadline, "no segment was written"
            threading.Event().wait(0.01)
        assert len(gallery.search(pool[0], k=1000, judge=judge).neighbors) == 400
    with Catalog(tmp_path, read_only=True) as catalog:
        assert catalog.get("many").size == 400


def test_compacting_writes_what_has_changed_and_nothing_else(filled: Gallery) -> None:
    segments = filled._live.segments_folder

    def compacted() -> list[str]:
        filled.compact()
        return sorted(path.name for path in segments.iterdir())

    (whole,) = compacted()
    assert compacted() == [whole]
    assert filled.stats().compactions == 1
    filled.delete(["item-03"])
    (without,) = compacted()
    assert without != whole
    assert filled.stats().compactions == 2
    filled.delete([item.name for item in filled.iterate()])
    assert compacted() == [], "no segment without rows"
    assert filled.verify().problems == []


def test_a_segment_that_is_mostly_dead_is_written_anew_however_large(gallery: Gallery, pool: Vectors) -> None:
    """From a quarter on, and what is worth a segment."""
    gallery.upsert([Item(name=f"a{i:02}", embedding=pool[i]) for i in range(40)])
    gallery.seal()
    gallery.upsert([Item(name=f"b{i}", embedding=pool[40 + i]) for i in range(4)])
    gallery.seal()
    gallery.delete([f"a{i:02}" for i in range(10)])
    gallery._live._seal_after = 10
    gallery.seal()
    assert (gallery.stats().dead, len(gallery.stats().segments)) == (10, 2), "a quarter exactly"
    gallery._live._seal_after = 3
    gallery.delete(["a10"])  # begins it in the background
    sealer = gallery._live._sealer
    assert sealer is not None
    sealer.join()
    assert (gallery.stats().dead, len(gallery.stats().segments)) == (0, 1)
    assert gallery.verify().problems == []


def test_what_is_written_during_a_seal_keeps_its_generation(
    filled: Gallery, pool: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    def meanwhile(parts: Sequence[Part]) -> float:
        filled.upsert([Item(name="meanwhile", embedding=pool[0])])
        return moved_most(parts)

    monkeypatch.setattr("index.live.moved_most", meanwhile)
    filled.seal()
    assert filled.generation == filled.get("meanwhile").generation == 3
    assert filled.stats().fresh == 1


def test_a_closed_gallery_says_so(filled: Gallery, pool: Vectors, judge: Judge) -> None:
    iterator = filled.iterate()
    assert next(iterator).name == "item-00"
    filled.close()
    calls: list[Callable[[], object]] = [
        lambda: filled.search(pool[0], k=1, judge=judge),
        lambda: filled.get("item-00"),
        lambda: filled.upsert([Item(name="x", embedding=pool[0])]),
        filled.seal,
    ]
    for call in calls:
        with pytest.raises(NotFound, match=r"^gallery 'shapes' has been deleted or closed"):  # and no place on a disk
            call()
    assert len(list(iterator)) == len(pool) - 1  # a listing that had begun may end


@pytest.mark.parametrize(
    "read",
    [
        lambda gallery, nothing, deadline: gallery.list(allowed=nothing, deadline=deadline),
        lambda gallery, nothing, deadline: gallery.count(nothing, deadline=deadline),
        lambda gallery, nothing, deadline: gallery.purge(nothing, deadline=deadline),
    ],
)
def test_what_a_filter_looks_for_in_vain_ends_with_the_deadline(
    filled: Gallery, read: Callable[[Gallery, ItemFilter, Deadline], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of SQLite's work; it went on to the end, for nobody."""
    nothing = parse_filter('metadata.tags:"nothing"')
    assert nothing is not None
    monkeypatch.setattr("index.reading._LOOK_EVERY", 1)
    looks = itertools.count()
    deadline = Deadline(60)

    def passes_meanwhile() -> None:
        if next(looks) > 2:
            raise DeadlineExceeded("passed")

    monkeypatch.setattr(deadline, "check", passes_meanwhile)
    with pytest.raises(DeadlineExceeded):
        read(filled, nothing, deadline)
    assert filled.count(nothing) == 0


def test_a_closed_gallery_opens_anew_from_its_catalog(catalog: Catalog, filled: Gallery) -> None:
    filled.close()
    assert catalog.get("shapes").size == filled.size


def test_a_read_only_gallery_refuses_writes(tmp_path: Path, catalog: Catalog, filled: Gallery, pool: Vectors) -> None:
    with Catalog(tmp_path / "galleries", read_only=True) as reader:
        gallery = reader.get("shapes")
        calls: list[Callable[[], object]] = [
            lambda: gallery.upsert([Item(name="x", embedding=pool[0])]),
            lambda: gallery.delete(["item-00"]),
            gallery.seal,
        ]
        for call in calls:
            with pytest.raises(StorageFailed, match="read-only"):
                call()


def test_a_read_only_gallery_keeps_showing_the_moment_it_was_opened(
    tmp_path: Path, filled: Gallery, pool: Vectors, judge: Judge
) -> None:
    with Catalog(tmp_path / "galleries", read_only=True) as reader:
        gallery = reader.get("shapes")
        before = [item.etag for item in gallery.iterate()]
        for _ in range(3):  # overwrites, deletes, purges and reseals what the reader still shows
            filled.upsert([Item(name=f"item-{i:02}", embedding=pool[0]) for i in range(10)])
            filled.delete([f"item-{i:02}" for i in range(5)])
            filled.seal()
        found = gallery.search(pool[0], k=100, judge=judge).neighbors
        assert sorted(neighbor.item.etag for neighbor in found) == sorted(before)
        assert [item.etag for item in gallery.iterate()] == before


def test_errors_are_one_line(filled: Gallery) -> None:
    with pytest.raises(LookalikeError) as caught:
        filled.get("a\nb" * 100)
    assert len(str(caught.value).splitlines()) == 1


def test_many_ties_of_several_distances_go_by_name_in_each_answer_of_a_batch(
    gallery: Gallery, pool: Vectors, judge: Judge
) -> None:
    names = [f"{n * 7919 % 100:02}" for n in range(60)]
    gallery.upsert([Item(name=name, embedding=pool[at % 4]) for at, name in enumerate(names)])
    expected = [
        sorted((float(distance(pool[query], pool[at % 4])), name) for at, name in enumerate(names))
        for query in range(3)
    ]
    for k, left_out in ((60, ()), (37, ()), (37, ("00", "19", "38"))):
        found = gallery.search_batch(pool[:3], k=k, judge=judge, exclude=[left_out] * 3)
        for each, ranked in zip(found, expected, strict=True):
            pairs = [(neighbor.decision.distance, neighbor.item.name) for neighbor in each.neighbors]
            assert pairs == [pair for pair in ranked if pair[1] not in left_out][:k]
