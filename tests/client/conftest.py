"""A real server over loopback for the client, and a fresh gallery for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lookalike import Client
from service.server import Server
from service.settings import Settings
from tests.service.harness import MAX_MESSAGE_BYTES, Loop, make_bundle, served


@pytest.fixture(scope="module")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    settings = Settings(
        bundle=make_bundle(tmp_path_factory.mktemp("bundles") / "toy", seed=0).path,
        galleries=tmp_path_factory.mktemp("galleries"),
        port=0,
        device="cpu",
        max_message_bytes=MAX_MESSAGE_BYTES,
        encode_threads=1,
    )
    loop = Loop()
    with served(loop, settings) as server:
        yield server
    loop.close()


@pytest.fixture(scope="session")
def client(server: Server) -> Iterator[Client]:
    with Client(server.address, max_message_bytes=MAX_MESSAGE_BYTES) as client:
        client.wait_until_ready(10)
        yield client


@pytest.fixture
def gallery(client: Client, request: pytest.FixtureRequest) -> Iterator[str]:
    """An empty gallery that this test alone uses."""
    name = f"g-{abs(hash(request.node.nodeid)):x}"
    client.create_gallery(name)
    yield name
    client.delete_gallery(name, force=True)
