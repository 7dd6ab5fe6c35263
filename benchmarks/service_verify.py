"""Verify beside its own encoder: how much of the encoder's throughput the service keeps, and what it adds to a call."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.measure import Bar
from benchmarks.service_server import (
    Row,
    Served,
    cores,
    drawings,
    in_flight,
    make_bundle,
    pinned,
    serving,
    verifications,
)
from embedding.bundle import Bundle
from embedding.encoder import Encoder

CASES = {"mnist": 28, "faces": 92, "omniglot": 105}
"""Recipes, and the side of the images that are sent, in pixels."""

THROUGHPUT, LATENCY = 0.85, 1.25
IN_FLIGHT, BATCH = 32, 64


def _encoded(encoder: Encoder, images: list[bytes], *, seconds: float) -> tuple[float, float]:
    """Pairs a second that the encoder alone decodes and embeds in batches, and processor seconds of a pair."""
    done, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        at = done % (len(images) - BATCH)
        encoder.encode(images[at : at + BATCH])
        done += BATCH
    pairs = done / 2
    return pairs / (time.perf_counter() - start), (time.process_time() - cpu) / pairs


def _one_by_one(encoder: Encoder, images: list[bytes], *, seconds: float) -> list[float]:
    """Seconds of each pair decoded and embedded by itself."""
    times: list[float] = []
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        at = 2 * len(times) % len(images)
        begun = time.perf_counter()
        encoder.encode(images[at : at + 2])
        times.append(time.perf_counter() - begun)
    return times


def _called(server: Served, requests: list[bytes], *, number: int, seconds: float) -> tuple[float, float, list[float]]:
    """Calls a second, processor seconds that the server takes for each, and their latencies."""
    before = server.cpu_seconds
    load = asyncio.run(in_flight(server.address, requests, number=number, seconds=seconds))
    return load.rate, (server.cpu_seconds - before) / len(load.latencies), load.latencies


def measure(*, quick: bool, **settings: object) -> tuple[list[Row], list[Bar]]:
    """Every case, the service and the encoder by turns on the same core."""
    rows: list[Row] = []
    found: list[Bar] = []
    turns, seconds = (3, 1.0) if quick else (8, 3.0)
    own, others = cores()
    for case, side in CASES.items():
        images = drawings(2048, side)
        requests = verifications(images)
        with tempfile.TemporaryDirectory() as folder:
            bundle = make_bundle(Path(folder) / case, case)
            with pinned(own):
                torch.set_num_threads(1)
                encoder = Encoder(Bundle.load(bundle), device="cpu", batch_size=BATCH, threads=1)
                encoder.encode(images[:BATCH])
            with serving(bundle, **settings) as server:
                rates: list[float] = []
                costs: list[float] = []
                alone: list[float] = []
                called: list[float] = []
                best = served_best = 0.0
                for _ in range(turns):
                    with pinned(own):
                        rate, cost = _encoded(encoder, images, seconds=seconds)
                    with pinned(others):
                        served, served_cost, _ = _called(server, requests, number=IN_FLIGHT, seconds=seconds)
                    rates.append(served / rate)
                    costs.append(cost / served_cost)
                    best, served_best = max(best, rate), max(served_best, served)
                    with pinned(own):
                        alone += _one_by_one(encoder, images, seconds=seconds / 2)
                    with pinned(others):
                        called += _called(server, requests, number=1, seconds=seconds / 2)[2]
        ratio, by_cpu = statistics.median(rates), statistics.median(costs)
        slower = statistics.median(called) / statistics.median(alone)
        rows += [
            Row(what=f"{case}: encoder alone, batches of {BATCH}", value=best, unit="pairs/s", note="best turn"),
            Row(what=f"{case}: Verify, {IN_FLIGHT} in flight", value=served_best, unit="calls/s", note="best turn"),
            Row(what=f"{case}: Verify, {IN_FLIGHT} in flight", value=ratio, unit="x encoder", note="by the clock"),
            Row(
                what=f"{case}: Verify, {IN_FLIGHT} in flight", value=by_cpu, unit="x encoder", note="by processor time"
            ),
            Row(what=f"{case}: pair in-process, p50", value=1e3 * statistics.median(alone), unit="ms"),
            Row(what=f"{case}: Verify, 1 in flight, p50", value=1e3 * statistics.median(called), unit="ms"),
        ]
        found += [
            Bar(
                name=f"{case}: Verify, {IN_FLIGHT} in flight, x the encoder's own throughput",
                value=ratio,
                reach=THROUGHPUT,
                holds=ratio >= THROUGHPUT,
            ),
            Bar(
                name=f"{case}: Verify, 1 in flight, p50 at most x decode + embed in-process",
                value=slower,
                reach=LATENCY,
                holds=slower <= LATENCY,
            ),
        ]
    return rows, found
