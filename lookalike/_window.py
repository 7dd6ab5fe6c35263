"""The messages of a stream: made one at a time, and never more than a window ahead of what is answered."""

from __future__ import annotations

import asyncio
import itertools
import threading
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from typing import Generic, TypeVar

from lookalike._calls.kinds import Stream
from lookalike._loop import InThread, is_cancelled

R = TypeVar("R")


class _Window(Generic[R]):
    """When making a message fails, the stream ends there and the failure is kept: gRPC would only log it."""

    def __init__(self, call: Stream[R], most: int) -> None:
        self._call = call
        self._most = most
        self._made, self._answered = 0, 0
        self._failure: BaseException | None = None
        self._closed = False

    def parsed(self, data: bytes) -> Sequence[R]:
        """The results of a message that came back; makes room for what it answers."""
        results = self._call.parse(data)
        self._answered = self._call.answered(results, self._answered)
        self._changed()
        return results

    def close(self) -> None:
        """No further message is wanted."""
        self._closed = True
        self._changed()

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _is_full(self) -> bool:
        return not self._closed and self._made - self._answered >= self._most

    def _changed(self) -> None:
        raise NotImplementedError


class Window(_Window[R], Iterator[bytes]):
    """Iterated by a thread of gRPC."""

    def __init__(self, call: Stream[R], most: int) -> None:
        super().__init__(call, most)
        if not isinstance(call.elements, Iterable):
            raise TypeError("the blocking client takes an iterable; give an asynchronous one to AsyncClient")
        self._messages = itertools.chain([call.first], map(call.pack, call.elements))
        self._made = -1  # the first is no element
        self._room = threading.Condition()

    def __next__(self) -> bytes:
        with self._room:
            self._room.wait_for(lambda: not self._is_full())
        if self._closed:
            raise StopIteration
        try:
            message = next(self._messages)
        except StopIteration:
            raise
        except BaseException as error:
            self._failure = error
            raise StopIteration from None
        self._made += 1
        return message

    def _changed(self) -> None:
        with self._room:
            self._room.notify_all()


class AsyncWindow(_Window[R]):
    """Iterated by a task of gRPC."""

    def __init__(self, call: Stream[R], most: int) -> None:
        super().__init__(call, most)
        self._room = asyncio.Event()
        self._thread: InThread[bytes] | None = None

    async def messages(self) -> AsyncIterator[bytes]:
        yield self._call.first
        try:
            async for message in self._packed():
                self._made += 1
                yield message
                while self._is_full():
                    self._room.clear()
                    await self._room.wait()
                if self._closed:
                    return
        except GeneratorExit:
            raise
        except asyncio.CancelledError as error:
            if is_cancelled():
                raise
            self._failure = error
        except BaseException as error:
            self._failure = error

    def close(self) -> None:
        super().close()
        if self._thread is not None:
            self._thread.close()

    def _changed(self) -> None:
        self._room.set()

    async def _packed(self) -> AsyncIterator[bytes]:
        """The messages of elements, made in threads: an image may be read from a slow disk."""
        elements, pack = self._call.elements, self._call.pack
        if isinstance(elements, AsyncIterable):
            async for element in elements:
                yield await asyncio.to_thread(pack, element)
        elif not self._closed:  # there would be nobody to end the thread
            self._thread = InThread(map(pack, elements))
            async for message in self._thread:
                yield message
