"""Calls that another process of this server answers: passed on as they are, byte by byte, with their metadata.

A replica passes on everything that it does not answer by itself. The process that answers checks rights and limits;
here nothing is parsed.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc

from embedding.errors import NotReady
from service.errors import translated_errors
from service.settings import Settings
from service.transport import most_received
from service.workers.passed_on import PREFIX, said_of

_HOP = ("grpc-", ":", PREFIX)
_HOPS = {"te", "content-type", "user-agent"}
"""Metadata that each connection makes for itself: how its names begin, and whole names."""
_DETAILS = "grpc-status-details-bin"
"""What the statuses of our own have."""


class Forwarding(grpc.GenericRpcHandler):
    """The methods of some services, answered at another address. For one event loop."""

    def __init__(self, address: str, services: tuple[str, ...], settings: Settings) -> None:
        self._services = tuple(f"/{service}/" for service in services)
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
        if not method.startswith(self._services):
            return None

        async def forward(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            async for response in self._forwarded(method, requests, context):
                yield response

        # A call of one message travels like a stream of one.
        return grpc.stream_stream_rpc_method_handler(forward)

    async def _forwarded(
        self, method: str, requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[Any, Any]
    ) -> AsyncIterator[bytes]:
        metadata = [
            (key, value)
            for key, value in context.invocation_metadata() or ()
            if key not in _HOPS and not key.startswith(_HOP)
        ]
        metadata += said_of(context)
        ask: Any = self._channel.stream_stream(method)
        call = ask(requests, metadata=metadata, timeout=context.time_remaining())
        try:
            async for response in call:
                yield response
            context.set_trailing_metadata(tuple(await call.trailing_metadata()))
        except grpc.aio.AioRpcError as error:
            trailing: Any = tuple(error.trailing_metadata() or ())
            if error.code() is grpc.StatusCode.UNAVAILABLE and not any(key == _DETAILS for key, _ in trailing):
                async with translated_errors(context):  # gRPC's own words would be of sockets of ours
                    raise NotReady(
                        "the process that answers this call is away, and comes back by itself; try again, a write "
                        "under the same request_id: it may have been done"
                    ) from error
            await context.abort(error.code(), error.details() or "", trailing)
        finally:
            call.cancel()  # when the caller has gone
