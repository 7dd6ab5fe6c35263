"""Threads for searches, reads and writes: a bounded number of waiting tasks, which callers take turns with.

What runs in them runs for the call that asks for it: `service.call` tells of that call there too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from embedding.errors import DeadlineExceeded
from service.admission import Pace, Room
from service.fairness import FairQueue

R = TypeVar("R")


@dataclass(eq=False)
class _Task:
    """A function, and who waits for it."""

    function: Callable[[], Any] | None
    done: asyncio.Future[Any]
    ends: float | None


class Pool:
    """Runs blocking functions for one event loop. What nobody waits for any more is not begun."""

    def __init__(self, *, threads: int, most: int, seconds: float) -> None:
        """At most `most` tasks wait or run, and none is accepted that would wait longer than `seconds`."""
        self._threads = threads
        self._running = 0
        self._queue: FairQueue[_Task] = FairQueue()
        self._pace = pace = Pace()  # named so that the room does not keep the pool alive, in a circle
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="gallery")
        self.room = Room(
            "searches, reads and writes",
            most=most,
            most_seconds=seconds,
            free_of_time=4 * threads,
            seconds_each=lambda: pace.seconds / threads,
        )
        """What is held by tasks that have not been done."""

    @property
    def waiting(self) -> int:
        """Tasks that have not begun."""
        return len(self._queue)

    async def run(
        self,
        function: Callable[[], R],
        *,
        caller: str = "",
        seconds_left: float | None = None,
        patient: bool = False,
        admitted: bool = False,
        then_seconds: float = 0.0,
    ) -> R:
        """What `function` returns or raises.

        Raises Overloaded when there is no room, unless `patient`, who waits for it, or `admitted`: what a call asks
        for that has been worked on already. `then_seconds` is how long the call will wait elsewhere afterwards, within
        the same deadline. Raises DeadlineExceeded when its turn comes too late.
        """
        if admitted:
            return await self._run(function, caller, seconds_left)
        if patient:
            ticket = await self.room.enter_patiently(caller)
        else:
            ticket = self.room.enter(caller, seconds_left=seconds_left, then_seconds=then_seconds)
        with ticket:
            return await self._run(function, caller, seconds_left)

    def close(self) -> None:
        """Let running work end, drop what has not begun, and free the threads."""
        self._executor.shutdown(cancel_futures=True)

    async def _run(self, function: Callable[[], R], caller: str, seconds_left: float | None) -> R:
        ends = None if seconds_left is None else time.monotonic() + seconds_left
        task = _Task(partial(copy_context().run, function), asyncio.get_running_loop().create_future(), ends)
        self._queue.put(caller, task)
        self._start()
        try:
            result: R = await task.done
            return result
        finally:
            self._queue.discard(caller, task)
            task.function = None

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        while self._running < self._threads and (taken := self._queue.take()) is not None:
            _, task = taken
            if task.done.done() or task.function is None:
                continue
            if task.ends is not None and time.monotonic() > task.ends:
                task.done.set_exception(DeadlineExceeded("the time limit passed while the call waited for its turn"))
                continue
            self._running += 1
            running = loop.run_in_executor(self._executor, self._timed, task.function)
            running.add_done_callback(lambda over, task=task: self._ended(task, over))  # type: ignore[misc]

    def _timed(self, function: Callable[[], R]) -> R:
        start = time.perf_counter()
        try:
            return function()
        finally:
            self._pace.record(time.perf_counter() - start)

    def _ended(self, task: _Task, over: asyncio.Future[Any]) -> None:
        self._running -= 1
        if over.cancelled():
            task.done.cancel()
        elif (error := over.exception()) is not None:
            if not task.done.done():
                task.done.set_exception(error)
        elif not task.done.done():
            task.done.set_result(over.result())
        self._start()
