"""Long work in threads of its own, that can be watched, waited for and cancelled; without grpc.

Operations live in memory: what they have written is durable, that they ran is not. Those of one gallery run one after
the other in the order in which they were asked for; of those that build an index or embed a gallery anew, which take a
core and up to a gigabyte, one runs at a time; copies run beside it.
"""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Collection, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Generic, NamedTuple, TypeVar

import structlog

from embedding.errors import Busy, Cancelled, LookalikeError, NotFound
from embedding.runtime import trim_malloc
from index import ModelRef, Progress
from index.engine import OnProgress
from index.receipts import Token, reused

R = TypeVar("R")

_log = structlog.get_logger(__name__)

MAX_KEPT = 1000
"""Operations remembered; of the finished ones the oldest are forgotten first."""
MAX_WAITING = 64
"""Operations that may wait or run."""
THREADS = 3
"""Operations that run at once: one that builds, and copies beside it, for which the disk sets the pace."""


class Makes(NamedTuple):
    """A gallery that an operation makes or fills, and the model of its embeddings."""

    gallery: str
    model: ModelRef


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
    galleries: frozenset[str] = frozenset()
    """All that it reads or writes."""
    builds: bool = False
    """Whether it builds an index or embeds."""
    makes: Makes | None = None
    """What nobody could search, were the model unloaded before it ends."""
    withdraw: Callable[[], None] = lambda: None
    """Takes it from those that wait, if it is there."""
    _cancelled: threading.Event = field(default_factory=threading.Event)
    _finished: threading.Event = field(default_factory=threading.Event)

    @property
    def done(self) -> bool:
        return self._finished.is_set()

    def cancel(self) -> None:
        """End it at once when it waits, or else at its next progress."""
        self._cancelled.set()
        self.withdraw()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it is done within `seconds`."""
        return self._finished.wait(seconds)

    def end_unbegun(self) -> None:
        """It was cancelled while it waited."""
        self.error = self._cancellation()
        self.ended = datetime.now(UTC)
        self._finished.set()

    def run(self, work: Callable[[OnProgress], R]) -> None:
        """Do the work in this thread and keep what came of it."""
        try:
            self._tell(Progress(stage="beginning", done=0, total=0))
            self.result = work(self._tell)
        except Exception as error:
            self.error = error
            if not isinstance(error, LookalikeError):  # here, since nobody may ever ask what became of it
                _log.error(
                    "an operation failed", operation=self.id, verb=self.verb, gallery=self.target, exc_info=error
                )
        finally:
            self.ended = datetime.now(UTC)
            self._finished.set()
            trim_malloc()  # indexing takes several times what the index does, and gives it back at once

    def _tell(self, progress: Progress) -> None:
        if self._cancelled.is_set():
            raise self._cancellation()
        self.progress = progress

    def _cancellation(self) -> Cancelled:
        return Cancelled(f"{self.verb} of gallery {self.target!r} was cancelled")


class Operations:
    """The operations of one process; every method may be called from any thread."""

    def __init__(self, *, threads: int = THREADS) -> None:
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="operation")
        self._operations: dict[str, Operation[Any]] = {}
        self._waiting: dict[
            Operation[Any], Callable[[OnProgress], Any]
        ] = {}  # in the order in which they were asked for
        self._running: set[Operation[Any]] = set()
        self._closed = False
        self._asked: dict[str, tuple[bytes, str]] = {}  # by request id: what for, and the operation
        self._changing = threading.Lock()
        self._newest = datetime.fromtimestamp(0, UTC)

    def begun(self, token: Token | None) -> Operation[Any] | None:
        """The operation that this very request has begun; None when it has not. Raises RequestIdReused."""
        digest, operation_id = self._asked.get(token.id, (b"", "")) if token is not None else (b"", "")
        if token is not None and digest not in {b"", token.digest}:
            raise reused(token)
        return self._operations.get(operation_id)

    def start(
        self,
        verb: str,
        target: str,
        work: Callable[[OnProgress], R],
        *,
        others: Iterable[str] = (),
        builds: bool = False,
        makes: Makes | None = None,
        token: Token | None = None,
    ) -> Operation[R]:
        """Begin `work`, which is given a function to tell its progress to, once for a token, when its turn comes.

        `others` are further galleries that it reads or writes; `builds` whether it takes as much as building an index;
        `makes` what it needs a model for.
        Raises Busy when too many wait, and RequestIdReused.
        """
        with self._changing:
            if (same := self.begun(token)) is not None:
                return same
            if self._closed:
                raise Busy("the server is stopping; ask again when it has started anew")
            running = [each for each in self._operations.values() if not each.done]
            if len(running) >= MAX_WAITING:
                raise Busy(f"{len(running)} operations are running or waiting; try again when some have ended")
            for each in [each for each in self._operations.values() if each.done][: -(MAX_KEPT - MAX_WAITING)]:
                self._forget(each.id)
            operation: Operation[R] = Operation(
                uuid.uuid4().hex,
                verb,
                target,
                self._created(),
                galleries=frozenset({target, *others}),
                builds=builds,
                makes=makes,
            )
            operation.withdraw = lambda: self._withdraw(operation)
            if token is not None:
                self._asked[token.id] = (token.digest, operation.id)
                operation.request_id = token.id
            self._operations[operation.id] = operation
            self._waiting[operation] = work
            self._begin()
        return operation

    def get(self, operation_id: str) -> Operation[Any]:
        """Raises NotFound."""
        try:
            return self._operations[operation_id]
        except KeyError:
            raise NotFound(
                f"no operation {operation_id!r} here; operations end and are forgotten when the server stops: look "
                "what there is of its work, and ask for it again where that is not all",
                field="name",
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
        """Cancel what runs and wait for it to end; nothing begins any more."""
        with self._changing:
            self._closed = True
        for operation in self.all():
            operation.cancel()
        self._pool.shutdown()

    def _begin(self) -> None:
        """Whatever has its turn; the caller holds the lock."""
        taken = {gallery for each in self._running for gallery in each.galleries}
        for operation, work in list(self._waiting.items()):
            if self._closed or len(self._running) >= self._threads:
                break
            if self._may_begin(operation, taken):
                del self._waiting[operation]
                self._running.add(operation)
                # In nobody's name: who asked for it had rights on its galleries, which it knows by their ids.
                self._pool.submit(Context().run, self._run, operation, work)
            taken |= operation.galleries  # who came later waits for this one, whether it runs or waits

    def _may_begin(self, operation: Operation[Any], taken: Collection[str]) -> bool:
        if operation.builds and any(each.builds for each in self._running):
            return False
        return operation.galleries.isdisjoint(taken)

    def _run(self, operation: Operation[R], work: Callable[[OnProgress], R]) -> None:
        try:
            operation.run(work)
        finally:
            with self._changing:
                self._running.discard(operation)
                self._begin()

    def _withdraw(self, operation: Operation[Any]) -> None:
        with self._changing:
            if self._waiting.pop(operation, None) is None:
                return
            operation.end_unbegun()
            self._begin()  # those that waited for it alone

    def _created(self) -> datetime:
        """Now, and later than any before: lists continue by it."""
        self._newest = max(datetime.now(UTC), self._newest + timedelta(microseconds=1))
        return self._newest

    def _forget(self, operation_id: str) -> None:
        operation = self._operations.pop(operation_id, None)
        if operation is not None:
            self._asked.pop(operation.request_id, None)


def value(operation: Operation[R]) -> R:
    """The result of one that is done. Raises what it failed with."""
    if operation.error is not None:
        raise operation.error
    if operation.result is None:
        raise LookalikeError(f"operation {operation.id!r} has no result yet")
    return operation.result
