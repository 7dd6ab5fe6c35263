"""Long work in threads of its own, that can be watched, waited for and cancelled; without grpc.

Operations live in memory: what they have written is durable, that they ran is not.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, TypeVar

from embedding.errors import Busy, Cancelled, LookalikeError, NotFound, RequestIdReused
from embedding.runtime import trim_malloc
from index import Progress
from index.engine import OnProgress
from index.receipts import Token

R = TypeVar("R")

MAX_KEPT = 1000
"""Operations remembered; of the finished ones the oldest are forgotten first."""
MAX_WAITING = 64
"""Operations that may wait for a thread."""


@dataclass(eq=False)
class Operation(Generic[R]):
    """One piece of long work; its fields change while it runs."""

    id: str
    verb: str
    target: str
    """The gallery that it works on."""
    created: datetime
    progress: Progress = field(default_factory=lambda: Progress(stage="waiting", done=0, total=0))
    ended: datetime | None = None
    result: R | None = None
    error: BaseException | None = None
    """Why it failed: a LookalikeError, Cancelled among them, or what nobody foresaw."""
    request_id: str = ""
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _finished: threading.Event = field(default_factory=threading.Event)

    @property
    def done(self) -> bool:
        return self._finished.is_set()

    def cancel(self) -> None:
        """End it at its next progress."""
        self._cancelled.set()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it is done within `seconds`."""
        return self._finished.wait(seconds)

    def run(self, work: Callable[[OnProgress], R]) -> None:
        """Do the work in this thread and keep what came of it."""
        try:
            self._tell(Progress(stage="beginning", done=0, total=0))
            self.result = work(self._tell)
        except Exception as error:
            self.error = error
        finally:
            self.ended = datetime.now(UTC)
            self._finished.set()
            trim_malloc()  # indexing takes several times what the index does, and gives it back at once

    def _tell(self, progress: Progress) -> None:
        if self._cancelled.is_set():
            raise Cancelled(f"{self.verb} of gallery {self.target!r} was cancelled")
        self.progress = progress


class Operations:
    """The operations of one process; every method may be called from any thread."""

    def __init__(self, *, threads: int = 1) -> None:
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="operation")
        self._operations: dict[str, Operation[Any]] = {}
        self._futures: dict[str, Future[None]] = {}
        self._asked: dict[str, tuple[bytes, str]] = {}  # by request id: what for, and the operation
        self._changing = threading.Lock()
        self._newest = datetime.fromtimestamp(0, UTC)

    def begun(self, token: Token | None) -> Operation[Any] | None:
        """The operation that this very request has begun; None when it has not. Raises RequestIdReused."""
        digest, operation_id = self._asked.get(token.id, (b"", "")) if token is not None else (b"", "")
        if token is not None and digest not in {b"", token.digest}:
            raise RequestIdReused(
                f"request_id {token.id} was given with another request; make a new one for every request",
                field="request_id",
            )
        return self._operations.get(operation_id)

    def start(
        self, verb: str, target: str, work: Callable[[OnProgress], R], *, token: Token | None = None
    ) -> Operation[R]:
        """Begin `work`, which is given a function to tell its progress to, once for a token.

        Raises Busy when too many wait, and RequestIdReused.
        """
        with self._changing:
            if (same := self.begun(token)) is not None:
                return same
            running = [each for each in self._operations.values() if not each.done]
            if len(running) >= MAX_WAITING:
                raise Busy(f"{len(running)} operations are running or waiting; try again when some have ended")
            for each in [each for each in self._operations.values() if each.done][: -(MAX_KEPT - MAX_WAITING)]:
                self._forget(each.id)
            operation: Operation[R] = Operation(uuid.uuid4().hex, verb, target, self._created())
            if token is not None:
                self._asked[token.id] = (token.digest, operation.id)
                operation.request_id = token.id
            self._operations[operation.id] = operation
            self._futures[operation.id] = self._pool.submit(operation.run, work)
        return operation

    def get(self, operation_id: str) -> Operation[Any]:
        """Raises NotFound."""
        try:
            return self._operations[operation_id]
        except KeyError:
            raise NotFound(
                f"no operation {operation_id!r} here; operations are forgotten when the server stops", field="name"
            ) from None

    def all(self) -> list[Operation[Any]]:
        """Those remembered, the oldest first."""
        return list(self._operations.values())

    def delete(self, operation_id: str) -> None:
        """Forget an operation that is done. Raises NotFound, and Busy while it runs."""
        operation = self.get(operation_id)
        if not operation.done:
            raise Busy(f"operation {operation_id!r} still runs; cancel it first, or wait for it")
        with self._changing:
            self._forget(operation_id)

    def close(self) -> None:
        """Cancel what runs and wait for it to end."""
        for operation in self.all():
            operation.cancel()
        self._pool.shutdown()

    def _created(self) -> datetime:
        """Now, and later than any before: lists continue by it."""
        self._newest = max(datetime.now(UTC), self._newest + timedelta(microseconds=1))
        return self._newest

    def _forget(self, operation_id: str) -> None:
        operation = self._operations.pop(operation_id, None)
        if operation is not None:
            self._asked.pop(operation.request_id, None)
        self._futures.pop(operation_id, None)


def value(operation: Operation[R]) -> R:
    """The result of one that is done. Raises what it failed with."""
    if operation.error is not None:
        raise operation.error
    if operation.result is None:
        raise LookalikeError(f"operation {operation.id!r} has no result yet")
    return operation.result
