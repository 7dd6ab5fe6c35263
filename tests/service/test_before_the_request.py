"""Calls of one message are judged by their metadata, before the message is read: here it is never sent, or late."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from lookalike.v1 import common_pb2, gallery_pb2, match_pb2
from service.access.key_ring import KeyRing
from service.call import Call
from service.calls import Hook
from service.server import Server
from service.settings import Settings
from tests.service.harness import MAX_MESSAGE_BYTES, Loop, connected, info, refused, rich, served, vector

EMBED = "/lookalike.v1.MatchService/Embed"
STREAM = "/lookalike.v1.MatchService/StreamVerify"
MATCHES = "/lookalike.v1.SearchService/SearchMatches"
CREATE = "/lookalike.v1.GalleryService/CreateGallery"
REQUEST = match_pb2.EmbedRequest(image=vector(1.0)).SerializeToString()


class Late:
    """A call whose messages are sent as they are given, and that ends sending when told to."""

    def __init__(self, channel: grpc.Channel, method: str, key: str = "") -> None:
        self._sent = threading.Semaphore(0)
        self._messages: list[bytes | None] = []
        metadata = (("authorization", f"Bearer {key}"),) if key else ()
        ask: Any = channel.stream_stream(method)
        self.call = ask(self._requests(), metadata=metadata, timeout=30)

    def _requests(self) -> Iterator[bytes]:
        while True:
            assert self._sent.acquire(timeout=30)
            message = self._messages.pop(0)
            if message is None:
                return
            yield message

    def send(self, *messages: bytes | None) -> None:
        self._messages += messages
        for _ in messages:
            self._sent.release()

    def error(self) -> grpc.RpcError:
        with pytest.raises(grpc.RpcError) as caught:
            list(self.call)
        assert caught.value.code() is not grpc.StatusCode.DEADLINE_EXCEEDED
        return caught.value


@contextmanager
def late(address: str, method: str, key: str = "") -> Iterator[Late]:
    with connected(address) as stubs:
        asked = Late(stubs.channel, method, key)
        try:
            yield asked
        finally:
            asked.call.cancel()
            asked.send(None)


class Seen(Hook):
    """The calls of a server, and how each ended."""

    def __init__(self) -> None:
        self.begun_calls: list[Call] = []
        self.codes: list[grpc.StatusCode] = []
        self._begun, self._ended = threading.Semaphore(0), threading.Semaphore(0)

    def begun(self, call: Call) -> None:
        self.begun_calls.append(call)
        self._begun.release()

    def ended(self, call: Call, code: grpc.StatusCode) -> None:
        self.codes.append(code)
        self._ended.release()

    def next(self) -> Call:
        assert self._begun.acquire(timeout=20)
        return self.begun_calls[-1]

    def code(self) -> grpc.StatusCode:
        assert self._ended.acquire(timeout=20)
        return self.codes[-1]


@pytest.fixture
def ring(tmp_path: Path) -> KeyRing:
    return KeyRing(tmp_path / "keys.json")


@pytest.fixture
def guarded(loop: Loop, settings: Settings, ring: KeyRing, tmp_path: Path) -> Iterator[Server]:
    ring.create("shop", scopes=["read"], galleries=["*"])
    own = {"keys": tmp_path / "keys.json", "galleries": tmp_path / "galleries"}
    with served(loop, settings.model_copy(update=own)) as server:
        yield server


@pytest.fixture
def seen(loop: Loop, settings: Settings, tmp_path: Path) -> Iterator[tuple[Server, Seen]]:
    """A server that takes two calls, and what it is told of them."""
    few = settings.model_copy(update={"galleries": tmp_path / "galleries", "max_calls": 2, "max_request_bytes": 4096})
    with served(loop, few) as server:
        seen = Seen()
        server._calls._hooks = (seen, *server._calls._hooks)
        yield server, seen


@pytest.mark.parametrize("method", [EMBED, MATCHES, CREATE])
def test_who_shows_no_credentials_is_refused(guarded: Server, method: str) -> None:
    with late(guarded.address, method) as asked:
        error = asked.error()
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert info(rich(error)).reason == "CREDENTIALS_MISSING"


def test_who_lacks_the_scope_or_has_no_call_left_is_refused(guarded: Server, ring: KeyRing) -> None:
    _, reader = ring.create("reader", scopes=["read"], galleries=["*"], per_second=0.001, burst=1)
    reasons = []
    for method in (CREATE, EMBED):
        with late(guarded.address, method, reader) as asked:
            reasons.append(info(rich(asked.error())).reason)
    assert reasons == ["SCOPE_MISSING", "RATE_LIMITED"]


def test_calls_and_bytes_beyond_the_room_are_refused(seen: tuple[Server, Seen]) -> None:
    server, hook = seen
    with ExitStack() as stack:
        for _ in range(2):
            stack.enter_context(late(server.address, EMBED))
            hook.next()
        with late(server.address, EMBED) as asked:
            assert info(rich(asked.error())).reason == "OVERLOADED"
    with server._calls._hooks[-2].requests.enter("another", 1, 4096):  # type: ignore[attr-defined]
        while True:
            with late(server.address, MATCHES) as asked:
                error = asked.error()
                if "requests" in (error.details() or ""):
                    break  # the calls before have ended
    assert info(rich(error)).reason == "OVERLOADED"


@pytest.mark.parametrize("method", [EMBED, MATCHES])
def test_a_call_without_a_message_is_told_so_and_one_with_several_is_answered_for_the_first(
    seen: tuple[Server, Seen], method: str
) -> None:
    server, hook = seen
    with late(server.address, method) as asked:
        asked.send(None)
        error = asked.error()
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert info(rich(error)).reason == "NOT_SUPPORTED"
    assert hook.code() is grpc.StatusCode.UNIMPLEMENTED
    with late(server.address, EMBED) as asked:
        asked.send(REQUEST, b"\xff", REQUEST)
        assert len(list(asked.call)) == 1
    assert hook.code() is grpc.StatusCode.OK


def test_a_call_that_is_given_up_before_its_message_has_come_is_told_as_cancelled(seen: tuple[Server, Seen]) -> None:
    server, hook = seen
    with late(server.address, EMBED) as asked:
        hook.next()
        asked.call.cancel()
        assert hook.code() is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize("method", [EMBED, MATCHES])
def test_a_message_that_does_not_come_is_not_waited_for(
    loop: Loop, settings: Settings, tmp_path: Path, method: str
) -> None:
    """And the place among `max_calls` is another's again."""
    hurried = {"galleries": tmp_path / "galleries", "max_calls": 1, "max_message_seconds": 0.2}
    with served(loop, settings.model_copy(update=hurried)) as server, connected(server.address) as stubs:
        hook = Seen()
        server._calls._hooks = (hook, *server._calls._hooks)
        with late(server.address, method) as asked, pytest.raises(grpc.RpcError) as caught:
            list(asked.call)
        assert info(rich(caught.value)).reason == "DEADLINE_EXCEEDED"
        assert hook.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert stubs.match.Embed(match_pb2.EmbedRequest(image=vector(1.0))).model


