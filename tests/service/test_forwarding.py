"""Calls that one worker passes on while the one that answers them is away."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import pytest

from lookalike.v1 import gallery_pb2
from service.server import Server
from service.settings import Settings
from service.transport import channel_options
from service.workers.forwarding import Forwarding
from tests.service.harness import MAX_MESSAGE_BYTES, Loop, connected, info, refused, rich

IMPORT = gallery_pb2.ImportItemsRequest()


async def started(address: str, settings: Settings) -> tuple[Any, Forwarding, int]:
    """A worker that passes on to the one at this address."""
    forwarding = Forwarding(address, ("lookalike.v1.GalleryService",), settings)
    server = grpc.aio.server(options=channel_options(settings))
    server.add_generic_rpc_handlers([forwarding])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    return server, forwarding, port


@pytest.mark.parametrize("streams", [False, True])
def test_a_worker_that_is_away_is_told_as_such(loop: Loop, settings: Settings, tmp_path: Path, streams: bool) -> None:
    """And not in gRPC's words, which name the socket and have no reason."""
    server, forwarding, port = loop.run(started(f"unix:{tmp_path}/writer", settings))
    try:
        with connected(f"127.0.0.1:{port}") as stubs:
            if streams:
                error = refused(lambda _: stubs.galleries.ImportItems(iter([IMPORT])), IMPORT)
            else:
                error = refused(stubs.galleries.GetGallery, gallery_pb2.GetGalleryRequest(name="galleries/g"))
        assert error.code() is grpc.StatusCode.UNAVAILABLE
        assert info(rich(error)).reason == "NOT_READY"
        assert str(tmp_path) not in (error.details() or "")
        assert "request_id" in (error.details() or "")
    finally:
        loop.run(server.stop(None))
        loop.run(forwarding.close())


def test_what_is_too_large_is_passed_on_to_be_refused(loop: Loop, settings: Settings, server: Server) -> None:
    worker, forwarding, port = loop.run(started(server.address, settings))
    large = gallery_pb2.Item(name=f"galleries/{'g' * MAX_MESSAGE_BYTES}/items/x")
    try:
        with connected(f"127.0.0.1:{port}") as stubs:
            error = refused(stubs.galleries.UpdateItem, gallery_pb2.UpdateItemRequest(item=large))
        assert info(rich(error)).reason == "REQUEST_TOO_LARGE"
    finally:
        loop.run(worker.stop(None))
        loop.run(forwarding.close())
