"""What the doctor asks of a running server, and says of one that is not there."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path
from queue import SimpleQueue

from lookalike.v1 import search_pb2
from service.access.key_ring import KeyRing
from service.doctor.server import asked
from service.server import SERVICES, Server
from service.settings import Settings
from tests.authority import Authority
from tests.service.deployed import referenced, whole, wrong
from tests.service.harness import Loop, Stubs, connected, encoded, make_bundle, served

__all__ = ["referenced", "whole"]  # fixtures of another module


def test_a_server_that_is_well(loop: Loop, whole: Settings) -> None:
    running = whole.model_copy(update={"metrics_port": 0})
    with served(loop, running) as server:
        told = running.model_copy(update={"port": server.port, "metrics_port": server.metrics_port})
        findings = list(asked(told, services=SERVICES))
    assert wrong(iter(findings)) == {}
    assert {finding.check for finding in findings} >= {"server", "model", "metrics", *SERVICES}


def test_a_server_that_is_not_there(whole: Settings) -> None:
    assert {check: f.state for check, f in wrong(asked(whole)).items()} == {"server": "warn"}
    assert wrong(asked(whole, target=f"127.0.0.1:{whole.port}"))["server"].state == "fail"


def test_a_server_that_listens_elsewhere(loop: Loop, whole: Settings) -> None:
    """Its folder is held: to start another one, as for a server that is not there, would fail."""
    with served(loop, whole.model_copy(update={"port": 0})):
        found = wrong(asked(whole))
    assert {check: f.state for check, f in found.items()} == {"server": "fail"}
    assert f"process {os.getpid()} writes to" in found["server"].what
    assert "correct `host`" in found["server"].do


def test_a_target_without_a_port(whole: Settings) -> None:
    assert "names no port" in wrong(asked(whole, target="localhost"))["server"].what


def test_a_server_that_is_full(loop: Loop, whole: Settings) -> None:
    with (
        served(loop, whole.model_copy(update={"port": 0, "max_calls": 1})) as server,
        connected(server.address) as stubs,
    ):
        sent: SimpleQueue[search_pb2.StreamSearchRequest | None] = SimpleQueue()
        answers = stubs.search.StreamSearch(iter(sent.get, None))
        sent.put(search_pb2.StreamSearchRequest(config=search_pb2.StreamSearchConfig(gallery="galleries/kept", k=1)))
        sent.put(search_pb2.StreamSearchRequest(id="one", query=encoded(1)))
        next(answers)
        found = wrong(asked(whole.model_copy(update={"port": server.port}), services=SERVICES))
        sent.put(None)
    assert {check: f.state for check, f in found.items()} == {"model": "warn"}
    assert "it is full" in found["model"].do


def test_a_server_that_asks_for_keys(loop: Loop, whole: Settings, tmp_path: Path) -> None:
    KeyRing(tmp_path / "keys.json").create("somebody", scopes=["read"], galleries=["*"])
    own = whole.model_copy(update={"port": 0, "keys": tmp_path / "keys.json"})
    with served(loop, own) as server:
        found = wrong(asked(own.model_copy(update={"port": server.port}), services=SERVICES))
    assert {check: f.state for check, f in found.items()} == {"model": "warn"}
    assert "LOOKALIKE_API_KEY" in found["model"].do


def test_a_server_that_serves_another_model(server: Server, whole: Settings, tmp_path: Path) -> None:
    other = make_bundle(tmp_path / "another", seed=11)
    told = whole.model_copy(update={"port": server.port, "bundle": other.path})
    assert {check: f.state for check, f in wrong(asked(told)).items()} == {"model": "warn"}


def test_a_server_that_drains(loop: Loop, server: Server, stubs: Stubs, whole: Settings) -> None:
    loop.run(server._say(2))  # NOT_SERVING
    try:
        found = wrong(asked(whole, target=server.address))
    finally:
        loop.run(server._say(1))
    assert found["server"].state == "fail"
    assert "NOT_SERVING" in found["server"].what


def test_something_else_on_the_port(whole: Settings) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def hang_up() -> None:
            while True:
                try:
                    other.accept()[0].close()
                except OSError:
                    return

        answering = threading.Thread(target=hang_up)
        answering.start()
        port = other.getsockname()[1]
        found = wrong(asked(whole.model_copy(update={"port": port, "metrics_port": port})))
        other.shutdown(socket.SHUT_RDWR)
    answering.join()
    assert {check: finding.state for check, finding in found.items()} == {"server": "fail", "metrics": "fail"}


def test_a_server_with_tls(loop: Loop, whole: Settings, tmp_path: Path) -> None:
    authority = Authority()
    certificate, key = authority.issue("server").write(tmp_path, "server")
    secure = whole.model_copy(update={"tls_certificate": certificate, "tls_key": key, "port": 0})
    with served(loop, secure) as server:
        told = secure.model_copy(update={"port": server.port})
        assert wrong(asked(told)) == {}
        renewed, _ = authority.issue("other").write(tmp_path, "renewed")
        stale = wrong(asked(told.model_copy(update={"tls_certificate": renewed})))
        assert stale["server"].state == "fail"
        assert wrong(asked(whole.model_copy(update={"port": server.port})))["server"].state == "fail"
    with served(loop, whole.model_copy(update={"port": 0})) as server:
        plain = wrong(asked(secure.model_copy(update={"port": server.port})))["server"]
        assert "does not speak TLS" in plain.what
        assert "restart it with these settings" in plain.do
