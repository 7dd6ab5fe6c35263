"""A real server over loopback, with a tiny model of random weights and a calibration made by hand."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

from embedding.bundle import Bundle
from service.server import Server
from service.settings import Settings
from tests.service.harness import MAX_MESSAGE_BYTES, Loop, Stubs, connected, encoded, make_bundle, served
from tests.service.swapped import Place


@pytest.fixture(scope="session", autouse=True)
def _quiet() -> None:
    """Keep log lines out of the test report; `structlog.testing.capture_logs` still sees them."""
    structlog.configure(logger_factory=structlog.ReturnLoggerFactory())


@pytest.fixture(scope="session")
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.close()


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_bundle(tmp_path_factory.mktemp("bundles") / "toy", seed=0)


@pytest.fixture(scope="session")
def settings(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return Settings(
        bundle=bundle.path,
        galleries=tmp_path_factory.mktemp("galleries"),
        port=0,
        device="cpu",
        max_message_bytes=MAX_MESSAGE_BYTES,
        decode_threads=2,
        encode_threads=1,
        gallery_threads=4,
        drain_seconds=20,
        embedding_cache_bytes=0,  # tests send the same images and look at what becomes of them
    )


@pytest.fixture(scope="session")
def server(loop: Loop, settings: Settings) -> Iterator[Server]:
    with served(loop, settings) as server:
        yield server


@pytest.fixture(scope="session")
def stubs(server: Server) -> Iterator[Stubs]:
    with connected(server.address) as stubs:
        yield stubs


@pytest.fixture
def gallery(stubs: Stubs, request: pytest.FixtureRequest) -> str:
    """The id of a gallery that this test alone uses and that does not exist yet."""
    return f"g-{abs(hash(request.node.nodeid)):x}"


@pytest.fixture
def filled(stubs: Stubs, gallery: str) -> str:
    """That gallery, with five images in it."""
    stubs.fill(gallery, {f"item-{i}": encoded(i) for i in range(5)})
    return gallery


@pytest.fixture
def place(settings: Settings, tmp_path: Path) -> Place:
    one = make_bundle(tmp_path / "one", seed=0)
    recalibrated = make_bundle(tmp_path / "models" / "one-again", seed=0, version=4)
    two = make_bundle(tmp_path / "models" / "two", seed=1)
    return Place(
        settings=settings.model_copy(
            update={"bundle": one.path, "galleries": tmp_path / "galleries", "models": tmp_path / "models"}
        ),
        one=one,
        recalibrated=recalibrated,
        two=two,
    )
