"""The requests of a stream, read ahead into a bounded window, so that whatever is there is worked on together.

A caller that sends faster than it is served is held back by gRPC's flow control once the window is full.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Generic, Self, TypeVar

T = TypeVar("T")


class Elements(Generic[T]):
    """Use it in an `async with` statement, which ends the reading."""

    def __init__(self, requests: AsyncIterator[T], *, window: int) -> None:
        self._requests = requests
        self._window = window
        self._read: asyncio.Queue[T | None] = asyncio.Queue(maxsize=window)
        self._reader: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._fill())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def first(self) -> T | None:
        """The next element by itself; None when the stream has ended."""
        return await self._read.get()

    async def batches(self) -> AsyncIterator[list[T]]:
        """All other elements in order, as many together as are there, at least one and at most a window."""
        ended = False
        while not ended:
            batch: list[T] = []
            element = await self._read.get()
            while element is not None:
                batch.append(element)
                if len(batch) == self._window or self._read.empty():
                    break
                element = self._read.get_nowait()
            ended = element is None
            if batch:
                yield batch
        if self._reader is not None:
            await self._reader  # raises what broke the reading

    async def _fill(self) -> None:
        try:
            async for request in self._requests:
                await self._read.put(request)
        except Exception:
            await self._read.put(None)
            raise
        await self._read.put(None)
