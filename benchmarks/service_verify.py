"""Verify beside its own encoder: how much of the encoder's throughput the service keeps, and what it adds to a call.

A call that carries embeddings in place of images shows what the call itself costs: where that is more than the images
do, no way of embedding them brings the call close to its encoder.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.report import Report
from benchmarks.service_server import (
    Served,
    cores,
    drawings,
    in_flight,
    pinned,
    verifications,
    verifications_of_embeddings,
)
from embedding.bundle import Bundle
from embedding.encoder import Encoder

CASES = {"mnist": 28, "faces": 92, "omniglot": 105}
"""Recipes, and the side of the images that are sent, in pixels."""

QUICK = ("mnist", "omniglot")

THROUGHPUT, LATENCY = 0.85, 1.25
IN_FLIGHT, BATCH = 32, 64


def cases(*, quick: bool) -> Sequence[str]:
    """Names of the recipes that are measured."""
    return QUICK if quick else list(CASES)


def _encoded(encoder: Encoder, images: Sequence[bytes], *, seconds: float) -> tuple[float, float]:
    """Pairs a second that the encoder alone decodes and embeds in batches, and processor seconds of a pair."""
    done, start, cpu = 0, time.perf_counter(), time.process_time()
    while time.perf_counter() - start < seconds:
        at = done % (len(images) - BATCH)
        encoder.encode(images[at : at + BATCH])
        done += BATCH
    pairs = done / 2
    return pairs / (time.perf_counter() - start), (time.process_time() - cpu) / pairs


def _one_by_one(encoder: Encoder, images: Sequence[bytes], *, seconds: float) -> list[float]:
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


def measure(report: Report, bundles: Path, serve: Callable[[str], Served], *, quick: bool) -> None:
    """Every case, the service and the encoder by turns on one core; `serve` lets the server answer with a model."""
    turns, seconds = (2, 0.4) if quick else (8, 3.0)
    for case in cases(quick=quick):
        images = drawings(2048, CASES[case])
        found = _measured(bundles / case, serve(case), images, turns=turns, seconds=seconds)
        ratio, by_cpu = statistics.median(found.ratios), statistics.median(found.by_cpu)
        alone, called, bare = map(statistics.median, (found.alone, found.called, found.bare))
        busy, calm = f"Verify, {case}, {IN_FLIGHT} in flight", f"Verify, {case}, 1 in flight, p50"
        report.row(f"pairs, {case}, batches of {BATCH}", "encoder", 0, max(found.rates), "/s", note="best turn")
        report.row(busy, "lookalike", 0, max(found.served), "/s", note="best turn")
        report.row(busy, "lookalike", 0, ratio, "x encoder", note="by the clock")
        report.row(busy, "lookalike", 0, by_cpu, "x encoder", note="by processor time")
        report.row(f"a pair, {case}, p50", "encoder", 0, 1e3 * alone, "ms", note="decode + embed in-process")
        report.row(calm, "lookalike", 0, 1e3 * called, "ms")
        report.row(calm, "lookalike", 0, 1e3 * bare, "ms", note="of embeddings: the call itself")
        report.row(
            calm, "lookalike", 0, called / (alone + bare), "x", note="decode + embed in-process and the call itself"
        )
        report.at_least(f"{busy}, x the encoder's own throughput", ratio, THROUGHPUT)
        report.at_most(f"{calm} x decode + embed in-process", called / alone, LATENCY)


@dataclass
class _Found:
    """Of each turn."""

    rates: list[float] = field(default_factory=list)
    served: list[float] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    by_cpu: list[float] = field(default_factory=list)
    alone: list[float] = field(default_factory=list)
    called: list[float] = field(default_factory=list)
    bare: list[float] = field(default_factory=list)


def _measured(bundle: Path, server: Served, images: Sequence[bytes], *, turns: int, seconds: float) -> _Found:
    found = _Found()
    own, others = cores()
    with pinned(own):
        torch.set_num_threads(1)
        encoder = Encoder(Bundle.load(bundle), device="cpu", batch_size=BATCH, threads=1)
        embedded = encoder.encode(images[:BATCH])
    of_images, of_embeddings = verifications(images), verifications_of_embeddings(embedded)
    for _ in range(turns):
        with pinned(own):
            rate, cost = _encoded(encoder, images, seconds=seconds)
        with pinned(others):
            served, served_cost, _ = _called(server, of_images, number=IN_FLIGHT, seconds=seconds)
        found.rates.append(rate)
        found.served.append(served)
        found.ratios.append(served / rate)
        found.by_cpu.append(cost / served_cost)
        with pinned(own):
            found.alone += _one_by_one(encoder, images, seconds=seconds / 2)
        with pinned(others):
            found.called += _called(server, of_images, number=1, seconds=seconds / 2)[2]
            found.bare += _called(server, of_embeddings, number=1, seconds=seconds / 4)[2]
    return found
