"""How calls travel over the channels of a client; blocking and asyncio.

Only what must differ between the two is written twice: the call itself, and what waits for it.
"""

from __future__ import annotations

import asyncio
import itertools
import queue
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from lookalike._calls.kinds import Batch, Call, Collected, Fitted, Page, Stream
from lookalike._calls.models import is_serving
from lookalike._loop import InThread, is_cancelled
from lookalike._retry import LONGEST, is_final
from lookalike._settings import DEFAULT_TIMEOUT, Configured, checked_wait
from lookalike._window import AsyncWindow, Window

R = TypeVar("R")
A = TypeVar("A")
C = TypeVar("C")
E = TypeVar("E", bound=Message)

_POLL_SECONDS = 0.1

_LOOK_SECONDS = 1.0
"""Spent at most on why there is no connection, by a call that does not wait for one."""


class Transport(Configured):
    """Calls that block; may be used from several threads."""

    def _open(self) -> None:
        options, credentials = self._channel_options(), self._access.credentials
        self._channels = [
            grpc.insecure_channel(self.target, options=options)
            if credentials is None
            else grpc.secure_channel(self.target, credentials, options=options)
            for _ in range(self._connections)
        ]
        self._turns = itertools.cycle(self._channels)

    def unary(self, call: Call[R] | Fitted[R]) -> R:
        ready = self._fitted(call)
        return ready.parse(self._repeated(ready.method, lambda seconds: self._answer(ready, seconds)))

    def pages(self, call: Callable[[str], Call[Page[R]]]) -> Iterator[R]:
        page = self.unary(call(""))
        yield from page.elements
        while page.next_token:
            page = self.unary(call(page.next_token))
            yield from page.elements

    def batch(self, batch: Batch[E, R]) -> list[R]:
        return [
            result
            for part in self._packed(batch)
            for result in part.results(self.unary(part.call) if part.call is not None else [])
        ]

    def collected(self, call: Collected[R]) -> R:
        return call.parse(self._repeated(call.method, lambda seconds: self._parts(call, seconds)))

    def stream(self, call: Stream[R]) -> Iterator[R]:
        made: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel().stream_stream(f"/{call.method}")
        window = Window(call, self._window)
        responses = made(window, metadata=self._access.metadata)
        try:
            for data in responses:
                yield from window.parsed(data)
        except grpc.RpcError as error:
            raise self._failed(error) from None
        finally:
            window.close()
            responses.cancel()  # for a caller who stops iterating
        window.raise_failure()

    def wait_until_ready(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Return as soon as the server is serving. Raises Unavailable when it is not after `timeout` seconds, of which
        infinity never come to an end."""
        give_up = time.monotonic() + checked_wait(timeout)
        while not self._serving_by(give_up):
            if time.monotonic() >= give_up:
                raise self._not_ready(timeout, self._why_not())
            time.sleep(_POLL_SECONDS)
            if self._closed:
                raise self._given_up()

    def close(self) -> None:
        self._closed = True
        for channel in self._channels:
            channel.close()

    def _channel(self) -> grpc.Channel:
        self._check_open()
        return next(self._turns)

    def _method(self, call: Call[R]) -> grpc.UnaryUnaryMultiCallable[bytes, bytes]:
        return self._channel().unary_unary(f"/{call.method}")

    def _repeated(self, method: str, ask: Callable[[float], A]) -> A:
        """What `ask` returns, which is told the seconds that are left; asked again as `retry` says."""
        give_up = time.monotonic() + self.timeout
        for attempt in itertools.count(1):
            try:
                answer = ask(max(give_up - time.monotonic(), 0.001))
            except grpc.RpcError as error:
                failed = self._failed(error)
                pause = self._patience.pause(failed, attempt, give_up - time.monotonic(), method)
                if pause is None:
                    raise failed from None
                time.sleep(pause)
            else:
                break
        self._patience.succeeded()
        return answer

    def _parts(self, call: Collected[R], seconds: float) -> list[bytes]:
        made: grpc.UnaryStreamMultiCallable[bytes, bytes] = self._channel().unary_stream(f"/{call.method}")
        return list(made(call.request, timeout=seconds, metadata=self._access.metadata))

    def _answer(self, call: Call[R], seconds: float) -> bytes:
        hedge_after = self._patience.hedge_after(call.method)
        if hedge_after is None:
            sent = call.sent(seconds, self.timeout - seconds)
            return self._method(call)(sent, timeout=seconds, metadata=self._access.metadata)
        return self._hedged(call, seconds, hedge_after)

    def _hedged(self, call: Call[R], seconds: float, hedge_after: float) -> bytes:
        """The answer of whichever copy succeeds first, a second one being sent when the first is slow."""
        give_up = time.monotonic() + seconds
        ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        copies: list[Any] = []

        def send() -> None:
            left = max(give_up - time.monotonic(), 0.001)
            copies.append(self._method(call).future(call.sent(left), timeout=left, metadata=self._access.metadata))
            copies[-1].add_done_callback(ended.put)

        try:
            send()
            try:
                copy = ended.get(timeout=hedge_after)
            except queue.Empty:
                if self._patience.may_hedge():
                    send()
                copy = ended.get()
            if len(copies) == 2 and not is_final(copy.code()):
                copy = ended.get()
            return bytes(copy.result())
        finally:
            for copy in copies:
                copy.cancel()

    def _serving_by(self, give_up: float) -> bool:
        call = is_serving()
        patience = min(max(give_up - time.monotonic(), 0.001), LONGEST)
        try:
            response = self._method(call)(call.sent(patience), timeout=patience, wait_for_ready=True)
        except grpc.RpcError:
            return False
        return call.parse(response)

    def _why_not(self) -> str:
        """gRPC's words for why no call gets through; empty where one does."""
        call = is_serving()
        try:
            self._method(call)(call.sent(_LOOK_SECONDS), timeout=_LOOK_SECONDS)
        except grpc.RpcError as error:
            ended: Any = error  # a grpc.Call too, which its type does not say
            return ended.details() or ""
        return ""


class AsyncTransport(Configured):
    """Calls that are awaited; belongs to the event loop it is first used in, and may be made before there is one."""

    def _open(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channels: list[grpc.aio.Channel] = []

    async def _made_in_thread(self, make: Callable[[], C], ask: Callable[[Any], Awaitable[R]]) -> R:
        """What `ask` answers to a call that takes long to make."""

        def made() -> C | Call[Any]:
            call = make()
            return self._fitted(call) if isinstance(call, Fitted) else call

        self._check_open()
        call = await asyncio.to_thread(made)
        if self._closed:
            raise self._given_up()
        return await ask(call)

    async def unary(self, call: Call[R] | Fitted[R]) -> R:
        ready = self._fitted(call)
        return ready.parse(await self._repeated(ready.method, lambda seconds: self._answer(ready, seconds)))

    async def pages(self, call: Callable[[str], Call[Page[R]]]) -> AsyncIterator[R]:
        page = await self.unary(call(""))
        for element in page.elements:
            yield element
        while page.next_token:
            page = await self.unary(call(page.next_token))
            for element in page.elements:
                yield element

    async def batch(self, batch: Batch[E, R]) -> list[R]:
        with closing(InThread(self._packed(batch))) as packed:
            return [
                result
                async for part in packed
                for result in part.results(await self.unary(part.call) if part.call is not None else [])
            ]

    async def collected(self, call: Collected[R]) -> R:
        return call.parse(await self._repeated(call.method, lambda seconds: self._parts(call, seconds)))

    async def stream(self, call: Stream[R]) -> AsyncIterator[R]:
        made: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel().stream_stream(f"/{call.method}")
        window = AsyncWindow(call, self._window)
        responses = made(window.messages(), metadata=self._access.metadata)
        try:
            with self._closing():
                async for data in responses:
                    for result in window.parsed(data):
                        yield result
        except grpc.aio.AioRpcError as error:
            raise self._failed(error) from None
        finally:
            window.close()
            responses.cancel()
        window.raise_failure()

    async def wait_until_ready(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Return as soon as the server is serving. Raises Unavailable when it is not after `timeout` seconds, of which
        infinity never come to an end."""
        give_up = time.monotonic() + checked_wait(timeout)
        while not await self._serving_by(give_up):
            if time.monotonic() >= give_up:
                raise self._not_ready(timeout, await self._why_not())
            await asyncio.sleep(_POLL_SECONDS)
            if self._closed:
                raise self._given_up()

    async def close(self) -> None:
        self._closed = True
        for channel in self._channels:
            await channel.close()

    def _channel(self) -> grpc.aio.Channel:
        self._check_open()
        loop = asyncio.get_running_loop()
        if self._loop is None:
            self._loop = loop
            options, credentials = self._channel_options(), self._access.credentials
            self._channels = [
                grpc.aio.insecure_channel(self.target, options=options)
                if credentials is None
                else grpc.aio.secure_channel(self.target, credentials, options=options)
                for _ in range(self._connections)
            ]
            self._turns = itertools.cycle(self._channels)
        elif self._loop is not loop:
            raise RuntimeError(
                "the client belongs to the event loop that it was first used in; make one for each, inside of what "
                "asyncio.run is given"
            )
        return next(self._turns)

    def _method(self, call: Call[R]) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
        return self._channel().unary_unary(f"/{call.method}")

    async def _repeated(self, method: str, ask: Callable[[float], Awaitable[A]]) -> A:
        give_up = time.monotonic() + self.timeout
        for attempt in itertools.count(1):
            try:
                with self._closing():
                    answer = await ask(max(give_up - time.monotonic(), 0.001))
            except grpc.aio.AioRpcError as error:
                failed = self._failed(error)
                pause = self._patience.pause(failed, attempt, give_up - time.monotonic(), method)
                if pause is None:
                    raise failed from None
                await asyncio.sleep(pause)
            else:
                break
        self._patience.succeeded()
        return answer

    async def _parts(self, call: Collected[R], seconds: float) -> list[bytes]:
        made: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel().unary_stream(f"/{call.method}")
        return [data async for data in made(call.request, timeout=seconds, metadata=self._access.metadata)]

    async def _answer(self, call: Call[R], seconds: float) -> bytes:
        hedge_after = self._patience.hedge_after(call.method)
        if hedge_after is None:
            sent = call.sent(seconds, self.timeout - seconds)
            return await self._method(call)(sent, timeout=seconds, metadata=self._access.metadata)
        return await self._hedged(call, seconds, hedge_after)

    async def _hedged(self, call: Call[R], seconds: float, hedge_after: float) -> bytes:
        """The answer of whichever copy succeeds first, a second one being sent when the first is slow."""
        give_up = time.monotonic() + seconds

        async def send() -> bytes:
            left = max(give_up - time.monotonic(), 0.001)
            return await self._method(call)(call.sent(left), timeout=left, metadata=self._access.metadata)

        copies = {asyncio.create_task(send())}
        try:
            ended, _ = await asyncio.wait(copies, timeout=hedge_after)
            if not ended and self._patience.may_hedge():
                copies.add(asyncio.create_task(send()))
            waiting = set(copies)
            while waiting:
                ended, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                answer = next((copy for copy in ended if _answers(copy)), None)
                if answer is not None:
                    return answer.result()
            return ended.pop().result()
        finally:
            for copy in copies:
                copy.cancel()
            await asyncio.gather(*copies, return_exceptions=True)

    async def _serving_by(self, give_up: float) -> bool:
        call = is_serving()
        patience = min(max(give_up - time.monotonic(), 0.001), LONGEST)
        try:
            with self._closing():
                response = await self._method(call)(call.sent(patience), timeout=patience, wait_for_ready=True)
        except grpc.aio.AioRpcError:
            return False
        return call.parse(response)

    async def _why_not(self) -> str:
        call = is_serving()
        try:
            with self._closing():
                await self._method(call)(call.sent(_LOOK_SECONDS), timeout=_LOOK_SECONDS)
        except grpc.aio.AioRpcError as error:
            return error.details() or ""
        return ""

    @contextmanager
    def _closing(self) -> Iterator[None]:
        """A call that ends because its client is closed raises Cancelled, as one that blocks does: asyncio's own error
        says that the caller was cancelled."""
        try:
            yield
        except asyncio.CancelledError:
            if is_cancelled():
                raise
            raise self._given_up() from None


def _answers(copy: asyncio.Task[bytes]) -> bool:
    error = copy.exception()
    return not isinstance(error, grpc.aio.AioRpcError) or is_final(error.code())
