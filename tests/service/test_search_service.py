from __future__ import annotations

import grpc
import pytest
from google.protobuf import json_format

from lookalike.v1 import common_pb2, gallery_pb2, search_pb2
from tests.service.harness import Stubs, encoded, fields, info, png, refused, rich, stored, vector


@pytest.fixture
def filled(stubs: Stubs, gallery: str) -> str:
    """A gallery of four embeddings, from near to far as seen from the first axis; two of them tie."""
    stubs.fill(gallery, {"near": vector(1, 0.1), "tie-b": vector(1, 1), "tie-a": vector(1, 0, 1), "far": vector(-1)})
    return gallery


def search(stubs: Stubs, gallery: str, query: common_pb2.ImageInput, **options: object) -> list[search_pb2.Neighbor]:
    request = search_pb2.SearchRequest(gallery=f"galleries/{gallery}", query=query, **options)
    return list(stubs.search.Search(request).neighbors)


def items(neighbors: list[search_pb2.Neighbor]) -> list[str]:
    return [neighbor.item.rpartition("/")[2] for neighbor in neighbors]


def test_neighbours_come_nearest_first_and_equal_distances_by_name(stubs: Stubs, filled: str) -> None:
    found = search(stubs, filled, vector(1))
    assert items(found) == ["near", "tie-a", "tie-b", "far"]
    assert found[0].item == f"galleries/{filled}/items/near"
    assert found[0].identity == "near"
    assert found[1].decision.distance == found[2].decision.distance
    assert found[3].decision.distance == 2
    assert [neighbor.decision.verdict for neighbor in found] == [common_pb2.VERDICT_MATCH] + 3 * [
        common_pb2.VERDICT_NON_MATCH
    ]


@pytest.mark.parametrize(("k", "found"), [(1, 1), (3, 3), (10_000, 4), (0, 4)])
def test_k_nearest_or_all_there_are(stubs: Stubs, filled: str, k: int, found: int) -> None:
    assert len(search(stubs, filled, vector(1), k=k)) == found


def test_an_unset_k_means_ten(stubs: Stubs, gallery: str) -> None:
    stubs.fill(gallery, {f"item-{i:02}": vector(1, i) for i in range(12)})
    assert len(search(stubs, gallery, vector(1))) == 10
    batch = search_pb2.BatchSearchRequest(gallery=f"galleries/{gallery}", queries=[vector(1)])
    assert len(stubs.search.BatchSearch(batch).results[0].neighbors.neighbors) == 10


@pytest.mark.parametrize("k", [-1, 10_001, 10**9])
def test_a_k_out_of_range_is_refused(stubs: Stubs, filled: str, k: int) -> None:
    name = f"galleries/{filled}"
    single = search_pb2.SearchRequest(gallery=name, query=vector(1), k=k)
    batch = search_pb2.BatchSearchRequest(gallery=name, queries=[vector(1)], k=k)
    for call, request in ((stubs.search.Search, single), (stubs.search.BatchSearch, batch)):
        error = refused(call, request)
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert fields(rich(error)) == ["k"]
        assert "10000" in error.details().replace(",", "")


def test_an_item_of_the_gallery_is_left_out_of_its_own_results(stubs: Stubs, filled: str) -> None:
    assert items(search(stubs, filled, stored(filled, "near"), k=2)) == ["tie-b", "tie-a"]
    batch = search_pb2.BatchSearchRequest(
        gallery=f"galleries/{filled}", queries=[stored(filled, "near"), vector(1, 0.1), stored(filled, "far")], k=10_000
    )
    first, second, third = stubs.search.BatchSearch(batch).results
    assert items(list(first.neighbors.neighbors)) == ["tie-b", "tie-a", "far"]
    assert items(list(second.neighbors.neighbors)) == ["near", "tie-b", "tie-a", "far"]
    assert items(list(third.neighbors.neighbors)) == ["tie-a", "tie-b", "near"]


def test_an_item_of_another_gallery_is_not_left_out(stubs: Stubs, filled: str) -> None:
    other = f"{filled}-other"
    stubs.fill(other, {"near": vector(1, 0.1)})
    assert items(search(stubs, filled, stored(other, "near"), k=1)) == ["near"]


def test_a_bad_query_fails_alone(stubs: Stubs, filled: str) -> None:
    queries = [
        vector(1),
        common_pb2.ImageInput(),
        common_pb2.ImageInput(encoded=png(1)[:40]),
        stored(filled, "nobody"),
        common_pb2.ImageInput(item="near"),
        common_pb2.ImageInput(embedding=b"1234"),
        encoded(1),
    ]
    request = search_pb2.BatchSearchRequest(gallery=f"galleries/{filled}", queries=queries, k=1)
    results = stubs.search.BatchSearch(request).results
    assert [result.WhichOneof("result") for result in results] == ["neighbors"] + 5 * ["error"] + ["neighbors"]
    assert [info(result.error).metadata["field"] for result in results[1:6]] == [
        "queries[1]",
        "queries[2].encoded",
        "queries[3].item",
        "queries[4].item",
        "queries[5].embedding",
    ]
    assert results[3].error.code == grpc.StatusCode.NOT_FOUND.value[0]


def test_metadata_comes_back_with_the_neighbour(stubs: Stubs, gallery: str) -> None:
    item = gallery_pb2.Item(name=f"galleries/{gallery}/items/one")
    metadata = {"size": 42, "tags": ["a", None, True], "more": {"ratio": 0.5}}
    json_format.ParseDict(metadata, item.metadata)
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
    stubs.galleries.BatchUpdateItems(
        gallery_pb2.BatchUpdateItemsRequest(
            parent=f"galleries/{gallery}",
            requests=[gallery_pb2.UpdateItemRequest(item=item, image=vector(1))],
            allow_missing=True,
        )
    )
    (neighbor,) = search(stubs, gallery, vector(1))
    assert json_format.MessageToDict(neighbor.metadata) == metadata
    assert neighbor.identity == ""


def test_an_empty_gallery_has_no_neighbours(stubs: Stubs, gallery: str) -> None:
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
    assert search(stubs, gallery, encoded(1)) == []


def test_a_batch_whose_answer_would_not_fit_in_memory_is_refused(
    stubs: Stubs, filled: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.questions.MAX_RESULTS", 7)
    request = search_pb2.BatchSearchRequest(gallery=f"galleries/{filled}", queries=2 * [vector(1)], k=3)
    assert len(stubs.search.BatchSearch(request).results) == 2
    request.k = 10_000
    assert fields(rich(refused(stubs.search.BatchSearch, request))) == ["k"]
