"""Calls that anybody may make, without credentials: health checks and reflection. Little of them is taken in at once.

gRPC bounds the messages of all methods alike, by what images take. What it reads takes three times its size, and of one
that waits it takes in up to 16 MiB. So these are read by turns, one of each address and a few of all, each within a
short time, and few may wait: whoever sends slowly, or much, holds up nobody elsewhere.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast
from weakref import WeakValueDictionary

import grpc
from google.protobuf.message import DecodeError

from embedding.errors import DeadlineExceeded, InvalidInput, NotSupported, Overloaded, RequestTooLarge
from service.call import address_of
from service.calls import Registrar
from service.errors import translated_errors

AT_ONCE = 4
"""Messages that are read at the same time, from as many addresses."""

OF_ONE, OF_ALL = 16, 64
"""Messages that are read or wait, of one address and of all; who comes then is refused."""

MOST_BYTES = 4096
"""Of a message, which names a service or a symbol; a watcher's is kept as long as it watches."""

READ_SECONDS = 1.0
"""For a message to come in, once it is its turn: those that are wanted travel with the call."""

Context = grpc.aio.ServicerContext[Any, Any]


class OpenCalls:
    """The turns of one server. For one event loop."""

    def __init__(self, *, seconds: float = READ_SECONDS) -> None:
        self._seconds = seconds
        self._of_all = asyncio.Semaphore(AT_ONCE)
        self._come: Counter[str] = Counter()
        self._of_one: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    def around(self, server: grpc.aio.Server) -> grpc.aio.Server:
        """What servicers are added to, in the place of `server`, so that their messages are read by turns."""
        return cast("grpc.aio.Server", Registrar(self, server))

    def handler(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler of a method, which takes a stream to gRPC, as ours do: `calls` has why."""
        respond: Any = handler.unary_unary or handler.unary_stream or handler.stream_stream
        assert handler.request_deserializer is not None
        read, write = _reading(handler.request_deserializer), handler.response_serializer
        if handler.unary_unary is not None:

            async def answered(_: Any, context: Context) -> Any:
                return await respond(await self._only(context), context)

            return grpc.stream_unary_rpc_method_handler(answered, read, write)

        if handler.unary_stream is not None:

            async def streamed(_: Any, context: Context) -> None:
                await respond(await self._only(context), context)  # it writes by itself

            return grpc.stream_stream_rpc_method_handler(cast("Any", streamed), read, write)

        async def conversed(_: Any, context: Context) -> AsyncIterator[Any]:
            async for response in respond(self._each(context), context):
                yield response

        return grpc.stream_stream_rpc_method_handler(conversed, read, write)

    async def _only(self, context: Context) -> Any:
        """The message of a call that has one."""
        async with translated_errors(context):
            try:
                message = await self._read(context)
            except TimeoutError:
                raise DeadlineExceeded(
                    f"the message of the call has not come within {self._seconds:g} s; send it with the call"
                ) from None
            if message is grpc.aio.EOF:
                raise NotSupported("the call has no message, and its method takes one; make it with the method's stubs")
            if isinstance(message, InvalidInput):
                raise message
        return message

    async def _each(self, context: Context) -> AsyncIterator[Any]:
        """The messages of a stream, which ends, as if its caller had ended it, when the next does not come in time."""
        while True:
            async with translated_errors(context):
                try:
                    message = await self._read(context)
                except TimeoutError:
                    return
                if isinstance(message, InvalidInput):
                    raise message
            if message is grpc.aio.EOF:
                return
            yield message

    async def _read(self, context: Context) -> Any:
        """The next message, or why it is none, or EOF. Raises TimeoutError, and Overloaded."""
        async with self._turn(address_of(context)), asyncio.timeout(self._seconds):
            return await context.read()

    @asynccontextmanager
    async def _turn(self, address: str) -> AsyncIterator[None]:
        if self._come[address] >= OF_ONE or self._come.total() >= OF_ALL:
            raise Overloaded("too many of such calls wait to be read; try again in a second")
        self._come[address] += 1
        try:
            async with self._of_one.setdefault(address, asyncio.Lock()), self._of_all:
                yield
        finally:
            self._come[address] -= 1
            self._come += Counter()  # those of nobody are forgotten


def _reading(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """Reads a message, or says why not, its bytes forgotten: an error that is raised keeps what its frames hold."""

    def read(data: bytes) -> Any:
        if len(data) > MOST_BYTES:
            return RequestTooLarge(
                f"the message takes {len(data):,} bytes, and this method takes {MOST_BYTES:,} at most"
            )
        try:
            return parse(data)
        except DecodeError:
            return InvalidInput("the message cannot be parsed; make it with the method's stubs")

    return read
