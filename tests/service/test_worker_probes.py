"""What a parent tells of its workers, some of which have gone or hang."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from service.telemetry.probes import Probes
from service.workers import probes as worker_probes
from service.workers.probes import ParentEndpoint
from tests.service.harness import Loop
from tests.service.test_metrics import get, scraped


class Worker:
    """What one worker exports, at a socket."""

    def __init__(self, path: Path, calls: int) -> None:
        self.path, self.state = path, "serving"
        registry = CollectorRegistry(auto_describe=True)
        Counter("lookalike_calls", "Calls.", ["code"], registry=registry).labels("OK").inc(calls)
        Gauge("lookalike_ready", "Ready.", registry=registry).set(1)
        Gauge("lookalike_galleries", "Galleries.", registry=registry).set(calls)
        Gauge("lookalike_gallery_items", "Items.", ["gallery"], registry=registry).labels("shop").set(10 + calls)
        Histogram("lookalike_call_seconds", "Time.", ["method"], buckets=(0.1, 1), registry=registry).labels(
            "m"
        ).observe(0.5)
        self.probes = Probes(registry, lambda: self.state)


@pytest.fixture
def workers(loop: Loop, tmp_path: Path) -> Iterator[list[Worker]]:
    """Two that answer, and the place of one that does not run."""
    found = [Worker(tmp_path / str(number), calls) for number, calls in enumerate((3, 5))]
    for worker in found:
        loop.run(worker.probes.start_at(worker.path))
    yield found
    for worker in found:
        loop.run(worker.probes.stop())


@pytest.fixture
def port(workers: list[Worker], tmp_path: Path) -> Iterator[int]:
    endpoint = ParentEndpoint([*(worker.path for worker in workers), tmp_path / "gone"])
    yield endpoint.start("127.0.0.1", 0)
    endpoint.stop()


def test_each_worker_s_series_are_told_apart_and_shared_ones_told_once(port: int) -> None:
    told = {name: value for name, value in scraped(port).items() if "_created" not in name}
    assert told == {
        "lookalike_calls_total{code=OK,worker=0}": 3,
        "lookalike_calls_total{code=OK,worker=1}": 5,
        "lookalike_ready{worker=0}": 1,
        "lookalike_ready{worker=1}": 1,
        "lookalike_ready{worker=2}": 0,
        "lookalike_galleries{}": 3,
        "lookalike_gallery_items{gallery=shop}": 13,
        **{
            f"lookalike_call_seconds_{name},method=m,worker={number}}}".replace("{,", "{"): value
            for number in (0, 1)
            for name, value in (
                ("bucket{le=0.1", 0),
                ("bucket{le=1.0", 1),
                ("bucket{le=+Inf", 1),
                ("count{", 1),
                ("sum{", 0.5),
            )
        },
    }


def test_shared_series_are_told_by_another_while_the_first_is_gone(
    loop: Loop, workers: list[Worker], port: int
) -> None:
    loop.run(workers[0].probes.stop())
    told = scraped(port)
    assert told["lookalike_galleries{}"] == 5
    assert "lookalike_gallery_items{gallery=shop}" not in told, "of one gallery only the worker that writes can tell"
    assert get(port, "/healthz") == (200, "alive\n")  # the parent starts it anew


def test_ready_while_one_answers(workers: list[Worker], port: int) -> None:
    workers[0].state = "draining"
    assert get(port, "/readyz") == (200, "serving\n")
    workers[1].state = "loading"
    assert get(port, "/readyz") == (503, "draining\n")


def test_a_worker_that_hangs_is_named(
    workers: list[Worker], port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_probes, "_PATIENCE_SECONDS", 0.2)
    with socket.socket(socket.AF_UNIX) as hanging:
        hanging.bind(str(tmp_path / "gone"))
        hanging.listen()
        assert get(port, "/healthz") == (503, "hangs: worker 2\n")
        assert scraped(port)["lookalike_ready{worker=2}"] == 0
