"""What a client needs beside its event loop: a thread for what blocks, and to know who was cancelled."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from typing import Generic, TypeAlias, TypeVar

T = TypeVar("T")
Made: TypeAlias = tuple[list[T], BaseException | None]
"""One element, or none at the end; or what making it failed with, which a future would turn into another error."""


class InThread(AsyncIterator[T], Generic[T]):
    """The elements of an iterator, each made when it is asked for, in a thread of its own that `close` ends.

    An iterator may block for long. Threads of the event loop are few: others would wait for them, and so would its end.
    """

    def __init__(self, elements: Iterator[T]) -> None:
        self._elements = elements
        self._asked: queue.SimpleQueue[Future[Made[T]] | None] = queue.SimpleQueue()
        threading.Thread(target=contextvars.copy_context().run, args=(self._make,), daemon=True).start()

    async def __anext__(self) -> T:
        asked: Future[Made[T]] = Future()
        self._asked.put(asked)
        made, failure = await asyncio.wrap_future(asked)
        if failure is not None:
            raise failure
        if not made:
            raise StopAsyncIteration
        return made[0]

    def close(self) -> None:
        """No further element is wanted."""
        self._asked.put(None)

    def _make(self) -> None:
        while (asked := self._asked.get()) is not None:
            if asked.set_running_or_notify_cancel():
                asked.set_result(self._next())

    def _next(self) -> Made[T]:
        try:
            return list(itertools.islice(self._elements, 1)), None
        except BaseException as error:
            return [], error


def is_cancelled() -> bool:
    """Whether a CancelledError is this task's own, and not that of something it awaits."""
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
