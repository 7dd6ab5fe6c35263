"""Messages that calls wait for, each of which must come within a time."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import grpc

_LOOKS = 8
"""How often within that time it is looked whose message is late."""


class Awaited:
    """The calls that wait for their message. For one event loop.

    One timer for all of them: one for each would take a hundredth of a short search.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: dict[asyncio.Task[Any], float] = {}
        self._late: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.TimerHandle | None = None

    async def read(self, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """The next message, or EOF. Raises TimeoutError when it does not come: after the time, or an eighth more."""
        task = asyncio.current_task()
        assert task is not None
        self._since[task] = time.monotonic()
        if self._timer is None:
            self._look_again()
        try:
            return await context.read()
        except asyncio.CancelledError:
            if task in self._late and task.uncancel() == 0:  # and its caller has not gone at the same time
                raise TimeoutError from None
            raise
        finally:
            del self._since[task]
            self._late.discard(task)

    def _look_again(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._seconds / _LOOKS, self._look)

    def _look(self) -> None:
        began = time.monotonic() - self._seconds
        for task, since in self._since.items():  # the oldest first
            if since > began:
                break
            if task not in self._late:
                self._late.add(task)
                task.cancel()
        self._timer = None
        if self._since:
            self._look_again()
