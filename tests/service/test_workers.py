"""Several processes on one port: one writes, the others follow, and what dies is started anew."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from subprocess import Popen
from typing import TypeVar

import numpy as np
import pytest

from embedding.bundle import Bundle
from embedding.errors import InvalidInput
from lookalike import Client, NewItem
from lookalike.errors import CallFailed
from service.process import run_part
from service.settings import Settings
from service.workers import parent as workers
from service.workers.orders import Orders
from tests.processes import serving
from tests.service.harness import DIM, Stubs, connected, encoded, make_bundle, png
from tests.service.swapped import activate, decided, search
from tests.service.test_metrics import get, scraped

T = TypeVar("T")

ENOUGH_SECONDS = 120  # on a busy machine; a worker takes a few seconds to load


@dataclass
class Running:
    """A server of two workers."""

    process: Popen[str]
    address: str
    log: Path
    folder: Path

    def pid(self, number: int) -> int:
        """Of the worker that was started last under this number: 0 writes, 1 follows."""
        lines = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [int(line["pid"]) for line in lines if line["event"] == "worker started" and line["number"] == number][
            -1
        ]

    @property
    def metrics_port(self) -> int:
        (line,) = [line for line in self.log.read_text().splitlines() if '"event": "metrics"' in line]
        return int(json.loads(line)["port"])

    def patiently(self, call: Callable[[Client], T]) -> T:
        """What a call answers over a connection of its own, once it is answered."""
        ends = time.monotonic() + ENOUGH_SECONDS
        while True:
            try:
                with Client(self.address, timeout=10) as client:
                    return call(client)
            except CallFailed:
                if time.monotonic() > ends:
                    raise
                time.sleep(0.2)


@pytest.fixture(scope="module")
def running(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("workers")
    (folder / "models").mkdir()
    log = folder / "log"
    options = ["--set", "workers=2", "--set", "metrics_port=0", "--models", str(folder / "models")]
    with serving(bundle.path, folder / "galleries", log=log, options=options) as (process, address):
        yield Running(process, address, log, folder)


@contextmanager
def connections(address: str) -> Iterator[list[Stubs]]:
    """Of twelve, which the system gives to either process, each gets some, all but surely."""
    with ExitStack() as stack:
        yield [stack.enter_context(connected(address)) for _ in range(12)]


def models(stubs: list[Stubs]) -> set[str]:
    """What they answer with."""
    return {decided(each).model.removeprefix("models/") for each in stubs}


def vectors(count: int) -> np.ndarray:
    vectors_ND = np.random.default_rng(7).normal(size=(count, DIM)).astype(np.float32)
    return vectors_ND / np.linalg.norm(vectors_ND, axis=1, keepdims=True)


def test_reads_see_every_write_whichever_process_answers(running: Running) -> None:
    emb_ND = vectors(24)
    with Client(running.address) as client:
        client.create_gallery("read-your-writes")
    for i, emb_D in enumerate(emb_ND):
        # The system gives each new connection to either process: of 24 pairs some cross over, all but surely.
        with Client(running.address) as writer:
            writer.update_item("read-your-writes", NewItem(id=f"i{i}", image=emb_D))
        with Client(running.address) as reader:
            found = reader.search("read-your-writes", emb_D, k=1)
        assert found[0].item.id == f"i{i}"


def test_the_metrics_of_all_are_on_one_port(running: Running) -> None:
    for _ in range(16):  # the system gives each new connection to either
        with Client(running.address) as client:
            client.verify(png(1), png(2))
    told = scraped(running.metrics_port)
    verified = {
        name: value for name, value in told.items() if name.startswith("lookalike_calls_total") and "Verify" in name
    }
    assert sum(verified.values()) == 16
    assert [told[f"lookalike_ready{{worker={number}}}"] for number in (0, 1)] == [1, 1]
    assert told["lookalike_galleries{}"] == 1
    assert get(running.metrics_port, "/healthz") == (200, "alive\n")
    assert get(running.metrics_port, "/readyz") == (200, "serving\n")


def test_a_model_is_activated_in_every_process_without_a_failed_call(running: Running, bundle: Bundle) -> None:
    two = make_bundle(running.folder / "models" / "two", seed=1)
    swapped = threading.Event()

    def ask(stubs: list[Stubs]) -> int:
        calls = 0
        while not swapped.is_set():
            decided(stubs[calls % len(stubs)])
            assert search(stubs[calls % len(stubs)], "loaded").neighbors[0].decision.distance == 0
            calls += 1
        return calls

    with connections(running.address) as all_of_them, ThreadPoolExecutor(2) as pool:
        all_of_them[0].fill("loaded", {"item": encoded(1)})
        asking = [pool.submit(ask, all_of_them[::2]), pool.submit(ask, all_of_them[1::2])]
        try:
            for stubs, each in zip(all_of_them, (two, bundle) * 3, strict=False):
                activate(stubs, each, keep_previous=True)
                assert models(all_of_them) == {each.name}
        finally:
            swapped.set()
        assert all(asked.result(timeout=60) > 0 for asked in asking)


def test_a_follower_that_is_killed_comes_back_with_what_was_activated_meanwhile(running: Running) -> None:
    two = Bundle.load(running.folder / "models" / "two")
    follower = running.pid(1)
    os.kill(follower, signal.SIGKILL)
    running.patiently(lambda client: client.activate_model(two.name, keep_previous=True))
    ends = time.monotonic() + ENOUGH_SECONDS
    while running.pid(1) == follower or scraped(running.metrics_port)["lookalike_ready{worker=1}"] != 1:
        assert time.monotonic() < ends
        time.sleep(0.1)
    with connections(running.address) as all_of_them:
        assert models(all_of_them) == {two.name}
        assert all(search(stubs, "loaded").neighbors for stubs in all_of_them)


def test_a_writer_that_is_killed_comes_back_with_what_it_acknowledged(running: Running) -> None:
    emb_ND = vectors(2)
    running.patiently(lambda client: client.create_gallery("survivor"))
    running.patiently(lambda client: client.update_item("survivor", NewItem(id="before", image=emb_ND[0])))
    os.kill(running.pid(0), signal.SIGKILL)
    running.patiently(lambda client: client.update_item("survivor", NewItem(id="after", image=emb_ND[1])))
    for emb_D, name in zip(emb_ND, ("before", "after"), strict=True):
        assert running.patiently(lambda client, emb_D=emb_D: client.search("survivor", emb_D, k=1))[0].item.id == name
    with connections(running.address) as all_of_them:
        assert models(all_of_them) == {Bundle.load(running.folder / "models" / "two").name}


def test_all_drain_on_a_signal(running: Running) -> None:
    processes = [running.pid(0), running.pid(1)]
    running.process.send_signal(signal.SIGTERM)
    assert running.process.wait(ENOUGH_SECONDS) == 0
    for pid in processes:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_the_parent_ends_what_the_writer_cannot_tell_of_a_change(tmp_path: Path) -> None:
    class Process:
        killed = False
        pid = 1

        def kill(self) -> None:
            self.killed = True

    parent = workers._Workers(Settings.checked(bundle=tmp_path, workers=3), run_part, 0, tmp_path)
    processes, pipes = [Process() for _ in range(3)], [multiprocessing.Pipe() for _ in range(3)]
    for part, process, (pipe, _) in zip(parent._parts, processes, pipes, strict=True):
        parent._running[part.number] = workers._Worker(part, process, pipe, 0.0)
    writer = Orders(pipes[0][1])
    writer.ready("127.0.0.1:1")  # when it was started anew
    writer.restart(2)
    parent._hear()
    assert [process.killed for process in processes] == [False, False, True]
    pipes[0][1].close()
    parent._hear()
    for pipe, theirs in pipes:
        pipe.close()
        theirs.close()


def test_galleries_elsewhere_are_refused(tmp_path: Path) -> None:
    settings = Settings.checked(
        bundle=tmp_path, galleries=tmp_path, workers=2, engine="milvus", milvus_uri="http://127.0.0.1:1"
    )
    with pytest.raises(InvalidInput) as refused:
        workers.check(settings)
    assert refused.value.field == "workers"
