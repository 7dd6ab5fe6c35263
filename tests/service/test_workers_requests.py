"""Requests made again under their `request_id` after a worker died: whichever process answers, each is done once."""

from __future__ import annotations

import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message

from embedding.bundle import Bundle
from lookalike.v1 import alias_pb2, common_pb2, gallery_pb2, upkeep_pb2
from tests.processes import serving
from tests.service.harness import Stubs, connected, finished, info, rich, unit
from tests.service.test_workers import ENOUGH_SECONDS, Running

WRITERS, WRITES = 4, 6


@pytest.fixture(scope="module")
def running(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("requests")
    options = ["--set", "workers=2"]
    with serving(bundle.path, folder / "galleries", log=folder / "log", options=options) as (process, address):
        yield Running(process, address, folder / "log", folder)


def patiently(address: str, call: Callable[[Stubs], Any]) -> Any:
    """What the same call answers once it is answered, over a new connection each time: another process may take it."""
    ends = time.monotonic() + ENOUGH_SECONDS
    while True:
        try:
            with connected(address) as stubs:
                return call(stubs)
        except (grpc.RpcError, grpc.FutureTimeoutError) as error:
            code = error.code() if isinstance(error, grpc.RpcError) else grpc.StatusCode.UNAVAILABLE
            if code is not grpc.StatusCode.UNAVAILABLE:
                raise
            assert time.monotonic() < ends
            time.sleep(0.05)


def item(name: str, value: float) -> gallery_pb2.UpdateItemRequest:
    return gallery_pb2.UpdateItemRequest(
        item=gallery_pb2.Item(name=f"galleries/g/items/{name}"),
        image=common_pb2.ImageInput(embedding=unit(1, value)),
        allow_missing=True,
        request_id=str(uuid.uuid4()),
    )


def generation(address: str) -> int:
    request = gallery_pb2.GetGalleryRequest(name="galleries/g")
    return int(patiently(address, lambda stubs: stubs.galleries.GetGallery(request)).gallery.generation)


@pytest.mark.slow
def test_every_write_is_done_once_though_the_writer_is_killed_among_them(running: Running) -> None:
    create = gallery_pb2.CreateGalleryRequest(gallery_id="g", request_id=str(uuid.uuid4()))
    created = patiently(running.address, lambda stubs: stubs.galleries.CreateGallery(create))
    before, begun = generation(running.address), threading.Event()
    answers: dict[str, Message] = {}

    def write(writer: int) -> list[gallery_pb2.UpdateItemRequest]:
        requests = [item(f"{writer}-{n}", n) for n in range(WRITES)]
        for n, request in enumerate(requests):
            answers[request.request_id] = patiently(
                running.address, lambda stubs, r=request: stubs.galleries.UpdateItem(r)
            )
            if n == 1:
                begun.set()
        return requests

    with ThreadPoolExecutor(WRITERS) as pool:
        writing = [pool.submit(write, writer) for writer in range(WRITERS)]
        assert begun.wait(ENOUGH_SECONDS)
        os.kill(running.pid(0), signal.SIGKILL)
        requests = [request for each in writing for request in each.result(timeout=2 * ENOUGH_SECONDS)]
    assert generation(running.address) == before + WRITERS * WRITES
    for request in requests[:: WRITES - 1]:  # asked for late, they undo nothing and are answered alike
        again = patiently(running.address, lambda stubs, r=request: stubs.galleries.UpdateItem(r))
        assert again == answers[request.request_id]
    assert generation(running.address) == before + WRITERS * WRITES
    same = patiently(running.address, lambda stubs: stubs.galleries.CreateGallery(create))
    assert same.gallery.create_time == created.gallery.create_time


@pytest.mark.slow
def test_what_is_no_write_to_items_is_known_to_the_writer_that_comes_after(running: Running) -> None:
    ids = {name: str(uuid.uuid4()) for name in ("create", "alias", "drop", "delete", "snapshot")}
    calls: dict[str, Callable[[Stubs], Any]] = {
        "create": lambda stubs: stubs.galleries.CreateGallery(
            gallery_pb2.CreateGalleryRequest(gallery_id="h", request_id=ids["create"])
        ),
        "alias": lambda stubs: stubs.aliases.UpdateAlias(
            alias_pb2.UpdateAliasRequest(
                alias=alias_pb2.Alias(name="aliases/a", gallery="galleries/h"),
                allow_missing=True,
                request_id=ids["alias"],
            )
        ),
        "drop": lambda stubs: stubs.aliases.DeleteAlias(
            alias_pb2.DeleteAliasRequest(name="aliases/a", request_id=ids["drop"])
        ),
    }
    answers = {name: patiently(running.address, call) for name, call in calls.items()}
    copy = upkeep_pb2.CreateSnapshotRequest(parent="galleries/h", snapshot_id="s", request_id=ids["snapshot"])

    def copied(stubs: Stubs) -> None:
        finished(stubs, stubs.upkeep.CreateSnapshot(copy).operation)

    patiently(running.address, copied)
    os.kill(running.pid(0), signal.SIGKILL)
    assert {name: patiently(running.address, call) for name, call in calls.items()} == answers
    # Operations are the memory of one process: what they made is there, and the name says so.
    with pytest.raises(grpc.RpcError) as caught:
        patiently(running.address, lambda stubs: stubs.upkeep.CreateSnapshot(copy))
    assert info(rich(caught.value)).reason == "ALREADY_EXISTS"
    delete = gallery_pb2.DeleteGalleryRequest(name="galleries/h", request_id=ids["delete"])
    gone = patiently(running.address, lambda stubs: stubs.galleries.DeleteGallery(delete))
    os.kill(running.pid(1), signal.SIGKILL)
    assert patiently(running.address, lambda stubs: stubs.galleries.DeleteGallery(delete)) == gone
