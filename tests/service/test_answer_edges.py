"""Answers at the edge of what a message carries, many together, and calls that go while theirs are held."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import grpc
import pytest

from lookalike.v1 import common_pb2, gallery_pb2, search_pb2
from service.server import Server
from service.settings import Settings
from tests.service.harness import (
    MAX_MESSAGE_BYTES,
    Loop,
    Stubs,
    connected,
    encoded,
    info,
    refused,
    rich,
    served,
    vector,
)

NOTES = "g"
ITEMS, LARGE = 12, 20_000


QUERY = vector(1, -0.3)
"""Like none of the items: a distance of 0 is sent, and not counted by who reads it."""


@pytest.fixture(scope="module")
def server(loop: Loop, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    own = {"galleries": tmp_path_factory.mktemp("edges"), "max_answer_bytes": 3 * MAX_MESSAGE_BYTES}
    with served(loop, settings.model_copy(update=own)) as server:
        yield server


@pytest.fixture(scope="module")
def stubs(server: Server) -> Iterator[Stubs]:
    with connected(server.address) as stubs:
        stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id=NOTES))
        for i in range(ITEMS):
            put(stubs, f"{i:02}", LARGE, vector(1, 0.01 * i))
        yield stubs


def put(stubs: Stubs, name: str, size: int, image: common_pb2.ImageInput) -> None:
    item = gallery_pb2.Item(name=f"galleries/{NOTES}/items/{name}")
    item.metadata["note"] = "n" * size
    stubs.galleries.UpdateItem(gallery_pb2.UpdateItemRequest(item=item, image=image, allow_missing=True))


def search(**options: Any) -> search_pb2.SearchRequest:
    return search_pb2.SearchRequest(gallery=f"galleries/{NOTES}", query=QUERY, **options)


def streamed(stubs: Stubs, *, k: int) -> Any:
    requests = [
        search_pb2.StreamSearchRequest(config=search_pb2.StreamSearchConfig(gallery=f"galleries/{NOTES}", k=k)),
        search_pb2.StreamSearchRequest(id="one", query=QUERY),
    ]
    (answer,) = stubs.search.StreamSearch(iter(requests))
    return answer


def by_image(stubs: Stubs) -> search_pb2.SearchResponse:
    request = search(k=ITEMS)
    request.query.CopyFrom(encoded(1))
    return stubs.search.Search(request)


def in_a_batch(stubs: Stubs) -> search_pb2.BatchSearchResponse:
    return stubs.search.BatchSearch(
        search_pb2.BatchSearchRequest(gallery=f"galleries/{NOTES}", queries=[QUERY], k=ITEMS)
    )


ASKED: dict[str, Callable[[Stubs], Any]] = {
    "Search on the event loop": lambda stubs: stubs.search.Search(search(k=ITEMS)),
    "Search in the pool": by_image,
    "BatchSearch": in_a_batch,
    "StreamSearch": lambda stubs: streamed(stubs, k=ITEMS),
}


@pytest.mark.parametrize("way", ASKED)
def test_exactly_what_a_message_carries_is_sent_and_one_byte_more_is_not(stubs: Stubs, way: str) -> None:
    """By the true limit of the server's messages, not one of its own below it."""
    ask, last = ASKED[way], f"{ITEMS - 1:02}"
    size = LARGE
    for _ in range(3):  # lengths of lengths may change once
        put(stubs, last, size, vector(1, 0.01 * ITEMS))
        size += MAX_MESSAGE_BYTES - ask(stubs).ByteSize()
    answer = ask(stubs)
    assert answer.ByteSize() == MAX_MESSAGE_BYTES
    for more in (1, 2, 1000):
        put(stubs, last, size + more, vector(1, 0.01 * ITEMS))
        if way == "StreamSearch":
            assert info(streamed(stubs, k=ITEMS).error).reason == "RESPONSE_TOO_LARGE"
        else:
            assert info(rich(refused(ask, stubs))).reason == "RESPONSE_TOO_LARGE"  # type: ignore[arg-type]
    put(stubs, last, LARGE, vector(1, 0.01 * ITEMS))


def test_the_room_of_answers_at_its_edge(loop: Loop, server: Server) -> None:
    room = server._calls._limits.answers
    assert room is not None
    assert room.most_bytes is not None
    most = room.most_bytes
    assert nothing_held(loop, server)  # of calls whose answers have just come

    async def fill() -> None:
        with room.enter("a", 1, most - 1000):
            for size, fits in ((1000, True), (1001, False)):
                if fits:
                    room.enter("b", 1, size).close()
                else:
                    with pytest.raises(Exception, match="busy"):
                        room.enter("b", 1, size)
        room.enter("a", 1, 10 * most).close()  # an empty room takes anything

    loop.run(fill())
    assert (room.count, room.bytes) == (0, 0)


def matches() -> search_pb2.SearchMatchesRequest:
    return search_pb2.SearchMatchesRequest(
        gallery=f"galleries/{NOTES}", query=QUERY, operating_point=common_pb2.OperatingPoint(threshold=2.0)
    )


def test_answers_that_go_over_the_bound_together_are_refused_and_leave_nothing(
    loop: Loop, server: Server, stubs: Stubs
) -> None:
    together = threading.Barrier(24)

    def ask(number: int) -> str:
        together.wait(timeout=30)
        try:
            if number % 3:
                stubs.search.Search(search(k=ITEMS))
            else:
                list(stubs.search.SearchMatches(matches()))
        except grpc.RpcError as error:
            return info(rich(error)).reason
        return "OK"

    with ThreadPoolExecutor(24) as pool:
        for _ in range(3):
            assert set(pool.map(ask, range(24))) <= {"OK", "OVERLOADED"}
    assert nothing_held(loop, server)


def test_the_accounts_return_to_nothing_after_cancelled_calls(loop: Loop, server: Server, stubs: Stubs) -> None:
    draw = random.Random(20_261_125)
    for _ in range(12):
        calls: list[Any] = [stubs.search.Search.future(search(k=ITEMS)) for _ in range(4)]
        calls += [stubs.search.SearchMatches(matches()) for _ in range(3)]
        for number, stream in enumerate(calls[4:]):  # read a little, or not at all
            with suppress(grpc.RpcError, StopIteration):
                for _ in range(number):
                    next(stream)
        draw.shuffle(calls)
        for call in calls[: draw.randrange(4, 8)]:
            call.cancel()
        for call in calls:
            with suppress(grpc.RpcError, grpc.FutureCancelledError):
                call.result() if hasattr(call, "result") and not hasattr(call, "__next__") else list(call)
    assert nothing_held(loop, server)
    assert len(stubs.search.Search(search(k=ITEMS)).neighbors) == ITEMS


def nothing_held(loop: Loop, server: Server) -> bool:
    """Once the calls that were cancelled have ended here too."""
    limits = server._calls._limits
    rooms = [limits.answers, server._serving.current.pool.room, server._serving.current.batcher.room]

    async def empty() -> bool:
        for room in rooms:
            while room is not None and (room.count or room.bytes or room._held or room.patient):
                await asyncio.sleep(0.01)
        await server._accepted.finished()
        return limits.stream_bytes.held == 0 if hasattr(limits.stream_bytes, "held") else True

    return loop.run(asyncio.wait_for(_of(empty), 30))


async def _of(work: Callable[[], Any]) -> bool:
    return bool(await work())
