"""Several processes that are told to stop, with calls in flight through each."""

from __future__ import annotations

import os
import queue
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from embedding.bundle import Bundle
from lookalike.v1 import gallery_pb2
from tests.processes import serving
from tests.service.harness import Stubs, connected, unit
from tests.service.swapped import decided
from tests.service.test_metrics import scraped
from tests.service.test_workers import ENOUGH_SECONDS, Running

WRITER, REPLICA = 0, 1


class Import:
    """A call that lasts until it is told to end."""

    def __init__(self, stubs: Stubs) -> None:
        self._elements: queue.SimpleQueue[gallery_pb2.ImportItemsRequest | None] = queue.SimpleQueue()
        config = gallery_pb2.ImportItemsConfig(parent="galleries/g")
        self._elements.put(gallery_pb2.ImportItemsRequest(config=config))
        self._answers = stubs.galleries.ImportItems(iter(self._elements.get, None), timeout=ENOUGH_SECONDS)
        # Asked later on the same connections, so that the other call has come.
        stubs.galleries.GetGallery(gallery_pb2.GetGalleryRequest(name="galleries/g"))

    def send(self, name: str) -> None:
        """One item more."""
        request = gallery_pb2.ImportItemsRequest()
        request.item.item.name = f"galleries/g/items/{name}"
        request.item.image.embedding = unit(1)
        request.item.allow_missing = True
        self._elements.put(request)

    def stored(self) -> int:
        """How many were, once all are dealt with."""
        self._elements.put(None)
        return [int(answer.stored_count) for answer in self._answers][-1]


@pytest.fixture
def running(bundle: Bundle, tmp_path: Path) -> Iterator[Running]:
    options = ["--set", "workers=2", "--set", "metrics_port=0", "--set", "drain_seconds=600"]
    with serving(bundle.path, tmp_path / "g", log=tmp_path / "log", options=options) as (process, address):
        yield Running(process, address, tmp_path / "log", tmp_path)


def one_of_each(running: Running, stack: ExitStack) -> dict[int, Stubs]:
    """A connection that each process has taken, by its number."""
    found: dict[int, Stubs] = {}
    while len(found) < 2:
        stubs = stack.enter_context(connected(running.address))
        before = verified(running)
        decided(stubs)
        after = verified(running)
        found[next(number for number in after if after[number] != before[number])] = stubs
    return found


def verified(running: Running) -> dict[int, float]:
    told = scraped(running.metrics_port)
    return {
        number: sum(
            value
            for name, value in told.items()
            if name.startswith("lookalike_calls_total") and "Verify" in name and f"worker={number}" in name
        )
        for number in (WRITER, REPLICA)
    }


def to_the_parent(running: Running) -> None:
    """As Docker and Kubernetes do."""
    running.process.send_signal(signal.SIGTERM)


def to_all(running: Running) -> None:
    """As systemd does, and a terminal with SIGINT."""
    for pid in (running.pid(WRITER), running.pid(REPLICA), running.process.pid):
        os.kill(pid, signal.SIGTERM)


@pytest.mark.parametrize("tell", [pytest.param(to_the_parent, marks=pytest.mark.slow), to_all])
def test_all_drain_at_once_and_answer_what_they_have_accepted(
    running: Running, tell: Callable[[Running], None]
) -> None:
    with ExitStack() as stack:
        stubs = one_of_each(running, stack)
        stubs[WRITER].galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="g"))
        imports = {number: Import(each) for number, each in stubs.items()}
        for number, each in imports.items():
            each.send(f"before-{number}")
        tell(running)
        until_nobody_listens(running.address)  # neither waits for the other's calls
        imports[WRITER].send("meanwhile")
        assert imports[WRITER].stored() == 2
        imports[REPLICA].send("passed-on")  # the writer has no call of its own any more
        assert imports[REPLICA].stored() == 2
    assert running.process.wait(ENOUGH_SECONDS) == 0


def until_nobody_listens(address: str) -> None:
    host, _, port = address.rpartition(":")
    ends = time.monotonic() + ENOUGH_SECONDS
    while True:
        try:
            socket.create_connection((host, int(port))).close()
        except OSError:
            return
        assert time.monotonic() < ends
        time.sleep(0.02)


def test_a_worker_that_dies_while_it_drains_is_named_and_makes_the_exit_code_2(running: Running) -> None:
    with ExitStack() as stack:
        stubs = one_of_each(running, stack)[REPLICA]
        stubs.galleries.CreateGallery(gallery_pb2.CreateGalleryRequest(gallery_id="g"))
        held = Import(stubs)
        to_the_parent(running)
        until_nobody_listens(running.address)
        replica = running.pid(REPLICA)
        os.kill(replica, signal.SIGKILL)
        assert running.process.wait(ENOUGH_SECONDS) == 2
        with pytest.raises(grpc.RpcError):
            held.stored()
    assert (
        running.log.read_text()
        .splitlines()[-1]
        .startswith(f"lookalike: told to stop, worker 1 (process {replica}) was ended by signal 9. ")
    )
