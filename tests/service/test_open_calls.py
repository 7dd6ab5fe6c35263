"""Health checks and reflection, which anybody may ask for: what is sent slowly, or is far too large, is bounded."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from service.open_calls import AT_ONCE, MOST_BYTES, OF_ONE, OpenCalls
from service.server import Server
from tests.service.harness import Loop, connected, info, rich
from tests.service.test_before_the_request import Late, late

CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
REFLECT = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"
SERVING = health_pb2.HealthCheckResponse.SERVING
LIST = reflection_pb2.ServerReflectionRequest(list_services="")


class Arrivals(grpc.GenericRpcHandler):
    """Answers nothing, and counts the calls that come."""

    def __init__(self) -> None:
        self._come = threading.Semaphore(0)

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> None:
        self._come.release()

    def wait(self, calls: int) -> None:
        for _ in range(calls):
            assert self._come.acquire(timeout=20)


@dataclass(frozen=True)
class Answering:
    """A server that answers nothing else."""

    address: str
    elsewhere: str
    """A further address, of which callers are told from those of the first."""
    arrivals: Arrivals


@contextmanager
def answering(loop: Loop, folder: Path, seconds: float) -> Iterator[Answering]:
    """One that waits so long for a message."""
    arrivals, elsewhere = Arrivals(), f"unix:{folder}/socket"

    async def started() -> tuple[grpc.aio.Server, int]:
        calls, server = OpenCalls(seconds=seconds), grpc.aio.server()
        server.add_generic_rpc_handlers([arrivals])
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), calls.around(server))
        servicer: Any = reflection.aio.ReflectionServicer([health.SERVICE_NAME])
        add: Any = reflection_pb2_grpc.add_ServerReflectionServicer_to_server
        add(servicer, calls.around(server))
        server.add_insecure_port(elsewhere)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = loop.run(started())
    try:
        yield Answering(f"127.0.0.1:{port}", elsewhere, arrivals)
    finally:
        loop.run(server.stop(None))


def asked_for(channel: grpc.Channel, method: str, message: bytes) -> grpc.RpcError:
    """What a call with this message is refused with."""
    ask: Any = channel.stream_stream(method)
    with pytest.raises(grpc.RpcError) as caught:
        list(ask(iter([message]), timeout=20))
    return caught.value


def checked(channel: grpc.Channel) -> int:
    return int(health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=20).status)


@pytest.mark.parametrize("method", [CHECK, WATCH, REFLECT])
def test_a_message_that_names_more_than_a_service_is_refused(server: Server, method: str) -> None:
    with connected(server.address) as stubs:
        request = health_pb2.HealthCheckRequest(service="x" * MOST_BYTES)
        error = asked_for(stubs.channel, method, request.SerializeToString())
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert info(rich(error)).reason == "REQUEST_TOO_LARGE"


@pytest.mark.parametrize("method", [CHECK, WATCH, REFLECT])
def test_a_message_that_is_none_is_refused(server: Server, method: str) -> None:
    with connected(server.address) as stubs:
        assert info(rich(asked_for(stubs.channel, method, b"\xff"))).reason == "INVALID_INPUT"


@pytest.mark.parametrize("method", [CHECK, WATCH])
def test_a_call_without_a_message_is_told_so(server: Server, method: str) -> None:
    with late(server.address, method) as asked:
        asked.send(None)
        assert info(rich(asked.error())).reason == "NOT_SUPPORTED"


@pytest.mark.parametrize("method", [CHECK, WATCH])
def test_a_message_that_does_not_come_is_not_waited_for(loop: Loop, tmp_path: Path, method: str) -> None:
    with answering(loop, tmp_path, 0.05) as server, connected(server.address) as stubs:
        asked = Late(stubs.channel, method)
        with pytest.raises(grpc.RpcError) as caught:
            list(asked.call)
        assert info(rich(caught.value)).reason == "DEADLINE_EXCEEDED"
        asked.send(None)
        assert checked(stubs.channel) == SERVING


def test_a_reflection_that_falls_silent_ends_as_if_its_caller_had_ended_it(loop: Loop, tmp_path: Path) -> None:
    with answering(loop, tmp_path, 0.05) as server, late(server.address, REFLECT) as asked:
        asked.send(LIST.SerializeToString())
        assert len(list(asked.call)) == 1
        assert asked.call.code() is grpc.StatusCode.OK


def test_a_watch_goes_on_and_a_reflection_answers_each_message(server: Server) -> None:
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    with connected(server.address) as stubs:
        stub: Any = health_pb2_grpc.HealthStub(stubs.channel)
        watch = stub.Watch(health_pb2.HealthCheckRequest(), timeout=20)
        assert next(watch).status == SERVING
        reflecting: Any = reflection_pb2_grpc.ServerReflectionStub
        asked = reflecting(stubs.channel).ServerReflectionInfo(iter(messages.get, None))
        for _ in range(2):
            messages.put(LIST)
            assert next(asked).list_services_response.service
        messages.put(None)
        assert list(asked) == []
        assert checked(stubs.channel) == SERVING  # the watch, whose message was read, is in nobody's way
        watch.cancel()


def test_who_dawdles_holds_up_nobody_at_another_address(loop: Loop, tmp_path: Path) -> None:
    """All calls of one address share one turn, however many connections they come over."""
    with answering(loop, tmp_path, 600) as server, ExitStack() as stack:
        dawdlers = [stack.enter_context(late(server.address, CHECK)) for _ in range(3 * AT_ONCE)]
        server.arrivals.wait(len(dawdlers))
        with connected(server.elsewhere) as stubs:
            assert checked(stubs.channel) == SERVING
        for asked in dawdlers:
            asked.send(health_pb2.HealthCheckRequest().SerializeToString(), None)
        assert all(len(list(asked.call)) == 1 for asked in dawdlers)


def test_of_one_address_few_wait_and_more_are_refused(loop: Loop, tmp_path: Path) -> None:
    with answering(loop, tmp_path, 600) as server, connected(server.address) as stubs, ExitStack() as stack:
        for _ in range(OF_ONE):
            stack.enter_context(late(server.address, CHECK))
        server.arrivals.wait(OF_ONE)
        for method in (CHECK, WATCH):
            error = asked_for(stubs.channel, method, b"")
            assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert info(rich(error)).reason == "OVERLOADED"
        with connected(server.elsewhere) as others:
            assert checked(others.channel) == SERVING
