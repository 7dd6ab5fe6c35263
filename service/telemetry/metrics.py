"""Metrics for Prometheus: what is counted as calls pass, and the registry that everything is exported from.

Labels are bounded: methods are those that the server has, codes and stages a fixed list, models those that are loaded,
and galleries at most `collected.MOST_GALLERIES`. docs/operations.md says what each metric means.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import grpc
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from service.call import Call
from service.calls import Hook
from service.stages import Observed

_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_IMAGES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_LAG_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)

_LAG_EVERY = 0.25
"""Seconds between two looks at how late the event loop is."""


class Metrics(Hook):
    """Counts calls and their stages; one for each server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        ProcessCollector(registry=self.registry)
        self._calls = Counter(
            "lookalike_calls", "Calls that ended, by status code.", ["method", "code"], registry=self.registry
        )
        self._seconds = Histogram(
            "lookalike_call_seconds",
            "Time from a call's beginning to its end.",
            ["method"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._in_flight = Gauge(
            "lookalike_calls_in_flight", "Calls that have begun and not ended.", ["method"], registry=self.registry
        )
        self._stages = Histogram(
            "lookalike_stage_seconds",
            "Time that one image or question spent in a stage: queue, decode, embed, search or store.",
            ["method", "stage"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._batches = Histogram(
            "lookalike_batch_images", "Images embedded together.", buckets=_IMAGES, registry=self.registry
        )
        self._batch_seconds = Counter(
            "lookalike_batch_seconds",
            "Time that the encoder was busy with batches; its rate is the encoder's utilisation.",
            registry=self.registry,
        )
        self._lookups = Counter(
            "lookalike_embedding_cache_lookups",
            'Images looked up among those embedded lately: "hit" or "miss".',
            ["result"],
            registry=self.registry,
        )
        self._lag = Histogram(
            "lookalike_event_loop_lag_seconds",
            "How late the event loop was, four times a second.",
            buckets=_LAG_SECONDS,
            registry=self.registry,
        )

    def begun(self, call: Call) -> None:
        call.observers.append(self)
        self._in_flight.labels(_name(call)).inc()

    def ended(self, call: Call, code: grpc.StatusCode) -> None:
        name = _name(call)
        self._in_flight.labels(name).dec()
        self._calls.labels(name, code.name).inc()
        self._seconds.labels(name).observe(time.perf_counter() - call.started)

    def staged(self, call: Observed, stage: str, started: float, ended: float) -> None:
        self._stages.labels(_name(call), stage).observe(ended - started)

    def batched(self, calls: Sequence[Observed], images: int, started: float, ended: float) -> None:
        self._batches.observe(images)
        self._batch_seconds.inc(ended - started)

    def looked_up(self, is_hit: bool) -> None:
        self._lookups.labels("hit" if is_hit else "miss").inc()

    async def watch_loop(self) -> None:
        """Measure how late the event loop is, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_EVERY
            await asyncio.sleep(_LAG_EVERY)
            self._lag.observe(max(0.0, loop.time() - due))


def _name(call: Observed) -> str:
    return call.method.removeprefix("/")
