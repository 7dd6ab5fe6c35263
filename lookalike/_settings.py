"""What a client is made with: the options of its channels, and how batches are cut to fit a message."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any, Self, TypedDict, TypeVar, Unpack

import grpc
from google.protobuf.message import Message

from lookalike._calls.kinds import BYTES_BEFORE_ELEMENT, Batch, Call, Fitted, Part
from lookalike._retry import LONGEST, Patience, Retry, service_config
from lookalike._secure import Access, Tls, from_environment
from lookalike.errors import CallFailed, Cancelled, Unavailable, from_call, not_understood, over_limit

R = TypeVar("R")
E = TypeVar("E", bound=Message)

DEFAULT_TIMEOUT = 30.0
"""Seconds that a call may take, retries included."""

DEFAULT_MAX_MESSAGE_BYTES = 64 * 2**20
"""The server's own default limit on a message."""

DEFAULT_WINDOW = 512
"""Elements of a stream that are not answered yet: as many as a server works on together, and as many on their way."""

_ENVELOPE_BYTES = 4096
"""Room that a batch leaves for the rest of its message, beside the elements."""

_MOST_CONNECTIONS = 64

_MOST_MESSAGE_BYTES = 2**31 - 1
"""gRPC's own bound: it counts them in 32 bits."""

_DEFAULT_RETRY = Retry()


class Tuning(TypedDict, total=False):
    """Arguments of a client that say how it calls, not whom."""

    timeout: float
    max_message_bytes: int
    retry: Retry | None
    hedge_after: float | None
    connections: int
    window: int


