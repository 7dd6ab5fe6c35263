"""Answers are bounded by bytes: what a message does not carry ends with a typed error that says what to do, and counts
as one. Over the wire, with items whose metadata is a large part of what a message carries."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import pytest
from google.protobuf import field_mask_pb2
from structlog.testing import capture_logs

from index import Found
from lookalike.v1 import common_pb2, gallery_pb2, search_pb2
from service.server import Server
from service.settings import Settings
from tests.service.harness import (
    MAX_MESSAGE_BYTES,
    Loop,
    Stubs,
    connected,
    encoded,
    fields,
    info,
    refused,
    rich,
    served,
    vector,
)

LARGE, ITEMS = 60_000, 12  # characters of metadata, of which four items fill a message
NOTES = "g"


@pytest.fixture(scope="module")
def server(loop: Loop, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("large")
    with served(loop, settings.model_copy(update={"galleries": folder})) as server:
        yield server


@pytest.fixture(scope="module")
def stubs(server: Server) -> Iterator[Stubs]:
    with connected(server.address) as stubs:
        stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=NOTES))
        for i in range(ITEMS):
            item = gallery_pb2.Item(name=f"galleries/{NOTES}/items/{i:02}")
            item.metadata["note"] = chr(ord("a") + i) * LARGE
            stubs.galleries.UpdateItem(
                gallery_pb2.UpdateItemRequest(item=item, image=vector(1, 0.01 * i), allow_missing=True)
            )
        yield stubs


def without_metadata() -> field_mask_pb2.FieldMask:
    return field_mask_pb2.FieldMask(paths=["item", "decision"])


def search(k: int, **options: Any) -> search_pb2.SearchRequest:
    return search_pb2.SearchRequest(gallery=f"galleries/{NOTES}", query=vector(1), k=k, **options)


def batch(queries: int, k: int, **options: Any) -> search_pb2.BatchSearchRequest:
    return search_pb2.BatchSearchRequest(gallery=f"galleries/{NOTES}", queries=[vector(1)] * queries, k=k, **options)


def check_too_large(error: grpc.RpcError) -> None:
    status = rich(error)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert (info(status).reason, fields(status)) == ("RESPONSE_TOO_LARGE", ["k"])
    assert "read_mask" in status.message
    assert "lower k" in status.message


@pytest.mark.parametrize("encoded_query", [False, True])
def test_a_search(stubs: Stubs, encoded_query: bool) -> None:
    """On the event loop, together with others, and in the pool."""
    query = encoded(1) if encoded_query else vector(1)

    def ask(k: int, **options: Any) -> search_pb2.SearchResponse:
        request = search(k, **options)
        request.query.CopyFrom(query)
        return stubs.search.Search(request)

    for _ in range(2):  # read, and then as it was remembered
        found = ask(4)
        assert [len(each.metadata["note"]) for each in found.neighbors] == [LARGE] * 4
        for k in (5, 12, 10_000):
            request = search(k)
            request.query.CopyFrom(query)
            check_too_large(refused(stubs.search.Search, request))
        assert len(ask(10_000, read_mask=without_metadata()).neighbors) == ITEMS


def test_searches_that_are_answered_together_fail_alone(stubs: Stubs) -> None:
    calls = [stubs.search.Search.future(search(k)) for k in (2, 12) * 8]
    codes = [call.code() for call in calls]
    assert codes == [grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT] * 8


def test_what_was_found_for_a_refused_answer_is_freed_at_once(stubs: Stubs) -> None:
    """And not when the collector finds it, which may be long after it has added up."""

    def held() -> int:
        return sum(type(each) is Found for each in gc.get_objects())

    request = search(12)
    request.query.CopyFrom(encoded(1))
    gc.collect()
    gc.disable()
    try:
        before = held()
        for _ in range(8):
            refused(stubs.search.Search, request)
            refused(stubs.search.Search, search(12))
            refused(stubs.search.BatchSearch, batch(10, 12, filter="name:*"))
        stubs.search.Search(search(1))
        assert held() - before <= 10  # of the last call, which may not have ended quite
    finally:
        gc.enable()


def test_a_batch(stubs: Stubs) -> None:
    assert len(stubs.search.BatchSearch(batch(4, 1)).results) == 4
    check_too_large(refused(stubs.search.BatchSearch, batch(5, 1)))
    check_too_large(refused(stubs.search.BatchSearch, batch(10, 12)))
    found = stubs.search.BatchSearch(batch(10, 12, read_mask=without_metadata()))
    assert [len(each.neighbors.neighbors) for each in found.results] == [ITEMS] * 10


def test_a_batch_in_columns(stubs: Stubs) -> None:
    def asked(queries: int, k: int, **options: Any) -> search_pb2.BatchSearchRequest:
        return batch(queries, k, layout=search_pb2.BATCH_LAYOUT_COLUMNS, **options)

    found = stubs.search.BatchSearch(asked(4, 1)).columns
    assert [len(each["note"]) for each in found.metadata] == [LARGE] * 4
    check_too_large(refused(stubs.search.BatchSearch, asked(5, 1)))
    check_too_large(refused(stubs.search.BatchSearch, asked(10, 12)))
    found = stubs.search.BatchSearch(asked(10, 12, read_mask=without_metadata())).columns
    assert (list(found.counts), len(found.metadata)) == ([ITEMS] * 10, 0)
    check_too_large(refused(stubs.search.BatchSearch, asked(1024, 12, read_mask=without_metadata())))


def test_an_element_of_a_stream_fails_alone(stubs: Stubs) -> None:
    def requests(k: int) -> Iterator[search_pb2.StreamSearchRequest]:
        yield search_pb2.StreamSearchRequest(config=search_pb2.StreamSearchConfig(gallery=f"galleries/{NOTES}", k=k))
        for i in range(6):
            yield search_pb2.StreamSearchRequest(id=str(i), query=vector(1))
        queries = search_pb2.StreamSearchQueries(queries=[vector(1)] * 3)
        yield search_pb2.StreamSearchRequest(id="few", queries=queries)
        queries = search_pb2.StreamSearchQueries(queries=[vector(1)] * 5)
        yield search_pb2.StreamSearchRequest(id="many", queries=queries)
        yield search_pb2.StreamSearchRequest(id="last", query=vector(1))

    one = list(stubs.search.StreamSearch(requests(1)))
    assert [each.id for each in one] == [*"012345", "few", "many", "last"]
    assert [each.WhichOneof("result") for each in one] == 6 * ["neighbors"] + ["results", "error", "neighbors"]
    assert (info(one[7].error).reason, fields(one[7].error)) == ("RESPONSE_TOO_LARGE", ["config.k"])
    five = list(stubs.search.StreamSearch(requests(5)))
    assert [each.WhichOneof("result") for each in five] == 9 * ["error"]


def test_matches_are_all_sent_or_refused_before_the_first(stubs: Stubs, narrow: Callable[[str, int], None]) -> None:
    def matches(threshold: float, **options: Any) -> search_pb2.SearchMatchesRequest:
        point = common_pb2.OperatingPoint(threshold=threshold)
        return search_pb2.SearchMatchesRequest(
            gallery=f"galleries/{NOTES}", query=vector(1), operating_point=point, **options
        )

    responses = list(stubs.search.SearchMatches(matches(2.0)))
    assert responses[-1].summary.match_count == ITEMS
    assert [len(each.neighbors) for each in responses[:-1]] == [2] * (ITEMS // 2)
    narrow("answers", 2 * 9 * LARGE)
    assert list(stubs.search.SearchMatches(matches(2.0, limit=8)))[-1].summary.match_count == 8
    too_many = rich(refused(stubs.search.SearchMatches, matches(2.0)))
    assert (info(too_many).reason, fields(too_many)) == ("RESPONSE_TOO_LARGE", ["limit"])
    (first, _) = stubs.search.SearchMatches(matches(2.0, read_mask=without_metadata()))
    assert len(first.neighbors) == ITEMS


def test_a_page_of_items_ends_early(stubs: Stubs) -> None:
    names, sizes, token = [], [], ""
    while not names or token:
        page = stubs.galleries.ListItems(
            gallery_pb2.ListItemsRequest(parent=f"galleries/{NOTES}", page_size=1000, page_token=token)
        )
        assert page.ByteSize() <= MAX_MESSAGE_BYTES
        names += [item.name.rpartition("/")[2] for item in page.items]
        sizes.append(len(page.items))
        token = page.next_page_token
    assert names == [f"{i:02}" for i in range(ITEMS)]
    assert sizes == [4, 4, 4]


@pytest.mark.parametrize("size", [1, 3, 6, 100])
def test_pages_end_by_count_as_before(stubs: Stubs, size: int) -> None:
    names, token = [], ""
    while not names or token:
        page = stubs.galleries.ListItems(
            gallery_pb2.ListItemsRequest(
                parent=f"galleries/{NOTES}", page_size=size, page_token=token, read_mask=without("metadata")
            )
        )
        assert 1 <= len(page.items) <= size
        names += [item.name.rpartition("/")[2] for item in page.items]
        token = page.next_page_token
    assert names == [f"{i:02}" for i in range(ITEMS)]


def without(name: str) -> field_mask_pb2.FieldMask:
    every = [field.name for field in gallery_pb2.Item.DESCRIPTOR.fields]
    return field_mask_pb2.FieldMask(paths=[each for each in every if each != name])


@pytest.mark.parametrize("request_id", ["", "6fa459ea-ee8a-4ca4-894e-db77e160355e"])
def test_items_whose_answer_is_too_large(stubs: Stubs, request_id: str) -> None:
    """With a request id, as our clients send it, none of them is stored."""

    def identities() -> set[str]:
        page = stubs.galleries.ListItems(gallery_pb2.ListItemsRequest(parent=f"galleries/{NOTES}"))
        return {item.identity for item in page.items}

    before = identities()
    update = gallery_pb2.BatchUpdateItemsRequest(
        parent=f"galleries/{NOTES}",
        requests=[
            gallery_pb2.UpdateItemRequest(
                item=gallery_pb2.Item(name=f"galleries/{NOTES}/items/{i:02}", identity=f"new{request_id}"),
                update_mask=field_mask_pb2.FieldMask(paths=["identity"]),
            )
            for i in range(ITEMS)
        ],
        request_id=request_id,
    )
    status = rich(refused(stubs.galleries.BatchUpdateItems, update))
    assert info(status).reason == "RESPONSE_TOO_LARGE"
    assert ("nothing was stored" in status.message) == bool(request_id)
    assert identities() == (before if request_id else {"new"})


@pytest.fixture
def narrow(server: Server, stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, int], None]:
    """Lets messages of a server that runs, or all large answers together, hold fewer bytes."""

    def hold(name: str, value: int) -> None:
        target = {"message": (server._calls._limits, "message_bytes"), "answers": (answers(server), "_most_bytes")}
        held, attribute = target[name]
        monkeypatch.setitem(held.__dict__, attribute, value)

    return hold


def answers(server: Server) -> Any:
    return server._calls._limits.answers


def test_what_no_method_has_foreseen_is_an_error_and_counted_as_one(
    stubs: Stubs, narrow: Callable[[str, int], None]
) -> None:
    request = gallery_pb2.GetItemRequest(name=f"galleries/{NOTES}/items/00")
    assert len(stubs.galleries.GetItem(request).item.metadata["note"]) == LARGE
    narrow("message", LARGE)
    with capture_logs() as lines:
        error = refused(stubs.galleries.GetItem, request)
        assert info(rich(error)).reason == "RESPONSE_TOO_LARGE"
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        stubs.galleries.GetGallery(gallery_pb2.GetGalleryRequest(name=f"galleries/{NOTES}"))
    assert [line["code"] for line in lines if line.get("method", "").endswith("GetItem")] == ["INVALID_ARGUMENT"]


def test_answers_that_are_not_sent_yet_are_bounded_together(
    server: Server, stubs: Stubs, narrow: Callable[[str, int], None]
) -> None:
    room = answers(server)
    matches = search_pb2.SearchMatchesRequest(
        gallery=f"galleries/{NOTES}",
        query=vector(1),
        operating_point=common_pb2.OperatingPoint(threshold=2.0),
        limit=1,
    )
    with room.enter("another", 1, 200_000):
        narrow("answers", 210_000)
        small = stubs.search.Search(search(12, read_mask=without_metadata()))
        assert len(small.neighbors) == ITEMS
        assert info(rich(refused(stubs.search.Search, search(4)))).reason == "OVERLOADED"
        assert info(rich(refused(stubs.search.SearchMatches, matches))).reason == "OVERLOADED"
    assert len(stubs.search.Search(search(4)).neighbors) == 4
    assert list(stubs.search.SearchMatches(matches))[-1].summary.match_count == 1


def test_a_stream_waits_for_room_instead(
    loop: Loop, server: Server, stubs: Stubs, narrow: Callable[[str, int], None]
) -> None:
    room = answers(server)
    narrow("answers", 210_000)
    ticket = loop.run(_entered(room))

    def requests() -> Iterator[search_pb2.StreamSearchRequest]:
        yield search_pb2.StreamSearchRequest(config=search_pb2.StreamSearchConfig(gallery=f"galleries/{NOTES}", k=3))
        yield search_pb2.StreamSearchRequest(query=vector(1))

    responses = stubs.search.StreamSearch(requests())
    while not loop.run(_patient(room)):
        pass
    loop.run(_left(ticket))
    assert [len(each.neighbors.neighbors) for each in responses] == [3]


async def _entered(room: Any) -> Any:
    return room.enter("another", 1, 200_000)


async def _patient(room: Any) -> int:
    return int(room.patient)


async def _left(ticket: Any) -> None:
    ticket.close()


def test_room_is_given_back_when_an_answer_is_sent(loop: Loop, server: Server, stubs: Stubs) -> None:
    room = answers(server)
    for _ in range(3):
        stubs.search.Search(search(4))

    async def empty() -> None:
        while room.count:
            await asyncio.sleep(0)

    loop.run(empty())
    assert room.bytes == 0
