"""Calls that one worker passes on, and those that end with it: refused, or the one that answers is away."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from structlog.testing import capture_logs

from embedding.errors import CredentialsMissing
from lookalike.v1 import gallery_pb2
from service.access.rights import RULES
from service.call import REQUEST_ID, Call
from service.calls import Calls, Hook
from service.server import Server
from service.settings import Settings
from service.transport import channel_options
from service.workers.forwarding import Forwarding
from tests.service.harness import MAX_MESSAGE_BYTES, Loop, Stubs, connected, info, refused, rich

IMPORT = gallery_pb2.ImportItemsRequest()
GET = gallery_pb2.GetGalleryRequest(name="galleries/g")
LIST = gallery_pb2.ListGalleriesRequest()
METHODS = frozenset(method for method in RULES if "GalleryService" in method)


class Told(Hook):
    """The ends of calls that a worker observes itself."""

    def __init__(self) -> None:
        self.codes: list[grpc.StatusCode] = []
        self.ids: list[str] = []
        self._ended = threading.Semaphore(0)

    def ended(self, call: Call, code: grpc.StatusCode) -> None:
        self.codes.append(code)
        self.ids.append(call.request_id)
        self._ended.release()

    def code(self) -> grpc.StatusCode:
        assert self._ended.acquire(timeout=20)
        return self.codes[-1]


@contextmanager
def worker(
    loop: Loop, address: str, settings: Settings, judge: Callable[[Call], None] = lambda _: None
) -> Iterator[tuple[Stubs, Told]]:
    """A worker that passes on to the one at this address."""
    told = Told()

    async def started() -> tuple[grpc.aio.Server, Forwarding, int]:
        forwarding = Forwarding(address, METHODS, settings, calls=Calls([told]), judge=judge)
        server = grpc.aio.server(options=channel_options(settings))
        server.add_generic_rpc_handlers([forwarding])
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, forwarding, port

    server, forwarding, port = loop.run(started())
    try:
        with connected(f"127.0.0.1:{port}") as stubs:
            yield stubs, told
    finally:
        loop.run(server.stop(None))
        loop.run(forwarding.close())


@contextmanager
def ending_with_cancelled(loop: Loop, path: Path, trailing: tuple[tuple[str, str], ...]) -> Iterator[str]:
    """The address of one that ends every call as CANCELLED."""

    async def end(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        await context.abort(grpc.StatusCode.CANCELLED, "enough", trailing)

    class Handler(grpc.GenericRpcHandler):
        def service(self, _: grpc.HandlerCallDetails) -> Any:
            return grpc.stream_unary_rpc_method_handler(end)

    async def started() -> grpc.aio.Server:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers([Handler()])
        server.add_insecure_port(f"unix:{path}")
        await server.start()
        return server

    server = loop.run(started())
    try:
        yield f"unix:{path}"
    finally:
        loop.run(server.stop(None))


@pytest.mark.parametrize("streams", [False, True])
def test_a_worker_that_is_away_is_told_as_such(loop: Loop, settings: Settings, tmp_path: Path, streams: bool) -> None:
    """And not in gRPC's words, which name the socket and have no reason."""
    with worker(loop, f"unix:{tmp_path}/writer", settings) as (stubs, told), capture_logs() as logs:
        if streams:
            error = refused(lambda _: stubs.galleries.ImportItems(iter([IMPORT])), IMPORT)
        else:
            error = refused(stubs.galleries.GetGallery, GET)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert info(rich(error)).reason == "NOT_READY"
        assert str(tmp_path) not in (error.details() or "")
        assert "request_id" in (error.details() or "")
        assert told.code() is grpc.StatusCode.UNAVAILABLE
    assert dict(error.trailing_metadata())[REQUEST_ID] == told.ids[0]  # type: ignore[call-overload]
    (line,) = [line for line in logs if line["event"] == "call"]
    assert (line["code"], line["request_id"]) == ("UNAVAILABLE", told.ids[0])


