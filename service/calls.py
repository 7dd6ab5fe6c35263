"""Every call, as it passes: hooks that admit and observe it, one log line, and a count in flight.

To gRPC every method takes a stream, which is the same on the wire: so hooks judge a call's metadata before its message
is read, where gRPC would first take in the whole of it.

Methods are wrapped once: an interceptor would make a new handler for every call. Neither images nor
vectors nor any other content of a message is ever logged.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, cast

import grpc
import structlog
from google.protobuf.message import DecodeError, Message

from embedding.errors import (
    DeadlineExceeded,
    InvalidInput,
    LookalikeError,
    NotSupported,
    RequestTooLarge,
    ResponseTooLarge,
)
from service.awaited import Awaited
from service.call import CURRENT, REQUEST_ID, Call, Limits
from service.errors import translated_errors
from service.telemetry import logs

_log = structlog.get_logger(__name__)


LARGE = 16 * 1024
"""Bytes of an answer from which on it is counted among those that are not sent yet."""


_ROUNDED, _ON_THE_WAY = 0.02, 0.005
"""Share of a deadline, and seconds, by which a caller may give up before its deadline passes here: gRPC rounds what
travels of it up, by a hundredth at most."""


@dataclass(frozen=True, slots=True)
class _Unread:
    """Stands for a request that is not read, so that it is refused where all others are; gRPC's own answer to one that
    cannot be parsed would be UNKNOWN, with the parser's words."""

    error: LookalikeError


class Hook:
    """What is told of every call, on the event loop: it must not block. What it raises as LookalikeError ends the call.

    Hooks are told in their order, and of the end in the opposite one. `ended` is called for whatever `begun` was.
    """

    def begun(self, call: Call) -> None:
        """A call has come; nothing of it was read but its metadata."""

    def received(self, call: Call, request: Message) -> None:
        """A request message was read: the only one, or the next of a stream."""

    def answered(self, call: Call, size: int) -> None:
        """A call's one answer is formed, takes these bytes, `LARGE` or more, and is about to be sent."""

    def ended(self, call: Call, code: grpc.StatusCode) -> None:
        """The call is over."""


