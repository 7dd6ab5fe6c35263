"""Approximate segments: candidates come from FAISS, and everything that is said of them from the store and the scan."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import faiss
import numpy as np
import pytest

from embedding.calibration import Calibration
from embedding.decision import Judge, Vectors, distances
from embedding.errors import Cancelled, DamagedData
from index import Catalog, Deadline, Exact, Found, Gallery, IndexSettings, Item, ModelRef, Raw, Recall, approximate
from index.engine import Structure
from index.exact import take_products_from_few
from index.planner import FEWEST, cheapest, lists_for, resolve
from index.structures import Plan, Point, build_ivf, load_structure
from tests.index.contract import MetadataIs

WIDTH, ROWS = 16, 3000
KINDS: list[Structure] = ["hnsw", "ivf-flat", "ivf-sq8", "ivf-pq"]


def clustered(rows: int, seed: int) -> Vectors:
    rng = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(60, WIDTH))
    vectors = centres[rng.integers(60, size=rows)] + 0.4 * rng.normal(size=(rows, WIDTH))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module")
def wide() -> ModelRef:
    return ModelRef(name="wide", fingerprint="1" * 64, embedding_dim=WIDTH)


@pytest.fixture(scope="module")
def wide_judge(judge_at: Callable[[float], Judge]) -> Judge:
    calibration: Calibration = judge_at(0.5).calibration
    return Judge(calibration, model="wide")


@pytest.fixture(scope="module", params=[*KINDS, "hnsw in float16", "ivf-pq in float16"])
def structured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, wide: ModelRef
) -> Iterator[Gallery]:
    """One indexed segment of 3,000 rows, 100 of them deleted since, and 50 fresh rows."""
    kind, _, vectors = request.param.partition(" in ")
    with Catalog(tmp_path_factory.mktemp("galleries")) as catalog:
        gallery = catalog.create(
            "g", wide, settings=IndexSettings(structure=kind, min_recall=0.95, margin=0.5, vectors=vectors or "float32")
        )
        vectors_ND = clustered(ROWS + 50, 2)
        items = [
            Item(name=f"{i:04}", embedding=vector, metadata={"most": int(i % 10 > 0)})
            for i, vector in enumerate(vectors_ND)
        ]
        gallery.upsert(items[:ROWS])
        gallery.seal()
        gallery.upsert(items[ROWS:])
        gallery.delete([f"{i:04}" for i in range(0, ROWS, 30)])
        yield gallery


@cache
def held(gallery: Gallery, allowed: MetadataIs | None) -> tuple[list[str], Vectors]:
    items = list(gallery.iterate(allowed=allowed))
    return [item.name for item in items], np.stack([item.embedding for item in items])


def scan(gallery: Gallery, query_D: Vectors, allowed: MetadataIs | None = None) -> list[tuple[float, str]]:
    """All distances and names, of a gallery that no test writes to."""
    names, vectors_ND = held(gallery, allowed)
    return sorted(zip(distances(query_D, vectors_ND).tolist(), names, strict=True))


def pairs(found: Found) -> list[tuple[float, str]]:
    return [(neighbor.decision.distance, neighbor.item.name) for neighbor in found.neighbors]


def test_the_structure_asked_for_is_built_and_measured(structured: Gallery) -> None:
    (segment,) = structured.stats().segments
    assert segment.structure == structured.stats().settings.structure
    assert (segment.rows, segment.dead) == (ROWS, 100)
    for k in (10, 100):
        curve = [point for point in segment.curve if point.k == k]
        assert curve == sorted(curve, key=lambda point: point.microseconds)
        assert max(point.recall for point in curve) > 0.95
        assert all(0 <= point.recall <= 1 and 0 <= point.match_recall <= 1 for point in curve)


def test_what_is_found_is_measured_and_judged_as_a_scan_would(structured: Gallery, wide_judge: Judge) -> None:
    for query in clustered(10, 3):
        truth = {name: dist for dist, name in scan(structured, query)}
        for effort in (None, Recall(0.5), Raw(nprobe=1, ef_search=10, rescore=1)):
            found = structured.search(query, k=10, judge=wide_judge, effort=effort)
            assert pairs(found) == sorted(pairs(found))
            for neighbor in found.neighbors:
                assert neighbor.decision == wide_judge.judge(truth[neighbor.item.name])  # a KeyError is a deleted item


def test_recall_is_what_was_said(structured: Gallery, wide_judge: Judge) -> None:
    queries_QD = clustered(150, 4)
    truth = [{name for _, name in scan(structured, query)[:10]} for query in queries_QD]
    for effort in (None, Recall(0.8), Recall(0.95)):
        answers = structured.search_batch(queries_QD, k=10, judge=wide_judge, effort=effort)
        found = [
            len({name for _, name in pairs(answer)} & true) / 10 for answer, true in zip(answers, truth, strict=True)
        ]
        error = np.std(found) / len(found) ** 0.5
        assert np.mean(found) >= answers[0].expected_recall - 3 * error - 0.01
        assert answers[0].expected_recall >= (effort.at_least if effort else 0.95)


def test_a_batch_is_its_queries_one_by_one(structured: Gallery, wide_judge: Judge) -> None:
    queries_QD = clustered(20, 5)
    answers = structured.search_batch(queries_QD, k=10, judge=wide_judge, threads=2)
    assert [pairs(answer) for answer in answers] == [
        pairs(structured.search(query, k=10, judge=wide_judge)) for query in queries_QD
    ]


@pytest.mark.parametrize("k", [10, 500, 10_000])
def test_exact_means_exact_and_many_neighbours_are_searched_exactly(
    structured: Gallery, wide_judge: Judge, k: int
) -> None:
    for query in clustered(4, 6):
        for effort in (Exact(), Recall(1.0), *([None] if k > 10 else [])):
            found = structured.search(query, k=k, judge=wide_judge, effort=effort)
            assert pairs(found) == scan(structured, query)[:k]
            assert found.expected_recall == 1


def test_matches_are_complete_unless_less_is_asked_for(structured: Gallery, wide_judge: Judge) -> None:
    met = told = 0.0
    for query in clustered(30, 7):
        truth = [pair for pair in scan(structured, query) if pair[0] <= wide_judge.threshold]
        found = structured.matches(query, judge=wide_judge)
        assert (pairs(found), found.expected_recall) == (truth, 1)
        some = structured.matches(query, judge=wide_judge, effort=Recall(0.9))
        assert set(pairs(some)) <= set(truth)
        met += len(some.neighbors) / len(truth) if truth else 1
        told += some.expected_recall
    assert met >= told - 1


@pytest.mark.parametrize("value", [0, 1])
def test_filters_select_whatever_the_structure(structured: Gallery, wide_judge: Judge, value: int) -> None:
    allowed = MetadataIs("most", value)
    hits = 0
    for query in clustered(20, 8):
        truth = scan(structured, query, allowed)[:10]
        found = pairs(structured.search(query, k=10, judge=wide_judge, allowed=allowed))
        assert len(found) == 10
        assert all(structured.get(name).metadata["most"] == value for _, name in found)
        hits += len(set(found) & set(truth))
        if value == 0:  # a tenth: selective, hence exact
            assert found == truth
    assert hits >= 0.9 * 200


def test_structures_are_mapped_again_after_reopening(
    tmp_path: Path, wide: ModelRef, wide_judge: Judge, caplog: pytest.LogCaptureFixture
) -> None:
    queries_QD = clustered(10, 9)
    with Catalog(tmp_path) as catalog:
        gallery = catalog.create("g", wide, settings=IndexSettings(structure="ivf-pq"))
        gallery.upsert([Item(name=f"{i:04}", embedding=vector) for i, vector in enumerate(clustered(ROWS, 2))])
        gallery.seal()
        before = [pairs(found) for found in gallery.search_batch(queries_QD, k=10, judge=wide_judge)]
    (index,) = (tmp_path / "g" / "segments").glob("*/index.faiss")
    with Catalog(tmp_path) as catalog:
        gallery = catalog.get("g")
        assert gallery.stats().segments[0].structure == "ivf-pq"
        assert [pairs(found) for found in gallery.search_batch(queries_QD, k=10, judge=wide_judge)] == before
    whole = index.read_bytes()
    rng = np.random.default_rng(0)
    for at in [0, 4, len(whole) // 2, len(whole) - 1, *rng.integers(len(whole), size=6).tolist()]:
        for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 0x01]) + whole[at + 1 :]):
            index.write_bytes(damaged)
            caplog.clear()
            with Catalog(tmp_path, read_only=True) as catalog:
                found = catalog.get("g").search_batch(queries_QD[:2], k=10, judge=wide_judge, effort=Exact())
                assert "taking its vectors from the store instead" in caplog.text
                assert [pairs(one) for one in found] == [scan(catalog.get("g"), query)[:10] for query in queries_QD[:2]]
    index.write_bytes(whole)
    with Catalog(tmp_path) as catalog:
        assert [pairs(found) for found in catalog.get("g").search_batch(queries_QD, k=10, judge=wide_judge)] == before


def test_data_without_clusters_is_searched_exactly(
    tmp_path: Path, wide: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no structure pays, none is kept: here each is as slow as a scan."""
    monkeypatch.setattr("index.planner.CROSSOVER", 1000)
    monkeypatch.setattr("index.planner._WORTHWHILE", 0.0)
    with Catalog(tmp_path) as catalog:
        gallery = catalog.create("g", wide)
        gallery.upsert([Item(name=f"{i:04}", embedding=vector) for i, vector in enumerate(clustered(1200, 2))])
        gallery.seal()
        assert gallery.stats().segments[0].structure == "exact"
        assert not list((tmp_path / "g" / "segments").glob("*/index.faiss"))


