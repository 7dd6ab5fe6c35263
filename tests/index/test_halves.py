"""Rounded rows choose and the store's decide: answers are those of a scan over the store's own vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embedding.decision import Judge, Vectors, distance, distances
from embedding.errors import Cancelled
from index import Catalog, Deadline, Gallery, GalleryCatalog, IndexSettings, Item, ModelRef
from index.engine import Precision
from index.halves import HalfRows, rounded, rounding_slack
from index.living import Living
from index.sealing import moved_most
from index.snapshot import Part
from tests.index.contract import GalleryContract


class Rounding(Catalog):
    """A catalog whose galleries keep float16 unless they are told otherwise, and seal early."""

    def create(self, gallery_id: str, model: ModelRef, *, settings: IndexSettings | None = None, **more: object):  # type: ignore[no-untyped-def,override]
        settings = settings or IndexSettings(vectors="float16")
        return super().create(gallery_id, model, settings=settings, **more)  # type: ignore[arg-type]


class TestRounded(GalleryContract):
    @pytest.fixture
    def catalog(self, tmp_path: Path) -> Iterator[GalleryCatalog]:
        with Rounding(tmp_path / "galleries", seal_after=3) as catalog:
            yield catalog

    def reopened(self, catalog: GalleryCatalog) -> GalleryCatalog:
        assert isinstance(catalog, Rounding)
        catalog.close()
        catalog.__init__(catalog.root, seal_after=3)  # type: ignore[misc]  # the fixture closes the one that it made
        return catalog


@st.composite
def cases(draw: st.DrawFn) -> tuple[Vectors, Vectors, list[int]]:
    """Queries, rows with copies and neighbours that rounding maps to one, and the dead among these."""
    width, rows = draw(st.integers(1, 40)), draw(st.integers(1, 90))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    vectors_ND = rng.normal(size=(rows, width)) * draw(st.sampled_from([1.0, 1e-3]))
    vectors_ND += draw(st.sampled_from([0.0, 1.0]))  # all near each other, where rounding reorders them
    copied = draw(st.integers(0, rows - 1))
    vectors_ND[copied : copied + 5] = vectors_ND[0]
    vectors_ND = (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)
    vectors_ND[rows // 2 :: 3] *= -1
    queries_QD = np.concatenate([vectors_ND[:2], -vectors_ND[-1:]])
    return queries_QD, vectors_ND, sorted(draw(st.sets(st.integers(0, rows - 1), max_size=rows // 2)))


@given(case=cases(), k=st.integers(1, 100), pieces=st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_nearest_are_those_of_a_scan(case: tuple[Vectors, Vectors, list[int]], k: int, pieces: bool) -> None:
    queries_QD, vectors_ND, dead = case
    halves_ND, moved = rounded(vectors_ND)
    with pytest.MonkeyPatch.context() as patch:
        if pieces:  # of eight rows each
            patch.setattr("index.halves._LEAST_ROWS", 8)
            patch.setattr("index.halves._STEP", 1)
        rows = HalfRows(halves_ND, lambda rows_R: vectors_ND[rows_R], moved=moved)
    living_N = np.ones(len(vectors_ND), np.bool_)
    living_N[dead] = False
    living = Living(living_N) if dead else None
    alive = np.flatnonzero(living_N)
    for query_D, (rows_R, dist_R) in zip(queries_QD, rows.nearest(queries_QD, k, living=living), strict=True):
        exact_N = distances(query_D, vectors_ND[alive])
        wanted = alive[exact_N <= np.sort(exact_N)[min(k, len(alive)) - 1]] if len(alive) else alive
        assert sorted(rows_R.tolist()) == wanted.tolist()
        assert dist_R.tolist() == distances(query_D, vectors_ND[rows_R]).tolist()
        for threshold in (0.0, float(np.median(exact_N)) if len(alive) else 1.0, 2.0):
            within_R, within_dist_R = rows.within(query_D, threshold, living=living)
            assert within_R.tolist() == alive[exact_N <= np.float32(threshold)].tolist()
            assert within_dist_R.tolist() == distances(query_D, vectors_ND[within_R]).tolist()


@given(case=cases())
@settings(max_examples=100, deadline=None)
def test_no_distance_errs_by_more_than_the_bound(case: tuple[Vectors, Vectors, list[int]]) -> None:
    queries_QD, vectors_ND, _ = case
    halves_ND, moved = rounded(vectors_ND)
    errors_N = np.linalg.norm(halves_ND.astype(np.float64) - vectors_ND, axis=1)
    assert errors_N.max() <= moved <= 1.001 * errors_N.max()
    rows = HalfRows(halves_ND, lambda rows_R: vectors_ND[rows_R], moved=moved)
    ((_, piece),) = rows._pieces
    for query_D in queries_QD:
        squared_1N, rows_1N = piece.search(query_D[None], len(vectors_ND))
        decided_N = distances(query_D, vectors_ND[rows_1N[0]]).astype(np.float64)
        errors = np.abs(squared_1N[0] - decided_N**2)[decided_N < 2]
        assert errors.max(initial=0) <= rounding_slack(vectors_ND.shape[1], moved)


def test_a_long_scan_looks_at_the_deadline(monkeypatch: pytest.MonkeyPatch, pool: Vectors) -> None:
    monkeypatch.setattr("index.halves._LEAST_ROWS", 8)
    monkeypatch.setattr("index.halves._STEP", 1)
    halves_ND, moved = rounded(pool)
    rows = HalfRows(halves_ND, lambda rows_R: pool[rows_R], moved=moved)
    given_up = Deadline()
    given_up.cancel()
    with pytest.raises(Cancelled):
        next(rows.nearest(pool[:1], 3, deadline=given_up))
    with pytest.raises(Cancelled):
        rows.within(pool[0], 0.5, deadline=given_up)


@pytest.mark.parametrize("way", [("float32", "float16"), ("float16", "float32"), ("float16", "float16")])
def test_a_gallery_changes_what_it_keeps_and_answers_alike(
    tmp_path: Path,
    model: ModelRef,
    judge_at: Callable[[float], Judge],
    pool: Vectors,
    way: tuple[Precision, Precision],
) -> None:
    with Catalog(tmp_path) as catalog:
        gallery = catalog.create("g", model, settings=IndexSettings(vectors=way[0]))
        gallery.upsert([Item(name=f"{row:02}", embedding=vector) for row, vector in enumerate(pool)])
        gallery.delete(["07", "31"])
        gallery.seal()
        sizes = [file.stat().st_size for file in tmp_path.glob("g/segments/*/vectors.*")]
        found = [pairs(gallery, query, judge_at(1.2)) for query in pool]
        gallery.reindex(IndexSettings(vectors=way[1]))
        (file,) = tmp_path.glob("g/segments/*/vectors.*")
        assert file.suffix == {"float32": ".f32", "float16": ".f16"}[way[1]]
        assert file.stat().st_size * {"float32": 1, "float16": 2}[way[1]] == 4 * pool[2:].size
        assert sizes == [2 * pool[2:].size * (2 if way[0] == "float32" else 1)]
        assert gallery.verify().sound
        assert [pairs(gallery, query, judge_at(1.2)) for query in pool] == found
        (parts,) = [part for part in gallery._live.snapshot.parts if part.segment]
        assert parts.take(np.arange(3)).tolist() == pool[:3].tolist()  # whatever is kept, the store's own decide
    with Catalog(tmp_path, read_only=True) as catalog:
        again = catalog.get("g")
        assert [pairs(again, query, judge_at(1.2)) for query in pool] == found
        for query, of_query in zip(pool, found, strict=True):
            assert len(of_query) > 1
            for name, dist in of_query:
                assert dist == distance(query, again.get(name).embedding)


def test_some_segments_alone_are_read_again_from_the_store(
    tmp_path: Path, model: ModelRef, judge_at: Callable[[float], Judge], pool: Vectors
) -> None:
    """A large one stays rounded, and no row of it comes to lie in the next."""
    with Catalog(tmp_path) as catalog:
        gallery = catalog.create("g", model, settings=IndexSettings(vectors="float16"))
        for start, end in ((0, 36), (36, 40), (40, 44)):
            gallery.upsert([Item(name=f"{row:02}", embedding=pool[row]) for row in range(start, end)])
            if end == 44:
                gallery.configure(IndexSettings(vectors="float32"))
            gallery.seal()
        assert sorted(file.suffix for file in tmp_path.glob("g/segments/*/vectors.*")) == [".f16", ".f32"]
        assert [part.size for part in gallery._live.snapshot.parts] == [36, 8, 0]
        assert gallery.verify().problems == []
        found = gallery.matches(pool[35], judge=judge_at(2)).neighbors
        assert sorted(match.item.name for match in found) == [f"{row:02}" for row in range(44)]


def test_a_segment_merged_of_several_says_how_far_any_row_was_moved(
    tmp_path: Path, model: ModelRef, pool: Vectors
) -> None:
    exact = np.eye(pool.shape[1], dtype=np.float32)  # which float16 holds as they are
    with Catalog(tmp_path) as catalog:
        gallery = catalog.create("g", model, settings=IndexSettings(vectors="float16"))
        for some in (pool[:40], exact, pool[40:41]):
            number = len(gallery._live.snapshot.parts)
            gallery.upsert([Item(name=f"{number}-{row}", embedding=vector) for row, vector in enumerate(some)])
            gallery.seal()
        before = [part for part in gallery._live.snapshot.parts if part.segment]
        farthest = max(part.segment.manifest.moved for part in before if part.segment)
        assert moved_most(before) == farthest > min(part.segment.manifest.moved for part in before if part.segment)
        gallery.compact()
        (merged,) = [part.segment for part in gallery._live.snapshot.parts if part.segment]
        assert merged.manifest.moved >= farthest


def test_what_is_kept_changes_only_between_segments(
    tmp_path: Path, model: ModelRef, judge: Judge, pool: Vectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that were rounded stood for those of the store, where float32 was asked for as they were written."""
    with Catalog(tmp_path) as catalog:
        gallery = catalog.create("g", model, settings=IndexSettings(vectors="float16"))
        gallery.upsert([Item(name=f"{row:02}", embedding=vector) for row, vector in enumerate(pool)])
        gallery.seal()
        found = [pairs(gallery, query, judge) for query in pool]

        def asked_for(parts: Sequence[Part]) -> float:
            gallery.configure(IndexSettings(vectors="float32"))
            return moved_most(parts)

        with monkeypatch.context() as patch:
            patch.setattr("index.live.moved_most", asked_for)
            gallery.reindex()
        assert gallery.verify().problems == []
        assert [pairs(gallery, query, judge) for query in pool] == found
        gallery.reindex()
        assert [file.suffix for file in tmp_path.glob("g/segments/*/vectors.*")] == [".f32"]
        assert gallery.verify().problems == []


def pairs(gallery: Gallery, query: Vectors, judge: Judge) -> list[tuple[str, float]]:
    return [(match.item.name, match.decision.distance) for match in gallery.matches(query, judge=judge).neighbors]
