"""Columns are the rows of a batch and the answers of Search, bit for bit: over every structure, whatever is asked."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from google.protobuf import field_mask_pb2
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from embedding.bundle import Bundle
from embedding.calibration import Calibration
from embedding.decision import Judge, OperatingPoint, Vectors
from embedding.errors import InvalidInput, LookalikeError, ResponseTooLarge
from index import Catalog, Exact, Gallery, IndexSettings, Item, ModelRef, Raw, Telling
from index.engine import Effort, Structure
from index.telling import MANY_NAMES
from lookalike.v1 import common_pb2, gallery_pb2, search_pb2
from service.messages import columns, encoded, wire
from service.messages.parse import NEIGHBOR_FIELDS
from service.outcomes import Outcomes
from service.telemetry import watch
from tests.service.harness import Stubs, fields, refused, rich, unit
from tests.service.harness import encoded as image

WIDTH, ROWS, MOST = 16, 1500, 2**22
KINDS: list[Structure] = ["exact", "hnsw", "ivf-flat", "ivf-sq8", "ivf-pq"]


@dataclass(frozen=True, repr=False)
class Searched:
    """A gallery, what it was filled with, and the calibration of its model."""

    gallery: Gallery
    vectors_ND: Vectors
    calibration: Calibration

    def judge(self, point: OperatingPoint | None = None) -> Judge:
        return Judge(self.calibration, point, model=self.gallery.model.name)


@pytest.fixture(scope="module", params=[*KINDS, "nothing but fresh rows", "ivf-pq in float16"])
def searched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bundle: Bundle
) -> Iterator[Searched]:
    """With items that tie, deleted ones and fresh ones, some with identities and metadata."""
    kind, _, rounded = request.param.partition(" in ")
    with Catalog(tmp_path_factory.mktemp("galleries")) as catalog:
        model = ModelRef(name=bundle.name, fingerprint=bundle.fingerprint, embedding_dim=WIDTH)
        settings = IndexSettings(structure=kind, min_recall=0.9, margin=0.5, vectors=rounded or "float32")
        gallery = catalog.create("g", model, settings=settings if kind in KINDS else None)
        rng = np.random.default_rng(3)
        centres = rng.normal(size=(40, WIDTH))
        vectors_ND = centres[rng.integers(40, size=ROWS)] + 0.3 * rng.normal(size=(ROWS, WIDTH))
        vectors_ND[::9] = vectors_ND[0]
        vectors_ND = (vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)).astype(np.float32)
        items = [
            Item(
                name=f"{'ß語'[i % 2]}{i}",
                embedding=vector,
                identity=f"of {i % 50}" if i % 3 else None,
                metadata={"n": i} if i % 4 else {},
            )
            for i, vector in enumerate(vectors_ND)
        ]
        gallery.upsert(items[: ROWS - 40])
        if kind in KINDS:
            gallery.seal()
        gallery.upsert(items[ROWS - 40 :])
        gallery.delete([item.name for item in items[5::30]])
        yield Searched(gallery, vectors_ND, bundle.calibration)


def results_of(found: search_pb2.NeighborColumns) -> list[search_pb2.SearchResult]:
    """The rows that columns stand for, told one value after the other."""
    failed = {each.query: each.error for each in found.failed}
    results, row = [], 0
    for query, count in enumerate(found.counts):
        if query in failed:
            assert (count, found.expected_recalls[query]) == (0, 0)
            results.append(search_pb2.SearchResult(error=failed[query]))
            continue
        neighbors = []
        for at in range(row, row + count):
            neighbor = search_pb2.Neighbor()
            if found.item_ids:
                neighbor.item = found.item_prefix + found.item_ids[at]
            if found.identities:
                neighbor.identity = found.identities[at]
            if found.metadata and found.metadata[at].fields:
                neighbor.metadata.CopyFrom(found.metadata[at])
            if found.HasField("evidence"):
                neighbor.decision.CopyFrom(found.evidence)
                neighbor.decision.verdict = found.verdicts[at]
                neighbor.decision.distance = found.distances[at]
                neighbor.decision.signed_margin = found.signed_margins[at]
                neighbor.decision.match_probability = found.match_probabilities[at]
            neighbors.append(neighbor)
        row += count
        results.append(
            search_pb2.SearchResult(
                neighbors=search_pb2.Neighbors(
                    neighbors=neighbors,
                    expected_recall=found.expected_recalls[query],
                    generation=found.generation,
                    partial=found.partial,
                )
            )
        )
    return results


def bits(results: Sequence[search_pb2.SearchResult]) -> list[bytes]:
    return [result.SerializeToString(deterministic=True) for result in results]


efforts: st.SearchStrategy[Effort | None] = st.sampled_from([None, Exact(), Raw(nprobe=2, ef_search=20), Raw(nprobe=1)])
points = st.builds(OperatingPoint, threshold=st.floats(0, 2, width=32), uncertain_within=st.sampled_from([0.0, 0.125]))


@hypothesis_settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.integers(0, ROWS - 1), max_size=12),
    k=st.integers(1, 30) | st.just(300),
    point=points,
    effort=efforts,
    failed=st.sets(st.integers(0, 14), max_size=3),
    mask=st.sets(st.sampled_from(sorted(NEIGHBOR_FIELDS)), min_size=1).map(frozenset) | st.just(NEIGHBOR_FIELDS),
    excludes=st.booleans(),
)
def test_columns_are_the_rows_and_what_search_finds(
    searched: Searched,
    rows: list[int],
    k: int,
    point: OperatingPoint,
    effort: Effort | None,
    failed: set[int],
    mask: frozenset[str],
    excludes: bool,
) -> None:
    gallery, vectors_ND, judge = searched.gallery, searched.vectors_ND, searched.judge(point)
    queries_QD, exclude = vectors_ND[rows], [[f"{'ß語'[row % 2]}{row}"] if excludes else [] for row in rows]
    errors: dict[int, LookalikeError] = {}
    for at in sorted(failed):
        if at <= len(rows) + len(errors):
            errors[at] = InvalidInput("no image", field=f"queries[{at}]")

    def asked(telling: Telling) -> Outcomes:
        return Outcomes(
            gallery.search_batch(queries_QD, k=k, judge=judge, effort=effort, exclude=exclude, telling=telling), errors
        )

    told = Telling() if "metadata" in mask else MANY_NAMES
    as_rows = search_pb2.BatchSearchResponse.FromString(
        encoded.batch_response(asked(Telling()), "g", mask, most_bytes=2**26)
    )
    as_columns = search_pb2.BatchSearchResponse.FromString(
        columns.batch_response(asked(told), "g", mask, most_bytes=2**26)
    )
    assert not as_columns.results
    made = results_of(as_columns.columns)
    assert bits(made) == bits(as_rows.results)
    alone = [
        gallery.search(query_D, k=k, judge=judge, effort=effort, exclude=names)
        for query_D, names in zip(queries_QD, exclude, strict=True)
    ]
    answered = [result.neighbors for result in made if result.HasField("neighbors")]
    assert [each.SerializeToString(deterministic=True) for each in answered] == [
        wire.found_neighbors(each, "g", mask).SerializeToString(deterministic=True) for each in alone
    ]


def test_what_a_message_does_not_carry_is_refused(searched: Searched) -> None:
    gallery, vectors_ND, judge = searched.gallery, searched.vectors_ND, searched.judge()
    outcomes = Outcomes(gallery.search_batch(vectors_ND[:8], k=50, judge=judge), {})
    size = len(columns.batch_response(outcomes, "g", NEIGHBOR_FIELDS, most_bytes=MOST))
    for most in (10, size // 4, size // 2, size - 1):
        with pytest.raises(ResponseTooLarge):
            columns.batch_response(outcomes, "g", NEIGHBOR_FIELDS, most_bytes=most)
    assert len(columns.batch_response(outcomes, "g", NEIGHBOR_FIELDS, most_bytes=size)) == size


def test_what_is_watched_is_the_same_for_many(searched: Searched) -> None:
    gallery, vectors_ND = searched.gallery, searched.vectors_ND
    judge = searched.judge(OperatingPoint(threshold=0.3, uncertain_within=0.1))
    outcomes = Outcomes(gallery.search_batch(vectors_ND[:100], k=3, judge=judge), {4: InvalidInput("no image")})
    many, single = (watch.ModelWatch(None, window_seconds=1) for _ in range(2))
    assert many.answered(outcomes) is outcomes
    for outcome in outcomes:
        single.answered(outcome)
    one, other = many.distances()["nearest"], single.distances()["nearest"]
    assert (one.counts, one.verdicts, pytest.approx(one.total)) == (other.counts, other.verdicts, other.total)
    assert sum(one.counts) == 100


def batch(gallery: str, **options: object) -> search_pb2.BatchSearchRequest:
    return search_pb2.BatchSearchRequest(gallery=f"galleries/{gallery}", **options)  # type: ignore[arg-type]


def test_over_the_wire(stubs: Stubs, gallery: str) -> None:
    stubs.fill(gallery, {f"{seed}": image(seed) for seed in range(6)})
    queries = [
        image(1),
        common_pb2.ImageInput(embedding=unit(1, 1)),
        common_pb2.ImageInput(item=f"galleries/{gallery}/items/nothing"),
        common_pb2.ImageInput(item=f"galleries/{gallery}/items/2"),
        common_pb2.ImageInput(embedding=b"short"),
    ]
    as_rows = stubs.search.BatchSearch(batch(gallery, queries=queries, k=4))
    answer = stubs.search.BatchSearch(batch(gallery, queries=queries, k=4, layout=search_pb2.BATCH_LAYOUT_COLUMNS))
    assert bits(results_of(answer.columns)) == bits(as_rows.results)
    assert [each.query for each in answer.columns.failed] == [2, 4]
    named = stubs.search.BatchSearch(batch(gallery, queries=queries, k=4, layout=search_pb2.BATCH_LAYOUT_RESULTS))
    assert bits(named.results) == bits(as_rows.results)
    assert not named.HasField("columns")
    only = stubs.search.BatchSearch(
        batch(
            gallery,
            queries=queries[:1],
            layout=search_pb2.BATCH_LAYOUT_COLUMNS,
            read_mask=field_mask_pb2.FieldMask(paths=["item"]),
        )
    ).columns
    assert (list(only.counts), len(only.item_ids), len(only.distances), only.HasField("evidence")) == ([6], 6, 0, False)


def test_where_every_query_fails_the_rest_is_told_all_the_same(stubs: Stubs, gallery: str) -> None:
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
    queries = [common_pb2.ImageInput(embedding=b"short")]
    found = stubs.search.BatchSearch(batch(gallery, queries=queries, layout=search_pb2.BATCH_LAYOUT_COLUMNS)).columns
    assert (list(found.counts), [each.query for each in found.failed]) == ([0], [0])
    assert found.evidence.model
    empty = stubs.search.BatchSearch(batch(gallery, queries=[image(1)], layout=search_pb2.BATCH_LAYOUT_COLUMNS)).columns
    assert (list(empty.counts), list(empty.failed), list(empty.expected_recalls)) == ([0], [], [1])


def test_a_layout_that_nobody_knows_is_refused(stubs: Stubs, gallery: str) -> None:
    error = refused(stubs.search.BatchSearch, batch(gallery, queries=[image(1)], layout=7))
    status = rich(error)
    assert fields(status) == ["layout"]
    assert "BATCH_LAYOUT_COLUMNS" in status.message
