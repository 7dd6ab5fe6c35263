"""Loads a server from a process of its own, and says what it answered: a command a line in, an answer a line out.

    python -m benchmarks.servers.load DRIVER FOLDER SERVER_CPUS CLIENT_CPUS [ARGUMENT...]

Imports numpy, and what its driver needs: it runs in an environment of the peer's client. Shapes: N rows, Q queries.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

Vectors = np.ndarray[Any, np.dtype[np.float32]]
Ask = Callable[[Vectors], Sequence[Sequence[int]]]
"""Queries [Q, D] in one call; for each the numbers of its nearest rows."""

K = 10


class Driver(Protocol):
    """One kind of server. Its module has `driver(folder, *arguments)`."""

    efforts: Sequence[int]
    """Settings to try, cheapest first; the first that reaches the recall is measured."""

    def load(self, vectors_ND: Vectors) -> None:
        """Store rows, named by their number, and index them."""

    def tune(self, effort: int) -> None:
        """Search this hard from now on."""

    def connect(self) -> Ask:
        """A connection for one thread."""

    def close(self) -> None:
        """Stop the server."""


def main() -> None:
    name, folder, server_cpus, client_cpus, *arguments = sys.argv[1:]
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not be taken for an answer
    os.sched_setaffinity(0, _cpus(server_cpus))  # for the server, which inherits it
    driver: Driver = importlib.import_module(f"benchmarks.servers.{name}").driver(Path(folder), *arguments)
    for thread in Path("/proc/self/task").iterdir():
        os.sched_setaffinity(int(thread.name), _cpus(client_cpus))
    try:
        for line in sys.stdin:
            command, *values = json.loads(line)
            print(json.dumps(_COMMANDS[command](driver, *values)), file=out, flush=True)
    finally:
        driver.close()


def _cpus(text: str) -> set[int]:
    return {int(cpu) for cpu in text.split(",")}


def _load(driver: Driver, vectors: str) -> float:
    """Seconds."""
    begun = time.perf_counter()
    driver.load(np.load(vectors))
    return time.perf_counter() - begun


def _tune(driver: Driver, queries: str, truth: str, recall: float) -> dict[str, float]:
    """The recall reached, and the effort it took."""
    queries_QD, truth_QK = np.load(queries), np.load(truth)
    reached, effort = 0.0, 0
    for effort in driver.efforts:
        driver.tune(effort)
        ask = driver.connect()
        found = [ask(query_D[None])[0] for query_D in queries_QD]
        reached = sum(len(set(f[:K]) & set(t)) for f, t in zip(found, truth_QK.tolist(), strict=True)) / truth_QK.size
        if reached >= recall:
            break
    return {"recall": reached, "effort": effort}


def _measure(driver: Driver, queries: str, in_flight: int, batch: int, seconds: float) -> dict[str, float]:
    """Queries a second, and milliseconds of a call at the median and the 99th percentile."""
    queries_QD = np.load(queries)
    batches = [queries_QD[at : at + batch] for at in range(0, len(queries_QD) - batch + 1, batch)]
    taken: list[float] = []
    ready, errors = threading.Barrier(in_flight + 1), list[BaseException]()
    ends = [0.0]

    def ask_on(first: int) -> None:
        try:
            ask, mine, at = driver.connect(), [], first
            ask(batches[at % len(batches)])
            ready.wait()
            while True:
                begun = time.perf_counter()
                if begun >= ends[0]:
                    break
                ask(batches[at % len(batches)])
                mine.append(time.perf_counter() - begun)
                at += in_flight
            taken.extend(mine)
        except BaseException as error:
            errors.append(error)
            ready.abort()
            raise

    ends[0] = time.perf_counter() + 3600
    threads = [threading.Thread(target=ask_on, args=(at,)) for at in range(in_flight)]
    for thread in threads:
        thread.start()
    ready.wait()
    begun = time.perf_counter()
    ends[0] = begun + seconds
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    p50, p99 = np.percentile(taken, [50, 99])
    rate = len(taken) * batch / (time.perf_counter() - begun)
    return {"rate": rate, "p50_ms": 1e3 * float(p50), "p99_ms": 1e3 * float(p99)}


_COMMANDS: dict[str, Callable[..., Any]] = {"load": _load, "tune": _tune, "measure": _measure}

if __name__ == "__main__":
    main()
