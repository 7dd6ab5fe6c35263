"""The requests of a stream, read ahead into a bounded window, so that whatever is there is worked on together.

A caller that sends faster than it is served is held back by gRPC's flow control once the window is full.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import Generic, Self, TypeVar

from google.protobuf.message import Message

from embedding.errors import InvalidInput
from service.call import limits

T = TypeVar("T", bound=Message)

WINDOW_BYTES = 32 * 2**20
"""Most bytes of one stream's requests that are held at once, but for a single larger one."""

MAX_ID = 256
"""Longest id of an element of a stream, in characters."""

LINGER_SECONDS = 0.2
"""How long a stream that fails goes on reading what its caller still sends, unused. A caller whose write meets a call
that has ended is told of the broken write by gRPC, and not why the call ended."""


class Elements(Generic[T]):
    """Use it in an `async with` statement, which ends the reading."""

    def __init__(self, requests: AsyncIterator[T], *, window: int, window_bytes: int = WINDOW_BYTES) -> None:
        self._requests = requests
        of_call = limits()
        self._window = window = min(window, of_call.window)
        self._of_all = of_call.stream_bytes
        self._window_bytes = window_bytes
        self._read: asyncio.Queue[T | None] = asyncio.Queue(maxsize=window)
        self._held = 0  # bytes read and not done with
        self._room = asyncio.Event()
        self._reader: asyncio.Task[None] | None = None
        self._unused = False  # what is still read is thrown away

    async def __aenter__(self) -> Self:
        self._reader = asyncio.create_task(self._fill())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._reader is not None:
            if isinstance(error, Exception):
                await self._linger(self._reader)
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)
        self._release(self._held)

    async def _linger(self, reader: asyncio.Task[None]) -> None:
        self._unused = True
        self._room.set()
        while not self._read.empty():
            self._read.get_nowait()
        await asyncio.wait({reader}, timeout=LINGER_SECONDS)

    async def first(self) -> T | None:
        """The next element by itself; None when the stream has ended."""
        element = await self._read.get()
        if element is not None:
            self._release(element.ByteSize())
        elif self._reader is not None:
            await self._reader  # raises what broke the reading
        return element

    async def config(self) -> T:
        """The first element, whose oneof `element` must hold its config. Raises InvalidInput."""
        first = await self.first()
        if first is None or first.WhichOneof("element") != "config":
            raise InvalidInput("the first element of the stream must be its config", field="config")
        return first

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
                self._release(sum(element.ByteSize() for element in batch))
        if self._reader is not None:
            await self._reader  # raises what broke the reading

    def _release(self, size: int) -> None:
        self._held -= size
        self._room.set()
        self._of_all.give_back(size)

    def _is_full(self, size: int) -> bool:
        return self._held + size > self._window_bytes or self._of_all.is_full(size)

    async def _fill(self) -> None:
        try:
            async for request in self._requests:
                size = request.ByteSize()
                while not self._unused and self._held and self._is_full(size):
                    self._room.clear()
                    await self._of_all.wait(self._room)
                if self._unused:
                    continue
                self._held += size
                self._of_all.take(size)
                await self._read.put(request)
        except Exception:
            await self._read.put(None)
            raise
        await self._read.put(None)


def check_id(element_id: str) -> None:
    """Raises InvalidInput when the id of an element is too long."""
    if len(element_id) > MAX_ID:
        raise InvalidInput(f"id has at most {MAX_ID} characters; got {len(element_id):,}", field="id")


def answered_id(element_id: str) -> str:
    """The id to answer an element with, cut where it was refused for its length."""
    return element_id[:MAX_ID]
