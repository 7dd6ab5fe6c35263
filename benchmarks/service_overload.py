"""Three times as many calls as the service can answer: it still answers what it can, as fast, in the same memory."""

from __future__ import annotations

import asyncio
import statistics
from dataclasses import dataclass

from benchmarks.report import Report
from benchmarks.service_server import (
    Load,
    Served,
    at_rate,
    cores,
    drawings,
    in_flight,
    pinned,
    verifications,
)

RECIPE, SIDE = "omniglot", 105
IN_FLIGHT = 32
"""Callers that take the service to its capacity."""

OVER = 3.0
GOODPUT, SLOWER, GROWTH = 0.9, 3.0, 1.05


def measure(report: Report, server: Served, *, quick: bool) -> None:
    """Capacity and overload by turns, so that both meet the same neighbours on the machine."""
    turns, calm, seconds = (1, 1.0, 2.5) if quick else (4, 8.0, 15.0)
    _, others = cores()
    requests = verifications(drawings(2048, SIDE))
    with pinned(others):
        _capacity(server, requests, seconds=calm)
        _overload(server, requests, rate=12 * IN_FLIGHT, seconds=calm)  # brings the queues to their bounds once
        resident = server.resident_bytes
        at_capacity: list[Taken] = []
        over: list[Taken] = []
        for _ in range(turns):
            at_capacity.append(_capacity(server, requests, seconds=calm))
            over.append(_overload(server, requests, rate=OVER * at_capacity[-1].load.rate, seconds=seconds))
        growth = server.resident_bytes / resident
    pairs = list(zip(over, at_capacity, strict=True))
    goodput = statistics.median(a.load.rate / b.load.rate for a, b in pairs)
    by_cpu = statistics.median(b.cpu_seconds / a.cpu_seconds for a, b in pairs)
    p99, over_p99 = (statistics.median(taken.load.percentile(99) for taken in turn) for turn in (at_capacity, over))
    slower = statistics.median(a.load.percentile(99) / b.load.percentile(99) for a, b in pairs)
    refused = sum(taken.load.refused for taken in over)
    answered = sum(len(taken.load.latencies) for taken in over)
    capacity = statistics.median(taken.load.rate for taken in at_capacity)
    us, over_capacity = "lookalike", f"answers at {OVER:g} x capacity"
    report.row(f"capacity, Verify, {RECIPE}, {IN_FLIGHT} in flight", us, 0, capacity, "/s")
    report.row("p99 at capacity", us, 0, 1e3 * p99, "ms")
    report.row(over_capacity, us, 0, goodput, "x capacity", note="by the clock")
    report.row(over_capacity, us, 0, by_cpu, "x capacity", note="by processor time")
    report.row("refused for each answer", us, 0, refused / answered, "calls")
    report.row("p99 of those answered", us, 0, 1e3 * over_p99, "ms")
    report.row("resident memory", us, 0, resident / 2**20, "MB", note=f"grew {growth:.3f} x")
    report.at_least("overload: answers, x capacity", goodput, GOODPUT)
    report.at_most("overload: p99 x p99 at capacity", slower, SLOWER)
    report.at_most("overload: memory x", growth, GROWTH)


@dataclass(frozen=True)
class Taken:
    """A load, and processor seconds of the server for each answer."""

    load: Load
    cpu_seconds: float


def _capacity(server: Served, requests: list[bytes], *, seconds: float) -> Taken:
    before = server.cpu_seconds
    load = asyncio.run(in_flight(server.address, requests, number=IN_FLIGHT, seconds=seconds))
    return Taken(load, (server.cpu_seconds - before) / len(load.latencies))


def _overload(server: Served, requests: list[bytes], *, rate: float, seconds: float) -> Taken:
    before = server.cpu_seconds
    load = asyncio.run(at_rate(server.address, requests, rate=rate, seconds=seconds))
    return Taken(load, (server.cpu_seconds - before) / len(load.latencies))
