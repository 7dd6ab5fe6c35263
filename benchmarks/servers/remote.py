"""The benchmark's side of a load generator: starts it, gives it data, asks it to measure.

The environment of the peers' clients is named by `LOOKALIKE_PEERS`, the path of its Python; without it this Python is
taken, which has them where the extra `bench-servers` is installed.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from embedding.decision import Vectors

ROOT = Path(__file__).resolve().parents[2]
PEERS = {
    "PostgreSQL + pgvector": ("pgvector",),
    "Chroma": ("chroma",),
    "milvus-lite": ("milvus", "lite"),
    "Milvus 2.3.5": ("milvus", "server"),
}
"""The arguments of `load` by the name of the peer."""

SLOW_TO_START = "Milvus 2.3.5"
"""Half a minute until it answers: left out where everything must be done within one."""

_CORES = sorted(os.sched_getaffinity(0))
SERVER_CPUS = ",".join(map(str, _CORES[: max(1, len(_CORES) // 2)]))
CLIENT_CPUS = ",".join(map(str, _CORES[len(_CORES) // 2 :]))


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What a load generator saw."""

    rate: float
    """Queries answered a second."""
    p50_ms: float
    p99_ms: float


@dataclass(frozen=True, kw_only=True)
class Data:
    """Rows, queries and the true neighbours of these, as files."""

    vectors: Path
    queries: Path
    truth: Path

    @classmethod
    def written(cls, folder: Path, vectors_ND: Vectors, queries_QD: Vectors, truth_QK: NDArray[np.int64]) -> Data:
        arrays: dict[str, NDArray[Any]] = {"vectors": vectors_ND, "queries": queries_QD, "truth": truth_QK}
        paths = {name: folder / f"{name}.npy" for name in arrays}
        for name, array in arrays.items():
            np.save(paths[name], array)
        return cls(**paths)


class Load:
    """A load generator that runs."""

    def __init__(self, process: subprocess.Popen[str], data: Data) -> None:
        self._process = process
        self._data = data

    def fill(self) -> float:
        """Store and index the rows; the seconds that it took."""
        taken: float = self._do("load", str(self._data.vectors))
        return taken

    def tune(self, recall: float) -> float:
        """Search as hard as this recall takes; what was reached."""
        tuned = self._do("tune", str(self._data.queries), str(self._data.truth), recall)
        reached: float = tuned["recall"]
        return reached

    def measure(self, *, in_flight: int, seconds: float, batch: int = 1) -> Measured:
        """Ask on and on, `in_flight` calls of `batch` queries at a time."""
        return Measured(**self._do("measure", str(self._data.queries), in_flight, batch, seconds))

    def pause(self) -> None:
        """Stand still, with the server: an idle one may still take a third of a core."""
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """After `pause`."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGCONT)

    def _do(self, *command: Any) -> Any:
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps(command), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"the load generator ended at {command[0]}; what it said stands above")
        return json.loads(line)


@contextmanager
def loading(*arguments: str, data: Data, python: str | None = None) -> Iterator[Load]:
    """A load generator with this driver and its arguments, in the peers' environment unless another is given."""
    with tempfile.TemporaryDirectory(prefix="lookalike-bench-") as folder:
        Path(folder).chmod(0o755)  # PostgreSQL may run as another user
        name, *more = arguments
        process = subprocess.Popen(
            [python or _peers_python(), "-m", "benchmarks.servers.load", name, folder, SERVER_CPUS, CLIENT_CPUS, *more],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "ANONYMIZED_TELEMETRY": "False"},
            start_new_session=True,  # a group of processes that stand still together
        )
        load = Load(process, data)
        try:
            yield load
        finally:
            load.resume()
            assert process.stdin
            process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()


def _peers_python() -> str:
    return os.environ.get("LOOKALIKE_PEERS") or sys.executable