@pytest.mark.parametrize("width", [12, 16])
def test_why_a_segment_has_another_structure_than_the_one_asked_for(tmp_path: Path, width: int) -> None:
    """Whatever is asked for, in whatever order, the reason is the one that reindexing and growing bear out."""
    model = ModelRef(name="wide", fingerprint="f" * 64, embedding_dim=width)
    rows_ND = np.random.default_rng(5).normal(size=(FEWEST, width)).astype(np.float32)
    rows_ND /= np.linalg.norm(rows_ND, axis=1, keepdims=True)
    items = [Item(name=f"{i:05}", embedding=vector) for i, vector in enumerate(rows_ND)]

    def of(gallery: Gallery) -> tuple[str, str]:
        (segment,) = gallery.stats().segments
        return segment.structure, segment.fallback

    with Catalog(tmp_path) as catalog:
        gallery = catalog.create("g", model, settings=IndexSettings(structure="ivf-pq"))
        gallery.upsert(items[:-1])
        gallery.seal()
        assert of(gallery) == ("exact", "few-rows")
        gallery.configure(IndexSettings())
        assert of(gallery) == ("exact", "")
        gallery.upsert(items[-1:])
        gallery.compact()
        gallery.configure(IndexSettings(structure="ivf-pq"))
        assert of(gallery) == ("exact", "sealed-before")
        gallery.reindex()
        assert of(gallery) == (("ivf-pq", "") if width == 16 else ("ivf-sq8", "odd-width"))
        gallery.configure(IndexSettings(structure="exact"))
        assert of(gallery)[1] == "sealed-before"
        gallery.reindex()
        assert of(gallery) == ("exact", "")


