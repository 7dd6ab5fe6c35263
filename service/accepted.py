"""Calls from when gRPC accepts them, although their request may be on its way for long: what draining waits for."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc

LAST_ANSWERS_SECONDS = 0.5
"""For answers that have been given but not yet sent."""


class Accepted(grpc.GenericRpcHandler):
    """Answers nothing, and knows which calls run. Add it to a server before all that answers. For one event loop."""

    def __init__(self, *uncounted: str) -> None:
        """Calls of the services `uncounted`, which may last for as long as the server, are not waited for."""
        self._uncounted = tuple(f"/{service}/" for service in uncounted)
        self._running: set[asyncio.Task[Any]] = set()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> None:
        """Asked for a handler in the task that lasts as long as the call, before its request is read."""
        task = asyncio.current_task()
        if task is not None and not handler_call_details.method.startswith(self._uncounted):
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def finished(self) -> None:
        """Wait until no call runs."""
        while self._running:
            await asyncio.wait(set(self._running))


async def drained(server: grpc.aio.Server, accepted: Accepted, seconds: float) -> None:
    """Refuse new calls, give those that run so many seconds, and stop.

    The server alone would take the whole time: who watches the health service never hangs up, and it waits for silent
    connections too.
    """
    stopping = asyncio.create_task(server.stop(seconds))
    finishing = asyncio.create_task(accepted.finished())
    await asyncio.wait((stopping, finishing), return_when=asyncio.FIRST_COMPLETED)
    finishing.cancel()
    await server.stop(LAST_ANSWERS_SECONDS)
    await stopping
