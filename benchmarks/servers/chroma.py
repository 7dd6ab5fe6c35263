"""Chroma's server, asked by its HTTP client."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.servers.load import Ask, K, Vectors

_ROWS_AT_ONCE = 5000


class Chroma:
    """A server of its own, with one collection."""

    efforts = (16, 32, 64, 128, 256, 512)

    def __init__(self, folder: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self._port = free.getsockname()[1]
        command = [str(Path(sys.executable).parent / "chroma"), "run", "--path", str(folder / "chroma")]
        command += ["--host", "127.0.0.1", "--port", str(self._port)]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._client = self._connected()

    def load(self, vectors_ND: Vectors) -> None:
        index = {"hnsw": {"space": "l2", "max_neighbors": 16, "ef_construction": 100}}
        items = self._client.create_collection("items", configuration=index, embedding_function=None)
        for start in range(0, len(vectors_ND), _ROWS_AT_ONCE):
            some_nD = vectors_ND[start : start + _ROWS_AT_ONCE]
            items.add(ids=[str(start + row) for row in range(len(some_nD))], embeddings=some_nD)

    def tune(self, effort: int) -> None:
        items = self._client.get_collection("items", embedding_function=None)
        items.modify(configuration={"hnsw": {"ef_search": effort}})

    def connect(self) -> Ask:
        items = self._connected().get_collection("items", embedding_function=None)

        def ask(queries_QD: Vectors) -> list[list[int]]:
            found = items.query(query_embeddings=queries_QD, n_results=K, include=["distances"])
            return [[int(name) for name in names] for names in found["ids"]]

        return ask

    def close(self) -> None:
        self._server.terminate()
        self._server.wait()

    def _connected(self) -> Any:
        import chromadb

        settings = chromadb.config.Settings(anonymized_telemetry=False)
        until = time.monotonic() + 60
        while True:
            try:
                return chromadb.HttpClient(host="127.0.0.1", port=self._port, settings=settings)
            except Exception:  # it says in several ways that the server does not listen yet
                if self._server.poll() is not None or time.monotonic() > until:
                    raise
                time.sleep(0.1)


def driver(folder: Path) -> Chroma:
    return Chroma(folder)
