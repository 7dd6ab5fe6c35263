"""Calls that another process of this server answers: passed on as they are, byte by byte, with their metadata.

A replica passes on everything that it does not answer by itself. Who calls, and whether they may at all, is judged
before anything but the metadata is read; the process that answers judges that again, and all else. Nothing is parsed.

The process that answers observes a call: it logs, counts and traces it. A call that ends here, and that it has not
heard of, is observed here.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Container
from typing import Any

import grpc

from embedding.errors import NotReady
from service.call import REQUEST_ID, Call
from service.calls import Calls
from service.errors import translated_errors
from service.settings import Settings
from service.transport import most_received
from service.workers.passed_on import PREFIX, said_of

_HOP = ("grpc-", ":", PREFIX)
_HOPS = {"te", "content-type", "user-agent", REQUEST_ID}
"""Metadata that is made anew for each connection: how its names begin, and whole names."""

_AWAY = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED})
"""What gRPC itself ends a call with over there: where nobody listens, and where a server stops, or is too busy to look,
in the moment in which the call comes. A caller that gives up here is told of no code."""


class Forwarding(grpc.GenericRpcHandler):
    """Some methods, answered at another address. For one event loop."""

    def __init__(
        self,
        address: str,
        methods: Container[str],
        settings: Settings,
        *,
        calls: Calls | None = None,
        judge: Callable[[Call], None] = lambda _: None,
    ) -> None:
        """`judge` raises LookalikeError for calls that are not passed on; `calls` is told of what ends here."""
        self._methods = methods
        self._calls = calls or Calls()
        self._judge = judge
        self._channel = grpc.aio.insecure_channel(
            address,
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.max_send_message_length", most_received(settings)),  # refused where the rest is
                ("grpc.max_metadata_size", settings.max_metadata_bytes),
                ("grpc.max_reconnect_backoff_ms", 1000),
                ("grpc.enable_retries", 0),
            ],
        )

    async def close(self) -> None:
        await self._channel.close()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        method = handler_call_details.method
        if method not in self._methods:
            return None

        async def forward(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async for response in self._forwarded(Call(method, context, streams=True), requests):
                yield response

        # A call of one message travels like a stream of one.
        return grpc.stream_stream_rpc_method_handler(forward)

    async def _forwarded(self, call: Call, requests: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        context = call.context
        try:
            self._judge(call)
        except Exception as error:
            await self._refuse(call, error)
        ask: Any = self._channel.stream_stream(call.method)
        asked = ask(requests, metadata=_passed_on(call), timeout=context.time_remaining())
        try:
            async for response in asked:
                yield response
            context.set_trailing_metadata(tuple(await asked.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            await self._end(call, error.code(), error.details(), error.trailing_metadata())
        except asyncio.CancelledError:
            if not self._is_connected:
                async with self._calls.observed(call):
                    raise
            raise
        finally:
            asked.cancel()  # when the caller has gone

    async def _end(self, call: Call, code: grpc.StatusCode, details: str | None, metadata: Any) -> None:
        """End a call as it ended there, or on the way."""
        trailing: Any = tuple(metadata or ())
        if any(key == REQUEST_ID for key, _ in trailing) or (
            code is grpc.StatusCode.DEADLINE_EXCEEDED and self._is_connected
        ):
            await call.context.abort(code, details or "", trailing)  # the process that answers has heard of it
        if code in _AWAY:  # gRPC's own words would be of sockets of ours
            await self._refuse(
                call,
                NotReady(
                    "the process that answers this call is away, and comes back by itself; try again, a write under "
                    "the same request_id: it may have been done"
                ),
            )
        async with self._calls.observed(call):
            await call.context.abort(code, details or "", (*trailing, (REQUEST_ID, call.request_id)))

    async def _refuse(self, call: Call, error: Exception) -> None:
        async with self._calls.observed(call), translated_errors(call.context):
            raise error

    @property
    def _is_connected(self) -> bool:
        """Whether the process that answers hears of what is passed on, and of its end."""
        return self._channel.get_state() is grpc.ChannelConnectivity.READY


def _passed_on(call: Call) -> list[tuple[str, str | bytes]]:
    """The metadata of a call, who made it, and the id that it has here, for one in the logs of both."""
    context = call.context
    metadata: list[tuple[str, str | bytes]] = [
        (key, value)
        for key, value in context.invocation_metadata() or ()
        if key not in _HOPS and not key.startswith(_HOP)
    ]
    return [*metadata, (REQUEST_ID, call.request_id), *said_of(context)]
