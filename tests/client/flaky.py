"""Servers that fail and dawdle on purpose, on asyncio, for what a client does about it."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.rpc import error_details_pb2, status_pb2

from tests.service.harness import Loop

Context: TypeAlias = "grpc.aio.ServicerContext[bytes, bytes]"
Answer: TypeAlias = Callable[[int, bytes, Context], Awaitable[bytes]]


class Flaky(grpc.GenericRpcHandler):
    """Answers every call by `answer`, which is told how many came before; counts them by method's name.

    SearchMatches, whose answer is a stream, has it as the only part.
    """

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self.seen: Counter[str] = Counter()
        self.peers: set[str] = set()
        self.given_up = threading.Event()

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        name = details.method.rpartition("/")[2]

        async def answer(request: bytes, context: Context) -> bytes:
            before = self.seen[name]
            self.seen[name] += 1
            self.peers.add(context.peer())
            try:
                return await self._answer(before, request, context)
            except asyncio.CancelledError:
                self.given_up.set()
                raise

        async def parts(request: bytes, context: Context) -> AsyncIterator[bytes]:
            yield await answer(request, context)

        if name == "SearchMatches":
            return grpc.unary_stream_rpc_method_handler(parts)
        return grpc.unary_unary_rpc_method_handler(answer)


class Slow(grpc.GenericRpcHandler):
    """Reads a stream and answers an element, by `answer`, only when `allow` is called."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer
        self._allowed: asyncio.Queue[None] = asyncio.Queue()
        self.read = 0
        self.ended = False

    def allow(self, count: int) -> None:
        for _ in range(count):
            self._allowed.put_nowait(None)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler:
        return grpc.stream_stream_rpc_method_handler(self._stream)

    async def _stream(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[bytes]:
        reading = asyncio.create_task(self._read(requests))
        answered, allowed = 0, None
        try:
            while not (self.ended and answered == self.read - 1):
                allowed = asyncio.ensure_future(self._allowed.get())
                done, _ = await asyncio.wait({allowed, reading}, return_when=asyncio.FIRST_COMPLETED)
                if allowed not in done:
                    allowed.cancel()
                    reading = asyncio.get_running_loop().create_future()  # over, and never done again
                    continue
                answered += 1
                yield self._answer
        finally:
            reading.cancel()
            if allowed is not None:
                allowed.cancel()

    async def _read(self, requests: AsyncIterator[bytes]) -> None:
        async for _ in requests:
            self.read += 1
        self.ended = True


async def refuse(
    context: Context, code: grpc.StatusCode, *, reason: str = "", seconds: float | None = None, pushback: str = ""
) -> None:
    """End a call as the server does, with what it would say of it."""
    details: list[Any] = [error_details_pb2.ErrorInfo(reason=reason, domain="lookalike")] if reason else []
    if seconds is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(round(seconds * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    packed = [any_pb2.Any() for _ in details]
    for wrapped, detail in zip(packed, details, strict=True):
        wrapped.Pack(detail)
    status = status_pb2.Status(code=code.value[0], message="not now", details=packed)
    trailing = [("grpc-status-details-bin", status.SerializeToString())]
    if pushback:
        trailing.append(("grpc-retry-pushback-ms", pushback))
    await context.abort(code, "not now", tuple(trailing))


@contextmanager
def serving(loop: Loop, handler: grpc.GenericRpcHandler) -> Iterator[str]:
    """The address of a server that is up meanwhile."""

    async def start() -> tuple[grpc.aio.Server, int]:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        return server, port

    server, port = loop.run(start())
    try:
        yield f"127.0.0.1:{port}"
    finally:
        loop.run(server.stop(None))
