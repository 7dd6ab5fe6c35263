"""Our server, which the caller has started and filled, asked by the client that users have."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from benchmarks.servers.load import Ask, K, Vectors
from lookalike import CallFailed, Client, Effort, Neighbors


class Ours:
    """A server at an address."""

    efforts = (0,)  # the gallery is tuned by itself

    def __init__(self, address: str, gallery: str, way: str) -> None:
        """`way` is "call", "columns", "exact" (calls that measure every item) or "stream"."""
        self._client = Client(address, timeout=60)
        self._gallery = gallery
        self._way = way

    def load(self, vectors_ND: Vectors) -> None:
        raise NotImplementedError("the caller fills the gallery")

    def tune(self, effort: int) -> None:
        """Nothing to set."""

    def connect(self) -> Ask:
        client, gallery = self._client, self._gallery
        effort = Effort(exact=True) if self._way == "exact" else None

        def ask(queries_QD: Vectors) -> list[list[int]]:
            found: list[Neighbors | CallFailed]
            if self._way == "columns":
                columns = client.search_columns(gallery, queries_QD, k=K)
                if columns.errors:
                    raise next(iter(columns.errors.values()))
                return np.array(columns.ids, np.int64).reshape(len(queries_QD), -1).tolist()
            if self._way == "stream":
                found = list(client.search_stream(gallery, queries_QD, k=K, together=32))
            elif len(queries_QD) == 1:
                found = [client.search(gallery, queries_QD[0], k=K, effort=effort)]
            else:
                found = client.search_batch(gallery, queries_QD, k=K, effort=effort)
            return [_rows(neighbors) for neighbors in found]

        return ask

    def close(self) -> None:
        self._client.close()


def _rows(found: Neighbors | CallFailed) -> list[int]:
    if isinstance(found, CallFailed):
        raise found
    return list(map(int, found.ids))


def driver(folder: Path, address: str, gallery: str, way: str = "call") -> Ours:
    return Ours(address, gallery, way)