class Calls:
    """Logs the calls of our own services, and tells hooks of them; health checks and reflection pass by."""

    def __init__(self, hooks: Sequence[Hook] = (), *, limits: Limits | None = None) -> None:
        self._hooks = tuple(hooks)
        self._limits = limits or Limits()
        self._awaited = Awaited(self._limits.message_seconds)
        self._receivers = [hook for hook in hooks if type(hook).received is not Hook.received]
        self._holders = [hook for hook in hooks if type(hook).answered is not Hook.answered]

    def around(self, server: grpc.aio.Server) -> grpc.aio.Server:
        """What servicers are added to, in the place of `server`, so that their calls pass through here."""
        return cast("grpc.aio.Server", Registrar(self, server))

    def handler(self, method: str, handler: grpc.RpcMethodHandler[Any, Any]) -> grpc.RpcMethodHandler[Any, Any]:
        """The handler of a method, with all that is done around each call."""
        # Typed for blocking servers only. All our methods answer with one message, or stream their answers.
        respond: Any = handler.unary_unary or handler.unary_stream or handler.stream_stream
        serialize = _unless_formed(handler.response_serializer)
        if handler.unary_unary is not None:

            async def served(_: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
                async with self.observed(Call(method, context, limits=self._limits)) as call:
                    request: Any = await self._only(context)
                    async with translated_errors(context):
                        self._received(call, request)
                        answer = serialize(await respond(request, context))
                        self._check_size(answer)
                        if len(answer) >= LARGE:
                            for hook in self._holders:
                                hook.answered(call, len(answer))
                    return answer

            return grpc.stream_unary_rpc_method_handler(
                served, request_deserializer=self._reading(handler.request_deserializer)
            )

        async def streamed(requests: Any, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncIterator[Any]:
            begun = Call(method, context, limits=self._limits, streams=handler.request_streaming)
            async with self.observed(begun) as call:
                request: Any
                if handler.request_streaming:
                    request = self._each_received(call, requests)
                else:
                    request = await self._only(context)
                    async with translated_errors(context):
                        self._received(call, request)
                async for response in respond(request, context):
                    answer = serialize(response)
                    async with translated_errors(context):
                        self._check_size(answer)
                    yield answer

        return grpc.stream_stream_rpc_method_handler(
            streamed, request_deserializer=self._reading(handler.request_deserializer)
        )

    def observed(self, call: Call) -> _Served:
        """For an `async with` statement: the call begins and ends with it, which hooks are told of, and the log."""
        return _Served(self, call)

    def _reading(self, deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
        most = self._limits.message_bytes

        def read(data: bytes) -> Any:
            if len(data) > most:
                return _Unread(
                    RequestTooLarge(
                        f"the request takes {len(data):,} bytes, and one message carries {most:,} at most; send "
                        "smaller images, or fewer at once"
                    )
                )
            try:
                return data if deserialize is None else deserialize(data)
            except DecodeError:
                return _Unread(
                    InvalidInput("the message cannot be parsed; make it with the stubs of this API's version")
                )

        return read

    async def _only(self, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        """The message of a call that has one: `_received` refuses what is none."""
        try:
            return await self._awaited.read(context)
        except TimeoutError:
            return _Unread(
                DeadlineExceeded(
                    f"the message of the call has not come within {self._limits.message_seconds:g} s "
                    "(max_message_seconds); send less at once, or over a faster connection"
                )
            )

    def _received(self, call: Call, request: Any) -> None:
        if not call.streams:
            call.started = time.perf_counter()  # what its caller took to send it is no time of ours
        if isinstance(request, _Unread):
            raise request.error
        if request is grpc.aio.EOF:  # gRPC's own code for it: doc/statuscodes.md. Of a call given up nobody hears it
            raise NotSupported("the call has no message, and its method takes one; make it with this API's stubs")
        for hook in self._receivers:
            hook.received(call, request)

    def _check_size(self, answer: bytes) -> None:
        """The last line: gRPC would end the call with an error that carries no reason, and we would count it OK."""
        if len(answer) > self._limits.message_bytes:
            raise ResponseTooLarge(
                f"the answer takes {len(answer):,} bytes, and one message carries {self._limits.message_bytes:,} at "
                "most; ask for less: a smaller page or batch, or fewer fields by read_mask. What the call wrote stays"
            )

    async def _each_received(self, call: Call, requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The same requests; what a hook raises reaches the method, which ends the call with it."""
        async for request in requests:
            self._received(call, request)
            if call.pause > 0:
                await asyncio.sleep(call.pause)  # unread, what follows fills the window, and holds the caller back
                call.pause = 0.0
            yield request


class Wrapping(Protocol):
    """What is done around each call of a method."""

    def handler(self, method: str, handler: grpc.RpcMethodHandler[Any, Any], /) -> grpc.RpcMethodHandler[Any, Any]: ...


class Registrar:
    """Takes servicers as a server does, through the generated functions, and adds them with their methods wrapped."""

    def __init__(self, calls: Wrapping, server: grpc.aio.Server) -> None:
        self._calls = calls
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Sequence[grpc.GenericRpcHandler]) -> None:
        self._server.add_generic_rpc_handlers([_Wrapped(self._calls, handler) for handler in handlers])

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """Nothing: the generated functions give the same handlers both ways, and servers of asyncio use the other."""


class _Wrapped(grpc.GenericRpcHandler):
    """The methods of one servicer, each wrapped when it is first called."""

    def __init__(self, calls: Wrapping, plain: grpc.GenericRpcHandler) -> None:
        self._calls = calls
        self._plain = plain
        self._wrapped: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler[Any, Any] | None:
        method = handler_call_details.method
        wrapped = self._wrapped.get(method)
        if wrapped is None:
            plain = self._plain.service(handler_call_details)
            if plain is None:
                return None
            wrapped = self._wrapped[method] = self._calls.handler(method, plain)
        return wrapped


class _Served:
    """One call, from its beginning to its end; a class, since a generator takes five times as long."""

    __slots__ = ("_begun", "_call", "_calls")

    def __init__(self, calls: Calls, call: Call) -> None:
        self._calls = calls
        self._call = call
        self._begun: list[Hook] = []

    async def __aenter__(self) -> Call:
        calls, call = self._calls, self._call
        CURRENT.set(call)
        call.context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
        try:
            async with translated_errors(call.context):
                for hook in calls._hooks:
                    self._begun.append(hook)
                    hook.begun(call)
        except BaseException as error:
            self._end(error)
            raise
        return call

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end(error)
        if isinstance(error, grpc.aio.AbortError):
            error.__traceback__ = None  # gRPC keeps it in a circle with the call; its frames have request and answer

    def _end(self, error: BaseException | None) -> None:
        call = self._call
        code: Any
        if error is None:
            code = grpc.StatusCode.OK
        elif isinstance(error, grpc.aio.AbortError):
            code = call.context.code()
        else:
            code = grpc.StatusCode.DEADLINE_EXCEEDED if _is_late(call) else grpc.StatusCode.CANCELLED
        code = code if isinstance(code, grpc.StatusCode) else _code_of(code)
        for hook in reversed(self._begun):
            hook.ended(call, code)
        milliseconds = round(1000 * (time.perf_counter() - call.started), 3)
        logs.call(
            _log, method=call.method, code=code.name, ms=milliseconds, request_id=call.request_id, caller=call.caller
        )


def _is_late(call: Call) -> bool:
    """Whether the caller of a call that was given up had waited until its deadline."""
    left = call.seconds_left
    return left is not None and left <= _ON_THE_WAY + _ROUNDED * (time.perf_counter() - call.started + left)


def _unless_formed(serialize: Callable[[Any], bytes] | None) -> Callable[[Any], bytes]:
    """An answer that has been formed as bytes is sent as it is."""

    def write(response: Any) -> bytes:
        return response if serialize is None or type(response) is bytes else serialize(response)

    return write


_CODES = {code.value[0]: code for code in grpc.StatusCode}


def _code_of(number: Any) -> grpc.StatusCode:
    return _CODES.get(number, grpc.StatusCode.UNKNOWN)
