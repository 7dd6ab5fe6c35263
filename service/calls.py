"""Every call, as it passes: its request id, one log line with method, code and milliseconds, and a count in flight.

Neither images nor vectors nor any other content of a message is ever logged.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import Any

import grpc
import structlog

_REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
_PREFIX = "/lookalike."

_log = structlog.get_logger(__name__)


def request_id() -> str:
    """The id of the call being served; empty outside of one."""
    return _REQUEST_ID.get()


class Calls(grpc.aio.ServerInterceptor):
    """Logs and counts the calls of our own services; health checks and reflection pass by."""

    def __init__(self) -> None:
        self._in_flight = 0
        self._idle = asyncio.Event()
        self._idle.set()

    async def finished(self) -> None:
        """Wait until no call is in flight."""
        await self._idle.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method = handler_call_details.method
        if handler is None or not method.startswith(_PREFIX):  # an unknown method has no handler
            return handler
        # Typed for blocking servers only. All our methods answer with one message, or stream their answers.
        respond: Any = handler.unary_unary or handler.unary_stream or handler.stream_stream
        if handler.unary_unary is not None:

            async def served(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
                async with self._counted(method, context):
                    return await respond(request, context)

            return grpc.unary_unary_rpc_method_handler(
                served,
                request_deserializer=handler.request_deserializer,
                response_serializer=handler.response_serializer,
            )

        async def streamed(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            async with self._counted(method, context):
                async for response in respond(request, context):
                    yield response

        make = grpc.unary_stream_rpc_method_handler if handler.unary_stream else grpc.stream_stream_rpc_method_handler
        made: grpc.RpcMethodHandler[Any, Any] = make(
            streamed,
            request_deserializer=handler.request_deserializer,
            response_serializer=handler.response_serializer,
        )
        return made

    @asynccontextmanager
    async def _counted(self, method: str, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[None]:
        _REQUEST_ID.set(uuid.uuid4().hex)
        started = time.perf_counter()
        self._in_flight += 1
        self._idle.clear()
        code: grpc.StatusCode | None = grpc.StatusCode.CANCELLED  # what it is unless the call ends in one of two ways
        try:
            yield
            code = grpc.StatusCode.OK
        except grpc.aio.AbortError:
            code = context.code()
            raise
        finally:
            self._in_flight -= 1
            if not self._in_flight:
                self._idle.set()
            milliseconds = round(1000 * (time.perf_counter() - started), 3)
            _log.info("call", method=method, code=_name(code), ms=milliseconds, request_id=request_id())


def _name(code: Any) -> str:
    return code.name if isinstance(code, grpc.StatusCode) else str(code)