def test_what_is_too_large_is_passed_on_to_be_refused(loop: Loop, settings: Settings, server: Server) -> None:
    large = gallery_pb2.Item(name=f"galleries/{'g' * MAX_MESSAGE_BYTES}/items/x")
    with worker(loop, server.address, settings) as (stubs, _):
        error = refused(stubs.galleries.UpdateItem, gallery_pb2.UpdateItemRequest(item=large))
    assert info(rich(error)).reason == "REQUEST_TOO_LARGE"


def test_who_may_not_call_is_refused_before_anything_is_read_or_passed_on(
    loop: Loop, settings: Settings, tmp_path: Path
) -> None:
    def judge(_: Call) -> None:
        raise CredentialsMissing("say who you are")

    never = threading.Event()

    def silent() -> Iterator[bytes]:
        never.wait(timeout=30)
        yield from ()

    # Nobody is there to pass on to: that would be told as UNAVAILABLE.
    with worker(loop, f"unix:{tmp_path}/writer", settings, judge) as (stubs, told), capture_logs() as logs:
        ask: Any = stubs.channel.stream_stream("/lookalike.v1.GalleryService/GetGallery")
        with pytest.raises(grpc.RpcError) as caught:
            list(ask(silent(), timeout=20))
        never.set()
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        assert info(rich(caught.value)).reason == "CREDENTIALS_MISSING"
        assert told.code() is grpc.StatusCode.UNAUTHENTICATED
    assert [line["code"] for line in logs if line["event"] == "call"] == ["UNAUTHENTICATED"]


def test_what_the_other_answers_it_observes_itself_under_the_same_id(
    loop: Loop, settings: Settings, server: Server
) -> None:
    ids = []
    with (
        worker(loop, server.address, settings, lambda call: ids.append(call.request_id)) as (stubs, told),
        capture_logs() as logs,
    ):
        _, call = stubs.galleries.ListGalleries.with_call(LIST)  # type: ignore[attr-defined]
        error = refused(stubs.galleries.GetGallery, GET)
        assert error.code() is grpc.StatusCode.NOT_FOUND
        unknown = stubs.channel.unary_unary("/lookalike.v1.GalleryService/Invented")
        assert refused(unknown, b"").code() is grpc.StatusCode.UNIMPLEMENTED  # type: ignore[arg-type]
    lines = [line for line in logs if line["event"] == "call"]
    assert [line["code"] for line in lines][:2] == ["OK", "NOT_FOUND"]
    assert dict(call.trailing_metadata())[REQUEST_ID] == lines[0]["request_id"]
    assert [line["request_id"] for line in lines] == ids
    assert not told.codes


def test_a_call_that_the_other_ends_as_cancelled_ends_so(loop: Loop, settings: Settings, tmp_path: Path) -> None:
    with (
        ending_with_cancelled(loop, tmp_path / "writer", ((REQUEST_ID, "x"),)) as address,
        worker(loop, address, settings) as (stubs, told),
    ):
        error = refused(lambda request: stubs.galleries.GetGallery(request, timeout=20), GET)
        assert (error.code(), error.details()) == (grpc.StatusCode.CANCELLED, "enough")
        assert told.codes == []


def test_a_call_that_grpc_cancels_there_is_told_as_to_try_again(loop: Loop, settings: Settings, tmp_path: Path) -> None:
    """Nobody looked at it: that server stops in this moment, or is too busy."""
    with (
        ending_with_cancelled(loop, tmp_path / "writer", ()) as address,
        worker(loop, address, settings) as (stubs, told),
    ):
        error = refused(lambda request: stubs.galleries.GetGallery(request, timeout=20), GET)
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert info(rich(error)).reason == "NOT_READY"
        assert told.code() is grpc.StatusCode.UNAVAILABLE


def test_a_call_that_was_given_up_before_the_other_heard_of_it_is_observed_here(
    loop: Loop, settings: Settings, tmp_path: Path
) -> None:
    path = tmp_path / "writer"
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()  # and never speaks
        with worker(loop, f"unix:{path}", settings) as (stubs, told):
            error = refused(lambda request: stubs.galleries.GetGallery(request, timeout=1), GET)
            assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert told.code() is grpc.StatusCode.DEADLINE_EXCEEDED
