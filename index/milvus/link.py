"""The wire to Milvus: every call of the engine, with deadlines kept and errors told in our words.

Calls run in threads of their own, so that one that must be given up is left behind within 20 ms, and calls that do not
need one another share the wait for Milvus's clock (0.2 s a strongly consistent read on a server).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import grpc
from pymilvus import MilvusClient
from pymilvus.exceptions import MilvusException

from embedding.decision import Vectors
from embedding.errors import Busy, InvalidInput, StorageFailed
from embedding.masking import masked
from index.deadline import Deadline

MOST_ROWS = 16_384
"""The most rows that a server returns for one query. Lite would return more, and is not asked to."""

Row = dict[str, Any]
Answered = TypeVar("Answered")

_TIMEOUT = 60.0  # seconds of one call without a deadline
_LOOK = 0.02  # seconds between two looks at the deadline
_THREADS = 32
_STRONG = {"consistency_level": "Strong"}
_FULL = ("maxoutputsize", "resource_exhausted", "larger than max", "exceed the max")
_PARTS_AWAY = ("fail connecting", "not available", "not connected", "offline", "not loaded")
_AWAY = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}


class TooMuch(Exception):
    """An answer larger than Milvus sends: ask for less at once."""


class Link:
    """One connection. `uri` is that of a server, or the path of a Milvus Lite file, which ends in `.db`."""

    def __init__(self, uri: str, *, token: str = "", database: str = "") -> None:
        logging.getLogger("pymilvus").setLevel(logging.CRITICAL)  # it logs, with a traceback, what it raises
        self.uri = uri
        self._shown = masked(uri)  # callers are told what Milvus says
        self._lite = uri.endswith(".db")
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="milvus")
        if self._lite:
            Path(uri).resolve().parent.mkdir(parents=True, exist_ok=True)
        try:
            self.client = self._told(lambda: MilvusClient(uri, token=token, db_name=database, timeout=10.0))
        except BaseException:
            self._threads.shutdown(wait=False)
            raise

    def close(self) -> None:
        """Hang up; Milvus Lite stops and unlocks its file."""
        self._threads.shutdown(wait=True, cancel_futures=True)
        with suppress(MilvusException, grpc.RpcError):
            self.client.close()
        if self._lite:
            from milvus_lite.server_manager import server_manager_instance

            server_manager_instance.release_server(self.uri)

    def together(self, *calls: Callable[[], Any], deadline: Deadline | None = None) -> list[Any]:
        """What each call answers, all asked at once. Raises what the first that fails raises."""
        if deadline:
            deadline.check()
        begun = [self._threads.submit(call) for call in calls]
        return [_awaited(one, deadline) for one in begun]

    # Reading: strongly consistent, so that what a write has acknowledged is seen.

    def query(
        self,
        collection: str,
        where: str,
        fields: Sequence[str],
        *,
        limit: int = MOST_ROWS,
        seconds: float | None = None,
    ) -> list[Row]:
        """Up to `limit` rows, in no order. Raises TooMuch."""
        return self._told(
            lambda: list(
                self.client.query(
                    collection,
                    filter=where,
                    output_fields=list(fields),
                    limit=limit,
                    timeout=seconds or _TIMEOUT,
                    **_STRONG,
                )
            )
        )

    def count(self, collection: str, where: str) -> int:
        rows = self._told(
            lambda: self.client.query(collection, filter=where, output_fields=["count(*)"], timeout=_TIMEOUT, **_STRONG)
        )
        return int(rows[0]["count(*)"])

    def search(
        self,
        collection: str,
        queries_QD: Vectors,
        where: str,
        fields: Sequence[str],
        *,
        limit: int,
        seconds: float | None,
    ) -> list[list[tuple[float, Row]]]:
        """For each query up to `limit` nearest rows, each after its squared distance. Raises TooMuch."""
        found = self._told(
            lambda: self.client.search(
                collection,
                data=list(queries_QD),
                filter=where,
                limit=limit,
                output_fields=list(fields),
                search_params={"metric_type": "L2"},
                timeout=seconds or _TIMEOUT,
                **_STRONG,
            )
        )
        return [[(float(hit["distance"]), dict(hit["entity"])) for hit in hits] for hits in found]

    # Writing: `upsert` alone, because `insert` stores a key twice on a server.

    def upsert(self, collection: str, rows: Sequence[Mapping[str, Any]]) -> None:
        self._told(lambda: self.client.upsert(collection, data=list(rows), timeout=_TIMEOUT))

    def delete(self, collection: str, where: str) -> None:
        self._told(lambda: self.client.delete(collection, filter=where, timeout=_TIMEOUT))

    # Collections

    def collections(self) -> list[str]:
        return self._told(lambda: list(self.client.list_collections(timeout=_TIMEOUT)))

    def drop(self, collection: str) -> None:
        self._told(lambda: self.client.drop_collection(collection, timeout=_TIMEOUT))

    def load(self, collection: str) -> None:
        self._told(lambda: self.client.load_collection(collection, timeout=_TIMEOUT))

    def compact(self, collection: str) -> None:
        self._told(lambda: self.client.compact(collection, timeout=_TIMEOUT))

    def create(self, collection: str, schema: Any, *, vector: str) -> None:
        """Make and load a collection whose vectors are searched exactly."""

        def make() -> None:
            index = self.client.prepare_index_params()
            index.add_index(vector, index_type="FLAT", metric_type="L2")
            self.client.create_collection(collection, schema=schema, consistency_level="Strong", timeout=_TIMEOUT)
            # Nothing is there yet: the client would look for the end of building it every half a second.
            self.client.create_index(collection, index, sync=False, timeout=_TIMEOUT)
            self.client.load_collection(collection, timeout=_TIMEOUT)

        self._told(make)

    def _told(self, call: Callable[[], Answered]) -> Answered:
        """Raises Busy when Milvus cannot be reached or a part of it is away, StorageFailed when it refuses."""
        try:
            return call()
        except grpc.RpcError as error:
            code = getattr(error, "code", None)
            raise self._refusal(error, code() if callable(code) else None) from error
        except MilvusException as error:
            code = error.code if isinstance(error.code, grpc.StatusCode) else None
            raise self._refusal(error, code) from error

    def _refusal(self, error: Exception, code: grpc.StatusCode | None) -> Exception:
        what = str(getattr(error, "message", "") or error).replace(self.uri, self._shown)
        what = " ".join(what.split())[:300]
        if any(sign in what.lower() for sign in _FULL):
            return TooMuch(what)
        if code is grpc.StatusCode.UNAUTHENTICATED or "auth check failure" in what:
            return InvalidInput(
                f"Milvus at {self._shown} refuses the token ({what}); set milvus_token", field="milvus_token"
            )
        if code in _AWAY or any(sign in what.lower() for sign in _PARTS_AWAY):
            return Busy(
                f"Milvus at {self._shown} cannot be reached, or a part of it ({what}); look after it, then try again"
            )
        return StorageFailed(f"Milvus at {self._shown} refused: {what}")


def seconds_left(deadline: Deadline | None) -> float | None:
    """For one call; None for the usual time limit."""
    left = None if deadline is None else deadline.seconds_left
    return None if left is None else min(max(left, 0.001), _TIMEOUT)


def _awaited(begun: Future[Answered], deadline: Deadline | None) -> Answered:
    while True:
        try:
            return begun.result(_LOOK if deadline else None)
        except NotYet:
            if begun.done():  # it is the call that raised it
                raise
            if deadline:
                deadline.check()
        except Busy:
            if deadline:  # it may be the time limit that ended the call
                deadline.check()
            raise
