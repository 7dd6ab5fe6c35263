"""SearchMatches, which streams its answer, and StreamSearch, which streams both ways."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from index import Deadline, Gallery
from lookalike.v1 import common_pb2, gallery_pb2, search_pb2
from tests.service.harness import (
    MARGIN,
    MAX_MESSAGE_BYTES,
    Stubs,
    encoded,
    fields,
    info,
    png,
    refused,
    rich,
    stored,
    vector,
)


def fill(stubs: Stubs, gallery: str, count: int) -> None:
    stubs.fill(gallery, {f"item-{i:04}": vector(1, i / 1000) for i in range(count)})


def matches(stubs: Stubs, gallery: str, **options: object) -> list[search_pb2.SearchMatchesResponse]:
    request = search_pb2.SearchMatchesRequest(gallery=f"galleries/{gallery}", query=vector(1), **options)
    return list(stubs.search.SearchMatches(request))


def test_all_matches_come_nearest_first_over_several_messages(stubs: Stubs, gallery: str) -> None:
    fill(stubs, gallery, 1010)
    responses = matches(stubs, gallery, operating_point=common_pb2.OperatingPoint(threshold=2))
    found = [neighbor for response in responses for neighbor in response.neighbors]
    assert [neighbor.item.rpartition("/")[2] for neighbor in found] == [f"item-{i:04}" for i in range(1010)]
    assert len(responses) > 2
    assert [response.HasField("summary") for response in responses] == [False] * (len(responses) - 1) + [True]
    summary = responses[-1].summary
    assert (summary.match_count, summary.truncated, summary.expected_recall) == (1010, False, 1)
    assert summary.generation == 1


def test_matches_with_much_metadata_are_cut_into_messages_that_can_be_sent(stubs: Stubs, gallery: str) -> None:
    stubs.fill(gallery, {f"item-{i}": vector(1, i) for i in range(12)})
    for i in range(12):
        item = gallery_pb2.Item(name=f"galleries/{gallery}/items/item-{i}")
        item.metadata.update({"text": "x" * 60_000})
        mask = FieldMask(paths=["metadata"])
        stubs.galleries.UpdateItem(gallery_pb2.UpdateItemRequest(item=item, update_mask=mask))
    responses = matches(stubs, gallery, operating_point=common_pb2.OperatingPoint(threshold=2))
    assert [len(response.neighbors) for response in responses] == [2] * 6 + [0]
    assert max(response.ByteSize() for response in responses) < MAX_MESSAGE_BYTES


def test_only_what_lies_within_the_threshold_matches(stubs: Stubs, gallery: str) -> None:
    fill(stubs, gallery, 400)
    found = [neighbor for response in matches(stubs, gallery) for neighbor in response.neighbors]
    assert 0 < len(found) < 400
    assert all(neighbor.decision.verdict == common_pb2.VERDICT_MATCH for neighbor in found)
    assert max(neighbor.decision.distance for neighbor in found) <= MARGIN
    every = stubs.search.Search(search_pb2.SearchRequest(gallery=f"galleries/{gallery}", query=vector(1), k=400))
    assert list(every.neighbors)[: len(found)] == found
    assert every.neighbors[len(found)].decision.distance > MARGIN


def test_a_cut_answer_says_so(stubs: Stubs, gallery: str) -> None:
    fill(stubs, gallery, 5)
    cut, whole = matches(stubs, gallery, limit=4)[-1].summary, matches(stubs, gallery, limit=5)[-1].summary
    assert (cut.match_count, cut.truncated) == (4, True)
    assert (whole.match_count, whole.truncated) == (5, False)


def test_no_match_is_a_summary_alone(stubs: Stubs, gallery: str) -> None:
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
    (response,) = matches(stubs, gallery)
    assert response.HasField("summary")
    assert response.summary.match_count == 0


@pytest.mark.parametrize(
    ("request_", "code", "field"),
    [
        ({"gallery": "galleries/nowhere", "query": vector(1)}, "NOT_FOUND", None),
        ({"gallery": "nowhere", "query": vector(1)}, "INVALID_ARGUMENT", "gallery"),
        ({"gallery": "galleries/{}"}, "INVALID_ARGUMENT", "query"),
        ({"gallery": "galleries/{}", "query": vector(1), "limit": -1}, "INVALID_ARGUMENT", "limit"),
        ({"gallery": "galleries/{}", "query": vector(1), "limit": 100_001}, "INVALID_ARGUMENT", "limit"),
        (
            {"gallery": "galleries/{}", "query": common_pb2.ImageInput(encoded=b"no image")},
            "INVALID_ARGUMENT",
            "query.encoded",
        ),
        ({"gallery": "galleries/{}", "query": stored("nowhere", "x")}, "NOT_FOUND", None),
    ],
)
def test_ways_to_ask_wrongly(
    stubs: Stubs, gallery: str, request_: dict[str, object], code: str, field: str | None
) -> None:
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
    request_ = {**request_, "gallery": str(request_["gallery"]).format(gallery)}
    error = refused(stubs.search.SearchMatches, search_pb2.SearchMatchesRequest(**request_))
    assert error.code() is grpc.StatusCode[code]
    if field:
        assert fields(rich(error)) == [field]


# StreamSearch


def config(gallery: str, **options: object) -> search_pb2.StreamSearchRequest:
    return search_pb2.StreamSearchRequest(
        config=search_pb2.StreamSearchConfig(gallery=f"galleries/{gallery}", **options)
    )


def query(image: common_pb2.ImageInput, id_: str = "") -> search_pb2.StreamSearchRequest:
    return search_pb2.StreamSearchRequest(id=id_, query=image)


def test_a_stream_answers_in_order_and_as_search_does(stubs: Stubs, gallery: str) -> None:
    stubs.fill(gallery, {f"item-{i}": encoded(i) for i in range(8)})
    images = [encoded(i % 10) if i % 3 else stored(gallery, f"item-{i % 8}") for i in range(150)]
    sent = [config(gallery, k=3), *(query(image, str(i)) for i, image in enumerate(images))]
    responses = list(stubs.search.StreamSearch(iter(sent)))
    assert [response.id for response in responses] == [str(i) for i in range(150)]
    for response, image in zip(responses[:20], images, strict=False):
        alone = stubs.search.Search(search_pb2.SearchRequest(gallery=f"galleries/{gallery}", query=image, k=3))
        assert list(response.neighbors.neighbors) == list(alone.neighbors)
        assert response.neighbors.expected_recall == 1


def test_a_bad_element_is_answered_and_the_stream_goes_on(stubs: Stubs, gallery: str) -> None:
    stubs.fill(gallery, {"one": vector(1)})
    sent = [
        config(gallery),
        query(vector(1), "a"),
        query(common_pb2.ImageInput(encoded=png(1)[:40]), "b"),
        search_pb2.StreamSearchRequest(id="c"),
        config(gallery),
        query(stored(gallery, "nobody"), "e"),
        query(vector(1), "f" * 257),
        query(vector(0, 1), "g"),
    ]
    responses = list(stubs.search.StreamSearch(iter(sent)))
    assert [response.WhichOneof("result") for response in responses] == ["neighbors"] + 5 * ["error"] + ["neighbors"]
    assert [info(response.error).metadata["field"] for response in responses[1:6]] == [
        "query.encoded",
        "query",
        "config",
        "query.item",
        "id",
    ]
    assert responses[4].error.code == grpc.StatusCode.NOT_FOUND.value[0]
    assert responses[-1].id == "g"


def test_answers_come_before_the_stream_ends(stubs: Stubs, gallery: str) -> None:
    stubs.fill(gallery, {"one": vector(1)})
    answered = threading.Event()

    def sent() -> Iterator[search_pb2.StreamSearchRequest]:
        yield config(gallery)
        yield query(vector(1), "first")
        assert answered.wait(timeout=20)
        yield query(vector(1), "second")

    responses = stubs.search.StreamSearch(sent())
    assert next(responses).id == "first"
    answered.set()
    assert next(responses).id == "second"
    assert list(responses) == []


@pytest.mark.parametrize(
    ("first", "code", "field"),
    [
        (None, "INVALID_ARGUMENT", "config"),
        (query(vector(1)), "INVALID_ARGUMENT", "config"),
        (config("nowhere-at-all"), "NOT_FOUND", None),
        (config("Bad"), "INVALID_ARGUMENT", "config.gallery"),
        (config("{}", k=1001), "INVALID_ARGUMENT", "config.k"),
        (config("{}", k=-1), "INVALID_ARGUMENT", "config.k"),
        (config("{}", filter="x"), "INVALID_ARGUMENT", "config.filter"),
        (config("{}", operating_point=common_pb2.OperatingPoint(threshold=3)), "INVALID_ARGUMENT", None),
    ],
)
def test_a_stream_that_begins_wrongly_is_refused(
    stubs: Stubs, gallery: str, first: search_pb2.StreamSearchRequest | None, code: str, field: str | None
) -> None:
    stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=gallery))
    if first is not None and first.HasField("config"):
        first.config.gallery = first.config.gallery.format(gallery)
    error = refused(stubs.search.StreamSearch, iter([] if first is None else [first]))  # type: ignore[arg-type]
    assert error.code() is grpc.StatusCode[code]
    if field:
        assert fields(rich(error)) == [field]


def test_a_gallery_that_goes_away_ends_the_stream(stubs: Stubs, gallery: str) -> None:
    stubs.fill(gallery, {"one": vector(1)})
    deleted = threading.Event()

    def sent() -> Iterator[search_pb2.StreamSearchRequest]:
        yield config(gallery)
        yield query(vector(1))
        assert deleted.wait(timeout=20)
        yield query(vector(1))

    responses = stubs.search.StreamSearch(sent())
    next(responses)
    stubs.galleries.DeleteGallery(gallery_pb2.DeleteGalleryRequest(name=f"galleries/{gallery}", force=True))
    deleted.set()
    with pytest.raises(grpc.RpcError) as caught:
        next(responses)
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


def test_a_caller_who_leaves_ends_the_search(stubs: Stubs, gallery: str) -> None:
    stubs.fill(gallery, {"one": vector(1)})
    left = threading.Event()

    def sent() -> Iterator[search_pb2.StreamSearchRequest]:
        yield config(gallery)
        yield query(vector(1))
        left.wait(timeout=20)

    responses = stubs.search.StreamSearch(sent())
    next(responses)
    responses.cancel()
    left.set()
    assert len(stubs.search.Search(search_pb2.SearchRequest(gallery=f"galleries/{gallery}", query=vector(1))).neighbors)


@pytest.mark.parametrize("leaves", ["timeout", "cancel"])
@pytest.mark.parametrize("method", ["search", "matches"])
def test_a_search_that_nobody_waits_for_is_ended(
    stubs: Stubs, gallery: str, monkeypatch: pytest.MonkeyPatch, leaves: str, method: str
) -> None:
    stubs.fill(gallery, {"one": vector(1)})
    begun, ended = threading.Event(), threading.Event()

    def endless(self: Gallery, *_: object, deadline: Deadline, **__: object) -> None:
        begun.set()
        try:
            while True:
                deadline.check()
        finally:
            ended.set()

    monkeypatch.setattr(Gallery, method, endless)
    name = f"galleries/{gallery}"
    timeout = 1.0 if leaves == "timeout" else 60.0
    if method == "search":
        # One that reads metadata: a short one is answered at once, and nobody can leave it in the midst.
        request = search_pb2.SearchRequest(gallery=name, query=vector(1), filter="name:*")
        call = stubs.search.Search.future(request, timeout=timeout)
    else:
        call = stubs.search.SearchMatches(
            search_pb2.SearchMatchesRequest(gallery=name, query=vector(1)), timeout=timeout
        )
    assert begun.wait(timeout=20)
    if leaves == "cancel":
        call.cancel()
    assert ended.wait(timeout=20)
    assert call.code() is (grpc.StatusCode.CANCELLED if leaves == "cancel" else grpc.StatusCode.DEADLINE_EXCEEDED)


def test_several_images_of_an_element_are_answered_as_each_alone(stubs: Stubs, gallery: str) -> None:
    fill(stubs, gallery, 50)
    queries = [vector(1, i / 100) for i in range(300)]
    queries[7] = common_pb2.ImageInput(embedding=b"no vector")
    queries[9] = stored(gallery, "item-0003")
    config = search_pb2.StreamSearchConfig(gallery=f"galleries/{gallery}", k=3)

    def elements(sizes: list[int]) -> Iterator[search_pb2.StreamSearchRequest]:
        yield search_pb2.StreamSearchRequest(config=config)
        at = 0
        for n, size in enumerate(sizes):
            some = search_pb2.StreamSearchQueries(queries=queries[at : at + size])
            yield search_pb2.StreamSearchRequest(id=f"{n}", queries=some)
            at += size

    singly = [
        search_pb2.StreamSearchRequest(config=config),
        *(search_pb2.StreamSearchRequest(query=query) for query in queries),
    ]
    alone = list(stubs.search.StreamSearch(iter(singly)))
    together = list(stubs.search.StreamSearch(elements([1, 2, 41, 256])))
    assert [answer.id for answer in together] == ["0", "1", "2", "3"]
    results = [result for answer in together for result in answer.results.results]
    assert [len(answer.results.results) for answer in together] == [1, 2, 41, 256]
    for at, (answer, result) in enumerate(zip(alone, results, strict=True)):
        if at == 7:
            assert answer.error.code == result.error.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
            assert info(result.error).metadata["field"] == "queries.queries[4].embedding"
        else:
            assert answer.neighbors == result.neighbors


@pytest.mark.parametrize(("count", "k"), [(0, 1), (257, 1), (201, 1000)])
def test_an_element_of_too_many_images_fails_alone(stubs: Stubs, gallery: str, count: int, k: int) -> None:
    fill(stubs, gallery, 5)
    config = search_pb2.StreamSearchConfig(gallery=f"galleries/{gallery}", k=k)
    several = search_pb2.StreamSearchQueries(queries=[vector(1)] * count)
    elements = [
        search_pb2.StreamSearchRequest(config=config),
        search_pb2.StreamSearchRequest(id="many", queries=several),
        search_pb2.StreamSearchRequest(id="one", query=vector(1)),
    ]
    many, one = stubs.search.StreamSearch(iter(elements))
    assert (many.id, many.error.code) == ("many", grpc.StatusCode.INVALID_ARGUMENT.value[0])
    assert fields(many.error) == ["queries.queries"]
    assert (one.id, len(one.neighbors.neighbors)) == ("one", min(k, 5))
