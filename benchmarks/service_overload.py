"""Three times as many calls as the service can answer: it still answers what it can, as fast, in the same memory."""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from benchmarks.measure import Bar
from benchmarks.service_server import (
    Row,
    at_rate,
    cores,
    drawings,
    in_flight,
    make_bundle,
    pinned,
    serving,
    verifications,
)

RECIPE, SIDE = "omniglot", 105
IN_FLIGHT = 32
"""Callers that take the service to its capacity."""

OVER = 3.0
GOODPUT, SLOWER, GROWTH = 0.9, 3.0, 1.05


def measure(*, quick: bool) -> tuple[list[Row], list[Bar]]:
    """Capacity before and after, and the overload in between."""
    seconds, calm = (10.0, 4.0) if quick else (60.0, 15.0)
    _, others = cores()
    requests = verifications(drawings(8192, SIDE))
    with (
        tempfile.TemporaryDirectory() as folder,
        serving(make_bundle(Path(folder) / RECIPE, RECIPE)) as server,
        pinned(others),
    ):
        asyncio.run(in_flight(server.address, requests, number=IN_FLIGHT, seconds=2.0))
        before = asyncio.run(in_flight(server.address, requests, number=IN_FLIGHT, seconds=calm))
        # The first moments of an overload bring the queues to their bounds once.
        asyncio.run(at_rate(server.address, requests, rate=OVER * before.rate, seconds=calm))
        time.sleep(1.0)
        resident, cpu = server.resident_bytes, server.cpu_seconds
        over = asyncio.run(at_rate(server.address, requests, rate=OVER * before.rate, seconds=seconds))
        growth, cpu = server.resident_bytes / resident, server.cpu_seconds - cpu
        after = asyncio.run(in_flight(server.address, requests, number=IN_FLIGHT, seconds=calm))
    capacity = (before.rate + after.rate) / 2
    p99 = (before.percentile(99) + after.percentile(99)) / 2
    goodput, slower = over.rate / capacity, over.percentile(99) / p99
    rows = [
        Row(what="capacity", value=capacity, unit="calls/s", note=f"Verify, {RECIPE}, {IN_FLIGHT} in flight"),
        Row(what="p99 at capacity", value=1e3 * p99, unit="ms"),
        Row(what=f"answers at {OVER:g} x capacity", value=over.rate, unit="calls/s", note=f"{over.refused} refused"),
        Row(what="p99 of those answered", value=1e3 * over.percentile(99), unit="ms"),
        Row(what="processor time of an answer", value=1e3 * cpu / len(over.latencies), unit="ms"),
        Row(what="resident memory", value=server_megabytes(resident), unit="MB", note=f"grew {growth:.3f} x"),
    ]
    return rows, [
        Bar(name="overload: answers, x capacity", value=goodput, reach=GOODPUT, holds=goodput >= GOODPUT),
        Bar(name="overload: p99 at most x p99 at capacity", value=slower, reach=SLOWER, holds=slower <= SLOWER),
        Bar(name="overload: memory at most x", value=growth, reach=GROWTH, holds=growth <= GROWTH),
    ]


def server_megabytes(resident: int) -> float:
    return resident / 2**20