def test_a_stream_may_be_silent_for_longer(loop: Loop, settings: Settings, tmp_path: Path) -> None:
    hurried = {"galleries": tmp_path / "galleries", "max_message_seconds": 0.2}
    with served(loop, settings.model_copy(update=hurried)) as server, late(server.address, STREAM) as silent:
        with late(server.address, EMBED) as asked, pytest.raises(grpc.RpcError):
            list(asked.call)  # one that is not, and that came later, has ended by now
        silent.send(None)
        assert info(rich(silent.error())).reason == "INVALID_INPUT"  # it ends, and had no config


def test_what_grpc_refuses_by_its_length_it_answers_itself(seen: tuple[Server, Seen]) -> None:
    server, hook = seen
    with connected(server.address) as stubs:
        large = common_pb2.ImageInput(encoded=bytes(3 * MAX_MESSAGE_BYTES))
        error = refused(stubs.match.Embed, match_pb2.EmbedRequest(image=large))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "larger than max" in (error.details() or "")
    assert hook.code() is grpc.StatusCode.CANCELLED


@pytest.mark.parametrize(
    ("method", "request_"),
    [(EMBED, REQUEST), (CREATE, gallery_pb2.CreateGalleryRequest(gallery_id="g").SerializeToString())],
)
def test_what_a_caller_takes_to_send_a_message_is_no_time_of_the_call(
    seen: tuple[Server, Seen], method: str, request_: bytes
) -> None:
    server, hook = seen
    with late(server.address, method) as asked:
        call = hook.next()
        before = time.perf_counter()
        assert call.started < before
        asked.send(request_, None)
        assert len(list(asked.call)) == 1
    assert hook.code() is grpc.StatusCode.OK
    assert call.started > before


def test_the_answer_and_its_metadata_are_those_of_a_call_of_one_message(seen: tuple[Server, Seen]) -> None:
    server, _ = seen
    with connected(server.address) as stubs:
        embed: Callable[..., Any] = stubs.match.Embed.with_call
        answer, call = embed(match_pb2.EmbedRequest(image=vector(1.0)), metadata=(("x-request-id", "mine"),))
    assert answer.model.startswith("models/toy")
    assert call.trailing_metadata() == (("x-request-id", "mine"),)
    assert call.code() is grpc.StatusCode.OK
