"""What hooks are told of a call, over the wire: in which order, with what, and what their refusal does to it."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
import weakref
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from structlog.testing import capture_logs

from embedding.errors import Busy, InvalidInput, NotFound
from lookalike.v1 import common_pb2, match_pb2, match_pb2_grpc, search_pb2, search_pb2_grpc
from service.call import CURRENT, Call
from service.calls import Calls, Hook
from service.errors import translated_errors
from tests.service.harness import Loop, info, refused, rich

EMBED = match_pb2.EmbedRequest(image=common_pb2.ImageInput(item="galleries/a/items/b"))


class Kept:
    """What a servicer holds while it answers."""


@dataclass
class Told:
    """What the hooks of one server were told, in order."""

    lines: list[tuple[Any, ...]] = field(default_factory=list)
    ended: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    """Released at each end of a call that the first hook is told of: a caller may have its answer before."""

    def after(self, calls: int = 1) -> list[tuple[Any, ...]]:
        for _ in range(calls):
            assert self.ended.acquire(timeout=10)
        lines, self.lines = self.lines, []
        return lines


class Recorder(Hook):
    """Tells what it is told, and raises what it was given to raise."""

    def __init__(self, name: str, told: Told, *, first: bool = False) -> None:
        self._name, self._told, self._first = name, told, first
        self.raises_begun: Exception | None = None
        self.raises_received: Exception | None = None

    def begun(self, call: Call) -> None:
        assert CURRENT.get() is call
        self._told.lines.append((self._name, "begun", call.method.rpartition("/")[2]))
        if self.raises_begun is not None:
            raise self.raises_begun

    def received(self, call: Call, request: Message) -> None:
        self._told.lines.append((self._name, "received", getattr(request, "id", type(request).__name__)))
        if self.raises_received is not None and getattr(request, "id", "bad") == "bad":
            raise self.raises_received

    def ended(self, call: Call, code: grpc.StatusCode) -> None:
        self._told.lines.append((self._name, "ended", code))
        if self._first:
            self._told.ended.release()


class Quiet(Hook):
    """Is told of beginning and end alone."""

    def __init__(self, told: Told) -> None:
        self._told = told

    def begun(self, call: Call) -> None:
        self._told.lines.append(("quiet", "begun"))

    def ended(self, call: Call, code: grpc.StatusCode) -> None:
        self._told.lines.append(("quiet", "ended", code))


class Match(match_pb2_grpc.MatchServiceServicer):
    """Answers, or fails as it is told to."""

    fails: Exception | None = None
    waits = threading.Event()
    served: int = 0
    kept: weakref.ref[Kept] | None = None

    async def Embed(self, request: match_pb2.EmbedRequest, context: Any) -> match_pb2.EmbedResponse:  # noqa: N802
        async with translated_errors(context):
            self.served += 1
            kept = Kept()
            self.kept = weakref.ref(kept)
            if self.fails is not None:
                raise self.fails
            if request.image.item == "wait":
                self.waits.set()
                await asyncio.sleep(60)
            return match_pb2.EmbedResponse(model="models/m")


class Search(search_pb2_grpc.SearchServiceServicer):
    async def SearchMatches(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async with translated_errors(context):
            if request.gallery == "wait":
                await asyncio.sleep(60)
            for _ in range(2):
                yield search_pb2.SearchMatchesResponse()

    async def StreamSearch(self, requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:  # noqa: N802
        async with translated_errors(context):
            async for request in requests:
                yield search_pb2.StreamSearchResponse(id=request.id)


@dataclass
class Served:
    told: Told
    a: Recorder
    b: Recorder
    servicer: Match
    match: match_pb2_grpc.MatchServiceStub
    search: search_pb2_grpc.SearchServiceStub


@pytest.fixture
def served(loop: Loop) -> Iterator[Served]:
    told = Told()
    a, b = Recorder("a", told, first=True), Recorder("b", told)
    calls, servicer = Calls([a, Quiet(told), b]), Match()

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        observed = calls.around(server)
        match_pb2_grpc.add_MatchServiceServicer_to_server(servicer, observed)
        search_pb2_grpc.add_SearchServiceServicer_to_server(Search(), observed)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = loop.run(start())
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        match, search = match_pb2_grpc.MatchServiceStub(channel), search_pb2_grpc.SearchServiceStub(channel)
        yield Served(told, a, b, servicer, match, search)
    loop.run(server.stop(0))


def around(method: str, *received: str, code: grpc.StatusCode = grpc.StatusCode.OK) -> list[tuple[Any, ...]]:
    """What is told of a call that nobody refuses."""
    return [
        ("a", "begun", method),
        ("quiet", "begun"),
        ("b", "begun", method),
        *((name, "received", each) for each in received for name in ("a", "b")),
        *((name, "ended", code) for name in ("b", "quiet", "a")),
    ]


def test_hooks_are_told_in_order_and_of_the_end_in_the_opposite_one(served: Served) -> None:
    served.match.Embed(EMBED)
    assert served.told.after() == around("Embed", "EmbedRequest")


def test_of_a_stream_of_answers_the_one_request_is_told(served: Served) -> None:
    assert len(list(served.search.SearchMatches(search_pb2.SearchMatchesRequest()))) == 2
    assert served.told.after() == around("SearchMatches", "SearchMatchesRequest")


def test_of_a_stream_of_requests_each_is_told(served: Served) -> None:
    requests = [search_pb2.StreamSearchRequest(id=name) for name in ("x", "y", "z")]
    assert [answer.id for answer in served.search.StreamSearch(iter(requests))] == ["x", "y", "z"]
    assert served.told.after() == around("StreamSearch", "x", "y", "z")


def test_the_end_is_told_with_the_code_of_the_answer(served: Served) -> None:
    served.servicer.fails = NotFound("no such item", field="image.item")
    assert refused(served.match.Embed, EMBED).code() is grpc.StatusCode.NOT_FOUND
    assert served.told.after() == around("Embed", "EmbedRequest", code=grpc.StatusCode.NOT_FOUND)


def test_the_end_of_a_call_that_was_given_up_is_told(served: Served) -> None:
    call = served.match.Embed.future(match_pb2.EmbedRequest(image=common_pb2.ImageInput(item="wait")))
    assert served.servicer.waits.wait(timeout=10)
    call.cancel()
    assert served.told.after() == around("Embed", "EmbedRequest", code=grpc.StatusCode.CANCELLED)


@pytest.mark.parametrize("seconds", [0.2, 1.001, 1.5])  # from one second on, gRPC rounds what travels up to 10 ms
def test_a_call_that_ended_by_its_deadline_is_told_and_logged_so(served: Served, seconds: float) -> None:
    request = match_pb2.EmbedRequest(image=common_pb2.ImageInput(item="wait"))
    late = grpc.StatusCode.DEADLINE_EXCEEDED
    with capture_logs() as logs:
        assert refused(partial(served.match.Embed, timeout=seconds), request).code() is late
        assert served.told.after() == around("Embed", "EmbedRequest", code=late)
        matches = search_pb2.SearchMatchesRequest(gallery="wait")
        assert refused(partial(served.search.SearchMatches, timeout=seconds), matches).code() is late
        assert served.told.after() == around("SearchMatches", "SearchMatchesRequest", code=late)
        served.match.Embed(EMBED)  # which the loop serves once it has logged those before
    assert [line["code"] for line in logs if line["event"] == "call"][:2] == [late.name, late.name]


def test_a_call_that_was_given_up_before_its_deadline_is_told_as_cancelled(served: Served) -> None:
    request = match_pb2.EmbedRequest(image=common_pb2.ImageInput(item="wait"))
    served.servicer.waits.clear()
    call = served.match.Embed.future(request, timeout=20)
    assert served.servicer.waits.wait(timeout=10)
    call.cancel()
    assert served.told.after() == around("Embed", "EmbedRequest", code=grpc.StatusCode.CANCELLED)


def test_who_refuses_at_the_beginning_ends_the_call_with_a_rich_status_before_the_next_is_told(served: Served) -> None:
    served.a.raises_begun = Busy("not now")
    error = refused(served.match.Embed, EMBED)
    assert (error.code(), error.details()) == (grpc.StatusCode.UNAVAILABLE, "not now")
    assert info(rich(error)).reason == "BUSY"
    assert served.servicer.served == 0
    assert served.told.after() == [("a", "begun", "Embed"), ("a", "ended", grpc.StatusCode.UNAVAILABLE)]


def test_all_that_were_told_of_the_beginning_are_told_of_the_end(served: Served) -> None:
    served.b.raises_begun = Busy("not now")
    refused(served.match.Embed, EMBED)
    code = grpc.StatusCode.UNAVAILABLE
    assert served.told.after() == around("Embed", code=code)


@pytest.mark.parametrize("method", ["Embed", "SearchMatches"])
def test_who_refuses_a_request_ends_the_call_with_a_rich_status(served: Served, method: str) -> None:
    served.a.raises_received = InvalidInput("not this", field="x")
    call, request = {
        "Embed": (served.match.Embed, EMBED),
        "SearchMatches": (served.search.SearchMatches, search_pb2.SearchMatchesRequest()),
    }[method]
    error = refused(call, request)
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert info(rich(error)).metadata["field"] == "x"
    assert served.servicer.served == 0
    code = grpc.StatusCode.INVALID_ARGUMENT
    told = [line for line in around(method, type(request).__name__, code=code) if line[:2] != ("b", "received")]
    assert served.told.after() == told


def test_who_refuses_an_element_of_a_stream_ends_it_there(served: Served) -> None:
    served.b.raises_received = InvalidInput("not this")
    requests = iter([search_pb2.StreamSearchRequest(id=name) for name in ("x", "bad", "never")])
    answers = served.search.StreamSearch(requests)
    assert next(answers).id == "x"
    with pytest.raises(grpc.RpcError) as caught:
        next(answers)
    assert info(rich(caught.value)).reason == "INVALID_INPUT"
    code = grpc.StatusCode.INVALID_ARGUMENT
    assert served.told.after() == around("StreamSearch", "x", "bad", code=code)


def test_a_hook_that_breaks_is_no_open_door(served: Served) -> None:
    served.a.raises_begun = RuntimeError("a bug")
    error = refused(served.match.Embed, EMBED)
    assert error.code() is grpc.StatusCode.INTERNAL
    assert "a bug" not in str(error)
    assert served.servicer.served == 0


def test_a_call_that_failed_holds_nothing_that_it_had(served: Served) -> None:
    """Requests and answers are large: the collector may come by only after hundreds of them."""
    served.servicer.fails = NotFound("no such item")
    gc.collect()
    gc.disable()
    try:
        refused(served.match.Embed, EMBED)
        served.told.after()
        patience = time.monotonic() + 10
        while served.servicer.kept is not None and served.servicer.kept() is not None:  # gRPC ends it after we did
            assert time.monotonic() < patience
    finally:
        gc.enable()
