"""/metrics, /healthz and /readyz of several processes, on one port of their parent.

Each worker answers the same on a socket that only this user can open; the parent asks all of them. What a worker counts
has its number as the label `worker` and is not added up: a worker that is started anew counts from zero, and of a sum
that fell Prometheus would take the rest for new. What all share, how many galleries there are and their disk, is told
once. Of one gallery the worker that writes alone tells: the others seal nothing, and know of no failure of that.
"""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from http import HTTPStatus
from pathlib import Path

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.openmetrics.exposition import CONTENT_TYPE_LATEST
from prometheus_client.openmetrics.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from service.telemetry.probes import Probes

LABEL = "worker"

SHARED = ("lookalike_build", "lookalike_disk_", "lookalike_galleries")
"""How names of metrics begin that are the same for all workers; the first that answers tells them."""

WRITERS = "lookalike_gallery_"
"""How names of metrics begin that the worker which writes tells, and nobody while it does not answer."""

_PATIENCE_SECONDS = 5.0
_READY = "lookalike_ready"


class Gathered(Collector):
    """What all workers export. `collect` waits for them: call it in a thread."""

    def __init__(self, workers: Sequence[Path]) -> None:
        """`workers` are their sockets, by number."""
        self._workers = workers

    def describe(self) -> Iterable[Metric]:
        """Nothing: the workers do not listen yet when this is registered."""
        return ()

    def collect(self) -> Iterator[Metric]:
        families: dict[str, Metric] = {}
        told: set[str] = set()  # shared families that another worker has told
        for number, answer in enumerate(_asked_all(self._workers, "/metrics")):
            if not isinstance(answer, bytes):
                ready = families.setdefault(_READY, GaugeMetricFamily(_READY, "1 while calls are answered, 0 else."))
                ready.add_sample(_READY, {LABEL: str(number)}, 0.0)
                continue
            shared = set()
            for family in text_string_to_metric_families(answer.decode()):  # type: ignore[no-untyped-call]
                of_writer = family.name.startswith(WRITERS)
                is_shared = of_writer or family.name.startswith(SHARED)
                if family.name in told or (of_writer and number != 0):
                    continue
                kept = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
                for sample in family.samples:
                    labels = sample.labels if is_shared else {**sample.labels, LABEL: str(number)}
                    kept.add_sample(sample.name, labels, sample.value)
                if is_shared:
                    shared.add(family.name)
            told |= shared
        yield from families.values()


class GatheredProbes(Probes):
    """Alive while no worker hangs, and ready while one answers."""

    def __init__(self, workers: Sequence[Path]) -> None:
        registry = CollectorRegistry()
        registry.register(Gathered(workers))
        super().__init__(registry, lambda: "")
        self._workers = workers

    async def hanging(self) -> str:
        answers = await asyncio.to_thread(_asked_all, self._workers, "/healthz")
        return ", ".join(f"worker {number}" for number, each in enumerate(answers) if isinstance(each, TimeoutError))

    async def state(self) -> str:
        answers = await asyncio.to_thread(_asked_all, self._workers, "/readyz")
        states = [each.decode().strip() for each in answers if isinstance(each, bytes)]
        return "serving" if "serving" in states else next(iter(states), "loading")


class ParentEndpoint:
    """`GatheredProbes` on a thread of its own, for a parent that has no event loop."""

    def __init__(self, workers: Sequence[Path]) -> None:
        self._probes = GatheredProbes(workers)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="probes", daemon=True)

    def start(self, host: str, port: int) -> int:
        """Listen; returns the port. Raises Busy or InvalidInput."""
        self._thread.start()
        try:
            return asyncio.run_coroutine_threadsafe(self._probes.start(host, port), self._loop).result()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Close the port."""
        asyncio.run_coroutine_threadsafe(self._probes.stop(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _asked_all(workers: Sequence[Path], what: str) -> list[bytes | OSError]:
    with ThreadPoolExecutor(len(workers)) as threads:
        return list(threads.map(lambda path: _asked(path, what), workers))


def _asked(path: Path, what: str) -> bytes | OSError:
    """What a worker answers, whatever its status; TimeoutError from one that hangs, others where there is none."""
    request = f"GET {what} HTTP/1.1\r\nAccept: {CONTENT_TYPE_LATEST}\r\n\r\n"
    answer = bytearray()
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_PATIENCE_SECONDS)
            connection.connect(str(path))
            connection.sendall(request.encode())
            while part := connection.recv(2**16):
                answer += part
    except OSError as error:
        return error
    head, _, body = bytes(answer).partition(b"\r\n\r\n")
    if f" {HTTPStatus.INTERNAL_SERVER_ERROR.value} ".encode() in head.partition(b"\r\n")[0]:
        return OSError("the worker cannot collect its metrics; its log says why")
    return body
