"""The call being served, known to whatever works for it."""

from __future__ import annotations

import asyncio
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, Any

from service.access.principal import ANYBODY, Principal, Scope
from service.workers.passed_on import peer_of

if TYPE_CHECKING:
    import grpc

    from service.admission import Room
    from service.stages import Observer

REQUEST_ID = "x-request-id"
"""The metadata that carries a request id, both ways."""

_PROCESS, _NUMBERS = os.urandom(10).hex(), count()  # asking the system for each takes as long as a short search

# It is written to logs and sent back: nothing that could end a line or forge another, and not long.
_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")


class StreamBytes:
    """The bytes of elements of all streams together, which are read ahead of the work on them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0
        self._waiting: set[asyncio.Event] = set()

    @property
    def held(self) -> int:
        """By all streams."""
        return self._held

    def is_full(self, size: int) -> bool:
        """Whether `size` more are too many."""
        return self._held + size > self._most

    def take(self, size: int) -> None:
        """Count `size` more, even where they are too many: a stream that holds nothing may always read one element."""
        self._held += size

    def give_back(self, size: int) -> None:
        """And wake the streams that wait for room."""
        self._held -= size
        for event in self._waiting:
            event.set()

    async def wait(self, room: asyncio.Event) -> None:
        """Until `room` is set, by this or by whoever else has it."""
        self._waiting.add(room)
        try:
            await room.wait()
        finally:
            self._waiting.discard(room)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a call may ask for at most, where the method itself does not set less."""

    batch: int = 1024
    """Elements of a batch."""
    k: int = 10_000
    """Neighbours."""
    message_bytes: int = 64 * 2**20
    """Of one message, received or sent."""
    message_seconds: float = 300.0
    """Until the message of a call that has one must have come."""
    answers: Room | None = None
    """Where large answers are held until they are sent; None for any number."""
    window: int = 256
    """Elements of a stream that are worked on together."""
    stream_bytes: StreamBytes = field(default_factory=lambda: StreamBytes(256 * 2**20))
    """Shared by all streams of a server."""


@dataclass(eq=False)
class Call:
    """One call of one of our methods, from its beginning to its end."""

    method: str
    """As it travels, such as `/lookalike.v1.MatchService/Verify`."""
    context: grpc.aio.ServicerContext[Any, Any]
    request_id: str = ""
    """What finds the call's log lines: what the caller sent as `x-request-id`, or else made here."""
    started: float = field(default_factory=time.perf_counter)
    principal: Principal = ANYBODY
    """Who calls, and what they may do."""
    requests: int = 0
    """Messages received."""
    names: list[str] = field(default_factory=list)
    """The first resources that its requests name, for the audit log."""
    galleries: list[tuple[str, Scope]] = field(default_factory=list)
    """What its first request named, and what is done to it: checked again while a stream lasts."""
    pause: float = 0.0
    """Seconds that the next element of its stream is held back: set by a hook, which must not wait itself."""
    trace_id: str = ""
    """Of the trace that the call belongs to, in hexadecimal; empty where none is made."""
    observers: list[Observer] = field(default_factory=list)
    """Who is told of the call's stages."""
    engines: list[Any] = field(default_factory=list)
    """The engines that it uses, which are not freed before it has ended."""
    over: bool = False
    """Whether it has ended; what still works for it then takes nothing more in its name."""
    limits: Limits = field(default_factory=Limits)
    _address: str = ""
    streams: bool = False
    """Whether its requests are a stream, whose caller can be held back instead of refused."""

    @property
    def caller(self) -> str:
        """Who calls, by name; empty where nobody has to say."""
        return self.principal.name

    def __post_init__(self) -> None:
        self.request_id = self.request_id or self._wished_id() or f"{_PROCESS}{next(_NUMBERS):012x}"

    def metadata(self, name: str) -> str:
        """The first text that the caller sent under this name; empty where there is none."""
        for key, value in self.context.invocation_metadata() or ():
            if key == name and isinstance(value, str):
                return value
        return ""

    def _wished_id(self) -> str:
        wished = self.metadata(REQUEST_ID)
        return wished if _SANE_ID.fullmatch(wished) else ""

    @property
    def payer(self) -> str:
        """Whose share of the server the call takes: the caller's, or else that of the address it comes from."""
        if self.caller:
            return self.caller
        self._address = self._address or address_of(self.context)
        return self._address

    @property
    def seconds_left(self) -> float | None:
        """Until its caller gives up; None when he waits for ever."""
        left = self.context.time_remaining()
        return None if left is None else float(left)


CURRENT: ContextVar[Call | None] = ContextVar("call", default=None)
"""The call that the running task serves, or that work in a thread is done for; None outside of one."""


def address_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """Where a call comes from, without the port: a caller may have any number of connections."""
    peer = peer_of(context)
    kind, _, address = peer.partition(":")
    return f"{kind}:{address.rpartition(':')[0]}" if kind in {"ipv4", "ipv6"} else peer


def limits() -> Limits:
    """Of the call being served; the defaults outside of one."""
    call = CURRENT.get()
    return Limits() if call is None else call.limits


@contextmanager
def answer_held(size: int) -> Iterator[None]:
    """Count this many bytes among those of answers that are not sent yet. Raises Overloaded."""
    call, room = CURRENT.get(), limits().answers
    if call is None or room is None:
        yield
        return
    with room.enter(call.payer, 1, size):
        yield


def request_id() -> str:
    """The id of the call being served; empty outside of one."""
    call = CURRENT.get()
    return "" if call is None else call.request_id


def principal() -> Principal:
    """Who makes the call being served; anybody outside of one."""
    call = CURRENT.get()
    return ANYBODY if call is None else call.principal
