"""A server's life: loading, serving, draining, being killed, and what keeps it from starting."""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from embedding.encoder import Encoder
from embedding.errors import Busy, InvalidInput, LookalikeError, NotFound
from lookalike.v1 import match_pb2
from service import accepted
from service.batching import workbench
from service.server import SERVICES, Server
from service.settings import Settings
from tests.service.harness import Loop, Stubs, connected, encoded, info, refused, rich, served

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING
VERIFY = match_pb2.VerifyRequest(a=encoded(1), b=encoded(2))


@pytest.fixture
def own(settings: Settings, tmp_path: Path) -> Settings:
    """Settings with a folder of galleries that no other server uses."""
    return settings.model_copy(update={"galleries": tmp_path / "galleries"})


class Held:
    """Makes a method of the encoder wait until it is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.entered = threading.Event()
        self.let_go = threading.Event()
        original = getattr(Encoder, method)

        def held(*args: object) -> object:
            self.entered.set()
            assert self.let_go.wait(timeout=20)
            return original(*args)

        monkeypatch.setattr(Encoder, method, held)
        monkeypatch.setattr(workbench, "INSTANT_SECONDS", 0.0)  # or it would wait on the event loop


async def made(settings: Settings) -> Server:
    return Server(settings)


def health(stubs: Stubs, service: str = "") -> int:
    check = health_pb2_grpc.HealthStub(stubs.channel).Check
    return check(health_pb2.HealthCheckRequest(service=service)).status


def test_health_turns_serving_only_when_the_model_is_warm(
    loop: Loop, own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(monkeypatch, "warm_up")
    server = loop.run(made(own))
    starting = loop.start(server.start())
    try:
        assert held.entered.wait(timeout=20)
        with connected(server.address) as stubs:
            watch = health_pb2_grpc.HealthStub(stubs.channel).Watch(health_pb2.HealthCheckRequest())
            assert next(watch).status == NOT_SERVING
            assert [health(stubs, service) for service in SERVICES] == [NOT_SERVING] * len(SERVICES)
            error = refused(stubs.match.Verify, VERIFY)
            assert error.code() is grpc.StatusCode.UNAVAILABLE
            assert info(rich(error)).reason == "NOT_READY"
            held.let_go.set()
            assert next(watch).status == SERVING
            assert [health(stubs, service) for service in SERVICES] == [SERVING] * len(SERVICES)
            stubs.match.Verify(VERIFY)
            watch.cancel()
    finally:
        held.let_go.set()
        starting.result(timeout=20)
        loop.run(server.stop())


def test_draining_finishes_calls_in_flight_and_takes_no_new_ones(
    loop: Loop, own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = loop.run(made(own.model_copy(update={"drain_seconds": 3600})))
    loop.run(server.start())
    with connected(server.address) as stubs, connected(server.address) as late:
        watch = health_pb2_grpc.HealthStub(stubs.channel).Watch(health_pb2.HealthCheckRequest())
        assert next(watch).status == SERVING
        held = Held(monkeypatch, "encode_pixels")
        in_flight = stubs.match.Verify.future(VERIFY)
        assert held.entered.wait(timeout=20)
        stopping = loop.start(server.stop())
        assert next(watch).status == NOT_SERVING
        # gRPC itself answers CANCELLED to a call that arrives in the very moment in which it stops accepting.
        while (code := refused(late.match.Verify, VERIFY).code()) is grpc.StatusCode.CANCELLED:
            pass
        assert code is grpc.StatusCode.UNAVAILABLE
        assert not stopping.done()
        held.let_go.set()
        assert in_flight.result(timeout=20).decision.distance >= 0
        stopping.result(timeout=20)  # although the watching client never hung up
        with pytest.raises(grpc.RpcError):
            next(watch)


def test_draining_gives_its_time_to_a_call_whose_request_is_on_its_way(
    loop: Loop, own: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepted, "LAST_ANSWERS_SECONDS", 0.0)
    server = loop.run(made(own.model_copy(update={"drain_seconds": 3600})))
    loop.run(server.start())
    whole = threading.Event()

    def uploaded() -> Iterator[match_pb2.VerifyRequest]:  # on the wire, one message of a stream is a request
        assert whole.wait(timeout=20)
        yield VERIFY

    with connected(server.address) as stubs:
        method = stubs.channel.stream_unary(
            "/lookalike.v1.MatchService/Verify",
            match_pb2.VerifyRequest.SerializeToString,
            match_pb2.VerifyResponse.FromString,
        )
        uploading = method.future(uploaded())
        assert health(stubs) == SERVING  # asked later on the same connection, so that the other call has come
        stopping = loop.start(server.stop())
        with pytest.raises(TimeoutError):
            stopping.result(timeout=0.2)
        whole.set()
        assert uploading.result(timeout=20).decision.distance >= 0
        stopping.result(timeout=20)


def test_draining_ends_after_its_time(loop: Loop, own: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    server = loop.run(made(own.model_copy(update={"drain_seconds": 0.05})))
    loop.run(server.start())
    with connected(server.address) as stubs:
        held = Held(monkeypatch, "encode_pixels")
        in_flight = stubs.match.Verify.future(VERIFY)
        assert held.entered.wait(timeout=20)
        stopping = loop.start(server.stop())
        assert in_flight.exception(timeout=20) is not None
        held.let_go.set()
        stopping.result(timeout=20)


def test_a_cancelled_call_leaves_the_server_answering(stubs: Stubs, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = match_pb2.VerifyRequest(a=encoded(901), b=encoded(902))  # embedded by no other test
    with monkeypatch.context() as patched:
        held = Held(patched, "encode_pixels")
        running = stubs.match.Verify.future(fresh)
        assert held.entered.wait(timeout=20)
        waiting = [stubs.match.Verify.future(fresh) for _ in range(8)]
        for call in (running, *waiting[::2]):
            call.cancel()
        held.let_go.set()
        assert len({call.result(timeout=20).decision.distance for call in waiting[1::2]}) == 1
    stubs.match.Verify(VERIFY)


def fails_to_start(loop: Loop, settings: Settings) -> LookalikeError:
    server = loop.run(made(settings))
    try:
        with pytest.raises(LookalikeError) as caught:
            loop.run(server.start())
    finally:
        loop.run(server.stop())
    assert "\n" not in str(caught.value)
    return caught.value


def test_a_port_in_use_is_told_in_one_line(loop: Loop, own: Settings, server: Server) -> None:
    error = fails_to_start(loop, own.model_copy(update={"port": server.port}))
    assert isinstance(error, Busy)
    assert str(server.port) in str(error)
    assert not own.galleries.exists()


@pytest.mark.parametrize("host", ["192.0.2.1", "no-such-host.invalid"])
def test_an_address_of_another_machine_is_refused(loop: Loop, own: Settings, host: str) -> None:
    error = fails_to_start(loop, own.model_copy(update={"host": host}))
    assert isinstance(error, InvalidInput)
    assert error.field == "host"


def test_a_folder_of_galleries_has_one_server(loop: Loop, settings: Settings, server: Server) -> None:
    error = fails_to_start(loop, settings)
    assert isinstance(error, Busy)
    assert str(os.getpid()) in str(error)


def test_a_missing_bundle_is_told_and_the_port_is_free_again(loop: Loop, own: Settings, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    fixed = own.model_copy(update={"port": port})
    assert isinstance(fails_to_start(loop, fixed.model_copy(update={"bundle": tmp_path / "none"})), NotFound)
    with served(loop, fixed) as server, connected(server.address) as stubs:
        assert server.port == port
        stubs.match.Verify(VERIFY)


def test_settings_that_are_wrong_are_named_in_one_line() -> None:
    with pytest.raises(InvalidInput, match=r"^port: .*65535.*99999$") as caught:
        Settings.checked(bundle="b", galleries="g", port=99_999)
    assert caught.value.field == "port"


def test_reflection_lists_the_services(stubs: Stubs) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (response,) = reflection_pb2_grpc.ServerReflectionStub(stubs.channel).ServerReflectionInfo(iter([request]))
    listed = {service.name for service in response.list_services_response.service}
    assert set(SERVICES) | {"grpc.health.v1.Health", "google.longrunning.Operations"} <= listed
    assert set(SERVICES) == {
        f"lookalike.v1.{name}Service" for name in ("Alias", "Feedback", "Gallery", "Match", "Model", "Search", "Upkeep")
    }


def test_an_ipv6_address_is_written_with_brackets(loop: Loop, own: Settings) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with served(loop, own.model_copy(update={"host": "::1"})) as server, connected(server.address) as stubs:
        assert server.address == f"[::1]:{server.port}"
        assert health(stubs) == SERVING


def test_a_server_that_never_started_stops(own: Settings) -> None:
    async def story() -> None:
        await Server(own).stop()

    asyncio.run(story())