class Configured:
    """A client of the server at `target`, such as "localhost:50051"."""

    def __init__(
        self,
        target: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        max_message_bytes: int = DEFAULT_MAX_MESSAGE_BYTES,
        tls: Tls | bool = False,
        api_key: str | None = None,
        allow_insecure_key: bool = False,
        retry: Retry | None = _DEFAULT_RETRY,
        hedge_after: float | None = None,
        connections: int = 1,
        window: int = DEFAULT_WINDOW,
    ) -> None:
        if not target:
            raise ValueError("target must name a server, such as localhost:50051; got nothing")
        if not isinstance(timeout, int | float) or not 0 < timeout <= LONGEST:
            raise ValueError(f"timeout must be positive and at most {LONGEST:,}, in seconds; got {timeout}")
        if not isinstance(max_message_bytes, int) or not 2 * _ENVELOPE_BYTES < max_message_bytes <= _MOST_MESSAGE_BYTES:
            raise ValueError(
                f"max_message_bytes must be a whole number above {2 * _ENVELOPE_BYTES:,} and at most "
                f"{_MOST_MESSAGE_BYTES:,}; got {max_message_bytes}"
            )
        if not isinstance(connections, int) or not 1 <= connections <= _MOST_CONNECTIONS:
            raise ValueError(f"connections must be a whole number from 1 to {_MOST_CONNECTIONS}; got {connections}")
        if window < 1:
            raise ValueError(f"window must be at least 1; got {window}")
        self.target = target
        self.timeout = timeout
        self._max_message_bytes = max_message_bytes
        self._retry = retry
        self._connections = connections
        self._window = window
        self._access = Access(target, tls, api_key, allow_insecure_key)
        self._patience = Patience(retry, hedge_after)
        self._closed = False
        self._open()

    @classmethod
    def from_env(cls, **tuning: Unpack[Tuning]) -> Self:
        """A client of the server in LOOKALIKE_TARGET, by the variables that the command line reads too:

        LOOKALIKE_TLS, LOOKALIKE_TLS_CA, LOOKALIKE_TLS_SERVER_NAME, LOOKALIKE_CLIENT_CERTIFICATE, LOOKALIKE_CLIENT_KEY,
        LOOKALIKE_API_KEY or LOOKALIKE_API_KEY_FILE, and LOOKALIKE_ALLOW_INSECURE_KEY. An empty one counts as unset.

        Raises ValueError, naming the variable, when one is missing or senseless; OSError for a file that cannot be
        read.
        """
        return cls(**from_environment(os.environ), **tuning)

    def _open(self) -> None:
        raise NotImplementedError

    def _check_open(self) -> None:
        if self._closed:
            raise RuntimeError("the client is closed; make another one, or close it after its last call")

    def _given_up(self) -> Cancelled:
        """The error of a call that had begun and is not waited for any longer."""
        words = "the client was closed while the call lasted" if self._closed else "the call was given up on this side"
        return Cancelled(words, code=grpc.StatusCode.CANCELLED)

    def _channel_options(self) -> list[tuple[str, Any]]:
        options = [
            ("grpc.max_send_message_length", self._max_message_bytes),
            ("grpc.max_receive_message_length", self._max_message_bytes),
            # A call is repeated from this buffer; larger requests would silently not be repeated.
            ("grpc.per_rpc_retry_buffer_size", self._max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 100),
            # For all its name, how long one attempt to connect may take: a busy server is slow to greet.
            ("grpc.min_reconnect_backoff_ms", 5000),
            ("grpc.max_reconnect_backoff_ms", 5000),
            # Streams have no deadline: this finds out that their server has vanished without a word. An answer to the
            # ping is waited for by another clock than bytes of any kind, of a minute by default.
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.ping_timeout_ms", 20_000),
            *self._access.options,
        ]
        if self._retry is None:
            options.append(("grpc.enable_retries", 0))
        else:
            options.append(("grpc.service_config", json.dumps(service_config(self._retry))))
        if self._connections > 1:
            options.append(("grpc.use_local_subchannel_pool", 1))  # channels alike would share one connection
        return options

    def _fitted(self, call: Call[R] | Fitted[R]) -> Call[R]:
        return call.call(self._max_message_bytes) if isinstance(call, Fitted) else call

    def _packed(self, batch: Batch[E, R]) -> Iterator[Part[R]]:
        """The batch in parts of one call each; elements that fit into no message fail in their places."""
        chunk: list[E] = []
        failed: dict[int, R] = {}
        room = self._max_message_bytes - _ENVELOPE_BYTES
        size = 0
        for element in batch.elements:
            bytes_needed = element.ByteSize() + BYTES_BEFORE_ELEMENT
            if bytes_needed > room and (alone := batch.bytes_alone(element)) > self._max_message_bytes:
                failed[len(chunk) + len(failed)] = batch.failed(over_limit(alone, self._max_message_bytes))
                continue
            if chunk and (len(chunk) == batch.most or size + bytes_needed > room):
                yield Part(batch.call(chunk), len(chunk), failed)
                chunk, failed, size = [], {}, 0
            chunk.append(element)
            size += bytes_needed
        if chunk or failed:
            yield Part(batch.call(chunk) if chunk else None, len(chunk), failed)

    def _failed(self, error: Any) -> CallFailed:
        encrypted = self._access.credentials is not None
        return from_call(error, target=self.target, timeout=self.timeout, encrypted=encrypted)

    def _not_ready(self, seconds: float, details: str) -> Unavailable:
        """`details` are those of a call that did not wait for a connection."""
        encrypted = self._access.credentials is not None
        advice = not_understood(details, self.target, encrypted=encrypted)
        return Unavailable(
            f"{self.target} was not serving after {seconds:g} s"
            + (f": {advice}" if advice else "; start it with `lookalike serve`, or wait longer"),
            code=grpc.StatusCode.UNAVAILABLE,
        )


def checked_wait(seconds: float) -> float:
    """Seconds to wait at most, infinity for ever."""
    if not isinstance(seconds, int | float) or not seconds >= 0:
        raise ValueError(f"timeout must be 0 or more, in seconds, or infinity for ever; got {seconds}")
    return seconds
