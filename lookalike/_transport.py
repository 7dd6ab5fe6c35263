"""How calls travel: the channel, its options and retries; blocking and asyncio.

Only what must differ between the two is written twice: the call itself, and what waits for it.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.longrunning import operations_pb2
from google.protobuf.message import Message

from lookalike._calls.items import GALLERY
from lookalike._calls.kinds import Batch, Call, Collected, Page, Stream
from lookalike._calls.models import is_serving
from lookalike._calls.upkeep import OPERATIONS
from lookalike._secure import Access
from lookalike.errors import CallFailed, ResourceExhausted, Unavailable, from_call
from lookalike.v1 import alias_pb2, feedback_pb2, gallery_pb2, match_pb2, model_pb2, search_pb2, upkeep_pb2

R = TypeVar("R")
E = TypeVar("E", bound=Message)

DEFAULT_TIMEOUT = 30.0
"""Seconds that a call may take, retries included."""

DEFAULT_MAX_MESSAGE_BYTES = 64 * 2**20
"""The server's own default limit on a message."""

_ENVELOPE_BYTES = 4096
"""Room that a batch leaves for the rest of its message, beside the elements."""
_ELEMENT_BYTES = 8
"""Tag and length that precede an element."""
_POLL_SECONDS = 0.1

# What is repeated while the server is unavailable. Reads may be; and so may writes, because each carries a request_id
# under which the server does it once and answers a repetition as the first time. An import tells how far it came: to
# begin again is the caller's decision.
_NEVER_REPEATED = {(GALLERY, "ImportItems"), (OPERATIONS, "DeleteOperation")}
_REPEATED = [
    {"service": method.containing_service.full_name, "method": method.name}
    for module in (alias_pb2, feedback_pb2, gallery_pb2, match_pb2, model_pb2, operations_pb2, search_pb2, upkeep_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
    if (service.full_name, method.name) not in _NEVER_REPEATED
]
_SERVICE_CONFIG = {
    "methodConfig": [
        {
            "name": _REPEATED,
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "2s",
                "backoffMultiplier": 3,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ],
    # When most calls fail, repeating them would only load a struggling server further.
    "retryThrottling": {"maxTokens": 20, "tokenRatio": 0.5},
}


class _Settings:
    def __init__(self, target: str, *, timeout: float, max_message_bytes: int, access: Access) -> None:
        if timeout <= 0:
            raise ValueError(f"timeout must be positive, in seconds; got {timeout}")
        if max_message_bytes <= 2 * _ENVELOPE_BYTES:
            raise ValueError(f"max_message_bytes must be above {2 * _ENVELOPE_BYTES}; got {max_message_bytes}")
        self.target = target
        self.timeout = timeout
        self._max_message_bytes = max_message_bytes
        self._access = access

    def _channel_options(self) -> list[tuple[str, Any]]:
        return [
            ("grpc.max_send_message_length", self._max_message_bytes),
            ("grpc.max_receive_message_length", self._max_message_bytes),
            ("grpc.service_config", json.dumps(_SERVICE_CONFIG)),
            # A call is repeated from this buffer; larger requests would silently not be repeated.
            ("grpc.per_rpc_retry_buffer_size", self._max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # For all its name, how long one attempt to connect may take: a busy server is slow to greet.
            ("grpc.min_reconnect_backoff_ms", 5000),
            ("grpc.max_reconnect_backoff_ms", 5000),
            *self._access.options,
        ]

    def _packed(self, batch: Batch[E, R]) -> Iterator[tuple[int, Call[list[R]]]]:
        """Calls of the batch, each with its number of elements."""
        chunk: list[E] = []
        room = self._max_message_bytes - _ENVELOPE_BYTES
        size = 0
        for element in batch.elements:
            bytes_needed = element.ByteSize() + _ELEMENT_BYTES
            if chunk and (len(chunk) == batch.most or size + bytes_needed > room):
                yield len(chunk), batch.call(chunk)
                chunk, size = [], 0
            chunk.append(element)
            size += bytes_needed
        if chunk:
            yield len(chunk), batch.call(chunk)

    def _failed(self, error: Any) -> CallFailed:
        return from_call(error, target=self.target, timeout=self.timeout)

    def _not_ready(self, seconds: float) -> Unavailable:
        return Unavailable(
            f"{self.target} was not serving after {seconds:g} s; start it with `lookalike serve`, or wait longer",
            code=grpc.StatusCode.UNAVAILABLE,
        )


class Transport(_Settings):
    """Calls that block; may be used from several threads."""

    def __init__(self, target: str, *, timeout: float, max_message_bytes: int, access: Access) -> None:
        super().__init__(target, timeout=timeout, max_message_bytes=max_message_bytes, access=access)
        options, credentials = self._channel_options(), access.credentials
        self._channel = (
            grpc.insecure_channel(target, options=options)
            if credentials is None
            else grpc.secure_channel(target, credentials, options=options)
        )

    def unary(self, call: Call[R]) -> R:
        try:
            response = self._method(call)(call.request, timeout=self.timeout, metadata=self._access.metadata)
        except grpc.RpcError as error:
            raise self._failed(error) from None
        return call.parse(response)

    def pages(self, call: Callable[[str], Call[Page[R]]]) -> Iterator[R]:
        page = self.unary(call(""))
        yield from page.elements
        while page.next_token:
            page = self.unary(call(page.next_token))
            yield from page.elements

    def batch(self, batch: Batch[E, R]) -> list[R]:
        return [result for size, call in self._packed(batch) for result in _complete(self.unary(call), size)]

    def collected(self, call: Collected[R]) -> R:
        try:
            parts = list(self._streaming(call)(call.request, timeout=self.timeout, metadata=self._access.metadata))
        except grpc.RpcError as error:
            raise self._failed(error) from None
        return call.parse(parts)

    def stream(self, call: Stream[R]) -> Iterator[R]:
        requests = _Requests(call.requests)
        made: grpc.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(f"/{call.method}")
        responses = made(requests, metadata=self._access.metadata)
        try:
            for data in responses:
                yield call.parse(data)
        except grpc.RpcError as error:
            raise self._failed(error) from None
        finally:
            responses.cancel()  # for a caller who stops iterating
        requests.raise_failure()

    def wait_until_ready(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Return as soon as the server is serving. Raises Unavailable when it is not after `timeout` seconds."""
        give_up = time.monotonic() + timeout
        while not self._serving_by(give_up):
            if time.monotonic() >= give_up:
                raise self._not_ready(timeout)
            time.sleep(_POLL_SECONDS)

    def close(self) -> None:
        self._channel.close()

    def _streaming(self, call: Collected[R]) -> grpc.UnaryStreamMultiCallable[bytes, bytes]:
        return self._channel.unary_stream(f"/{call.method}")

    def _method(self, call: Call[R]) -> grpc.UnaryUnaryMultiCallable[bytes, bytes]:
        return self._channel.unary_unary(f"/{call.method}")

    def _serving_by(self, give_up: float) -> bool:
        call = is_serving()
        patience = max(give_up - time.monotonic(), 0.001)
        try:
            response = self._method(call)(call.request, timeout=patience, wait_for_ready=True)
        except grpc.RpcError:
            return False
        return call.parse(response)


class AsyncTransport(_Settings):
    """Calls that are awaited; belongs to the event loop it was first used in."""

    def __init__(self, target: str, *, timeout: float, max_message_bytes: int, access: Access) -> None:
        super().__init__(target, timeout=timeout, max_message_bytes=max_message_bytes, access=access)
        options, credentials = self._channel_options(), access.credentials
        self._channel = (
            grpc.aio.insecure_channel(target, options=options)
            if credentials is None
            else grpc.aio.secure_channel(target, credentials, options=options)
        )

    async def unary(self, call: Call[R]) -> R:
        try:
            response = await self._method(call)(call.request, timeout=self.timeout, metadata=self._access.metadata)
        except grpc.aio.AioRpcError as error:
            raise self._failed(error) from None
        return call.parse(response)

    async def pages(self, call: Callable[[str], Call[Page[R]]]) -> AsyncIterator[R]:
        page = await self.unary(call(""))
        for element in page.elements:
            yield element
        while page.next_token:
            page = await self.unary(call(page.next_token))
            for element in page.elements:
                yield element

    async def batch(self, batch: Batch[E, R]) -> list[R]:
        return [result for size, call in self._packed(batch) for result in _complete(await self.unary(call), size)]

    async def collected(self, call: Collected[R]) -> R:
        try:
            made: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = self._channel.unary_stream(f"/{call.method}")
            responses = made(call.request, timeout=self.timeout, metadata=self._access.metadata)
            parts = [data async for data in responses]
        except grpc.aio.AioRpcError as error:
            raise self._failed(error) from None
        return call.parse(parts)

    async def stream(self, call: Stream[R]) -> AsyncIterator[R]:
        requests = _Requests(call.requests)
        made: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = self._channel.stream_stream(f"/{call.method}")
        responses = made(requests.asynchronously(), metadata=self._access.metadata)
        try:
            async for data in responses:
                yield call.parse(data)
        except grpc.aio.AioRpcError as error:
            raise self._failed(error) from None
        finally:
            responses.cancel()
        requests.raise_failure()

    async def wait_until_ready(self, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Return as soon as the server is serving. Raises Unavailable when it is not after `timeout` seconds."""
        give_up = time.monotonic() + timeout
        while not await self._serving_by(give_up):
            if time.monotonic() >= give_up:
                raise self._not_ready(timeout)
            await asyncio.sleep(_POLL_SECONDS)

    async def close(self) -> None:
        await self._channel.close()

    def _method(self, call: Call[R]) -> grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]:
        return self._channel.unary_unary(f"/{call.method}")

    async def _serving_by(self, give_up: float) -> bool:
        call = is_serving()
        patience = max(give_up - time.monotonic(), 0.001)
        try:
            response = await self._method(call)(call.request, timeout=patience, wait_for_ready=True)
        except grpc.aio.AioRpcError:
            return False
        return call.parse(response)


class _Requests(Iterator[bytes]):
    """The messages of a stream. When making one fails, the stream ends there and the failure is kept: gRPC would only
    log it."""

    def __init__(self, requests: Iterator[bytes]) -> None:
        self._requests = requests
        self._failure: BaseException | None = None

    def __next__(self) -> bytes:
        try:
            return next(self._requests)
        except StopIteration:
            raise
        except BaseException as error:
            self._failure = error
            raise StopIteration from None

    async def asynchronously(self) -> AsyncIterator[bytes]:
        """The same, made in threads: an image may be read from a slow disk."""
        while (request := await asyncio.to_thread(next, self, None)) is not None:
            yield request

    def raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


def _complete(results: list[R], size: int) -> list[R]:
    """Results are matched to elements by their order, so a short answer would shift all that follow."""
    if len(results) != size:
        raise ResourceExhausted(
            f"the server answered {len(results)} of {size} elements; its version may not fit this client",
            code=grpc.StatusCode.UNKNOWN,
        )
    return results
