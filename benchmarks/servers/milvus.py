"""Milvus, Lite and the real server that the wheel `milvus` carries, asked by pymilvus."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.servers.load import Ask, K, Vectors

_ROWS_AT_ONCE = 5000
_START_SECONDS = 120.0
_FIXED_PORTS = (2379, 2380, 9091)  # of its own etcd and metrics, which no option moves


class Milvus:
    """One collection behind a uri."""

    efforts = (16, 32, 64, 128, 256, 512)

    def __init__(self, uri: str, server: subprocess.Popen[bytes] | None = None) -> None:
        self._uri = uri
        self._server = server
        self._effort = self.efforts[0]
        try:
            self._client = self._connected()
        except BaseException:
            self._stop()
            raise

    def load(self, vectors_ND: Vectors) -> None:
        from pymilvus import DataType

        schema = self._client.create_schema(auto_id=False)
        schema.add_field("id", DataType.INT64, is_primary=True)
        schema.add_field("embedding", DataType.FLOAT_VECTOR, dim=vectors_ND.shape[1])
        self._client.create_collection("items", schema=schema)
        for start in range(0, len(vectors_ND), _ROWS_AT_ONCE):
            some_nD = vectors_ND[start : start + _ROWS_AT_ONCE]
            self._client.insert("items", [{"id": start + i, "embedding": row} for i, row in enumerate(some_nD)])
        self._client.flush("items")
        index = self._client.prepare_index_params()
        index.add_index("embedding", index_type="HNSW", metric_type="L2", params={"M": 16, "efConstruction": 100})
        self._client.create_index("items", index)
        self._client.load_collection("items")

    def tune(self, effort: int) -> None:
        self._effort = effort

    def connect(self) -> Ask:
        client = self._client if self._server is None else self._connected()  # Lite has one process, ours
        how = {"metric_type": "L2", "params": {"ef": self._effort}}

        def ask(queries_QD: Vectors) -> list[list[int]]:
            found = client.search("items", list(queries_QD), limit=K, search_params=how, anns_field="embedding")
            return [[hit["id"] for hit in hits] for hits in found]

        return ask

    def close(self) -> None:
        self._client.close()
        self._stop()

    def _stop(self) -> None:
        if self._server is None:
            return
        with suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGINT)  # it has processes of its own
        with suppress(subprocess.TimeoutExpired):
            self._server.wait(30)
        with suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)  # one of these that is left would hold its fixed ports

    def _connected(self) -> Any:
        from pymilvus import MilvusClient

        until = time.monotonic() + _START_SECONDS
        while True:
            try:
                client = MilvusClient(self._uri)
                client.list_collections()
                return client
            except Exception:  # it says in several ways that the server is not ready yet
                if self._server is None or self._server.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(1)


def driver(folder: Path, kind: str) -> Milvus:
    if kind == "lite":
        return Milvus(str(folder / "lite.db"))
    for fixed in _FIXED_PORTS:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", fixed)) == 0:  # it would start, and never answer
                raise RuntimeError(f"port {fixed}, which a Milvus server needs, is taken: stop what listens there")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).parent / "milvus-server"), "--data", str(folder / "milvus")]
    command += ["--proxy-port", str(port)]
    with (folder / "milvus.log").open("wb") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
    return Milvus(f"http://127.0.0.1:{port}", server)