class Counting(Deadline):
    """Expires at the given look."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self.looks, self._at = 0, at

    def check(self) -> None:
        self.looks += 1
        if self.looks == self._at:
            self.cancel()
        super().check()


@pytest.mark.parametrize("queries", [1, 40])
def test_long_searches_look_at_the_deadline_by_and_by(
    tmp_path: Path, wide: ModelRef, wide_judge: Judge, queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look is at most so many multiplications after the last, which bounds the time between."""
    monkeypatch.setattr("index.exact._ROWS_AT_ONCE", 500)
    monkeypatch.setattr("index.exact._STEP", 1)  # then 4,096 rows at a time
    with Catalog(tmp_path) as catalog:
        gallery = catalog.create("g", wide)
        gallery.upsert([Item(name=f"{i:05}", embedding=vector) for i, vector in enumerate(clustered(10_000, 2))])
        patient = Counting(10**9)
        gallery.search_batch(clustered(queries, 3), k=5, judge=wide_judge, deadline=patient, threads=1)
        assert patient.looks >= (10_000 // 500 if queries == 1 else 3)
        for at in (1, 2, patient.looks // 2):
            with pytest.raises(Cancelled):
                gallery.search_batch(clustered(queries, 3), k=5, judge=wide_judge, deadline=Counting(at), threads=1)


def point(**values: float | None) -> Point:
    fixed = {"k": 10, "rescore": 4, "recall": 0.99, "match_recall": 0.9, "least": 0.98, "microseconds": 10.0}
    return Point.model_validate(fixed | values)


def test_the_cheapest_point_that_is_sure_of_a_recall_is_chosen() -> None:
    curve = (
        point(nprobe=1, recall=0.8, least=0.78, microseconds=5.0),
        point(nprobe=2),
        point(nprobe=8, recall=1.0, least=1.0, match_recall=1.0, microseconds=40.0),
        point(k=100, nprobe=16, recall=0.99, least=0.97, microseconds=90.0),
    )
    plan = Plan(structure="ivf-pq", lists=64, curve=curve)
    assert cheapest(plan, 0.7) == curve[0]
    assert cheapest(plan, 0.98) == curve[1]
    assert cheapest(plan, 0.981) == curve[2]
    assert cheapest(plan, 1.0) is None
    assert cheapest(plan, 0.97, k=11) == curve[1]  # ten, and the query itself
    assert cheapest(plan, 0.97, k=12) == curve[3]
    assert cheapest(plan, 0.97, k=102) is None
    assert resolve(plan, Exact(), 10) is None
    assert resolve(plan, Recall(0.9), 10) == (Raw(nprobe=2, rescore=4), 0.99)
    assert resolve(plan, Recall(0.9), None) == (Raw(nprobe=2, rescore=4), 0.9)
    assert resolve(plan, Raw(nprobe=4), 10) == (Raw(nprobe=4, rescore=4), 0.99)
    assert resolve(plan, Raw(nprobe=1, rescore=1), 10) == (Raw(nprobe=1, rescore=1), 0.0)


def test_few_rows_are_kept_whole_in_lists_and_many_as_codes(
    tmp_path: Path, wide: ModelRef, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("index.planner.CROSSOVER", 1000)
    monkeypatch.setattr("index.planner._WORTHWHILE", 1e9)
    monkeypatch.setattr("index.planner._WHOLE_WORTHWHILE", 1e9)
    with Catalog(tmp_path) as catalog:
        gallery = catalog.create("g", wide)
        gallery.upsert([Item(name=f"{i:04}", embedding=vector) for i, vector in enumerate(clustered(1200, 2))])
        for whole_bytes, settings, structure in (
            (4 * WIDTH * 1200, IndexSettings(), "ivf-flat"),
            (4 * WIDTH * 1200 - 1, IndexSettings(), "ivf-pq"),
            (4 * WIDTH * 1200, IndexSettings(memory_bytes=2 * WIDTH * 1200), "ivf-pq"),
        ):
            monkeypatch.setattr("index.planner.WHOLE_BYTES", whole_bytes)
            assert gallery.reindex(settings).segments[0].structure == structure
        monkeypatch.setattr("index.planner._WHOLE_WORTHWHILE", 0.0)
        assert gallery.reindex(IndexSettings()).segments[0].structure == "ivf-pq"


@pytest.mark.parametrize("width", [4, 16, 100])
def test_single_queries_are_measured_one_by_one_and_a_few_by_a_product(width: int) -> None:
    """FAISS compares queries times width with one number of the process."""
    take_products_from_few(width)
    least = faiss.cvar.distance_compute_blas_threshold
    assert width < least <= 4 * width


def test_lists_grow_with_the_root_of_the_rows() -> None:
    sizes = (1_000, 100_000, 1_000_000, 10_000_000)
    assert [lists_for(rows, "ivf-flat") for rows in sizes] == [64, 512, 2048, 8192]
    assert [lists_for(rows, "ivf-pq") for rows in sizes] == [128, 1024, 4096, 8192]


def test_all_that_tie_with_the_last_are_found_alone_and_in_a_batch(tmp_path: Path) -> None:
    rows_ND = clustered(1000, 3)
    rows_ND[::40] = rows_ND[0]  # 25 of them, more than are kept for the five asked for
    build_ivf("ivf-flat", rows_ND, rows_ND, 16, tmp_path / "index", lambda *_: None)
    structure = load_structure(tmp_path / "index", Plan(structure="ivf-flat", lists=16), rows_ND)
    queries_QD = np.stack([rows_ND[0], rows_ND[1]])
    effort, take = Raw(nprobe=16, rescore=8), partial(rows_ND.take, axis=0)
    alone = [next(iter(approximate.nearest(structure, take, query_D[None], 5, effort))) for query_D in queries_QD]
    together = list(approximate.nearest(structure, take, queries_QD, 5, effort))
    assert sorted(alone[0][0].tolist()) == list(range(0, 1000, 40))
    for query_D, one, other in zip(queries_QD, alone, together, strict=True):
        assert dict(zip(*one, strict=True)) == dict(zip(*other, strict=True))
        dist_N = distances(query_D, rows_ND)
        assert sorted(one[0].tolist()) == np.flatnonzero(dist_N <= np.sort(dist_N)[4]).tolist()


def test_a_structure_of_other_rows_is_damaged(tmp_path: Path) -> None:
    rows_ND = clustered(1000, 3)
    build_ivf("ivf-flat", rows_ND, rows_ND, 16, tmp_path / "index", lambda *_: None)
    with pytest.raises(DamagedData, match="1000 rows of width 16"):
        load_structure(tmp_path / "index", Plan(structure="ivf-flat", lists=16), rows_ND[:999])


def test_many_lists_are_chosen_by_their_codes_nearly_as_exactly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors_ND, queries_QD = clustered(4000, 5), clustered(100, 6)
    found = []
    for name, coded_from in (("exact", 10**9), ("coded", 256)):
        monkeypatch.setattr("index.structures._CODED_LISTS", coded_from)
        build_ivf("ivf-pq", vectors_ND, vectors_ND, 256, tmp_path / name, lambda *_: None)
        plan = Plan(structure="ivf-pq", lists=256)
        structure = load_structure(tmp_path / name, plan, vectors_ND)
        rows_QC, _ = structure.refined(queries_QD, 10, 40, Raw(nprobe=4))
        found.append([set(rows_C.tolist()) for rows_C in rows_QC])
    assert (tmp_path / "coded").read_bytes() != (tmp_path / "exact").read_bytes()
    assert np.mean([len(coded & exact) / 10 for exact, coded in zip(*found, strict=True)]) > 0.97
