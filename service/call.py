"""The call being served, known to whatever works for it."""

from __future__ import annotations

import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import grpc

from service.principal import ANYBODY, Principal, Scope


@dataclass(eq=False)
class Call:
    """One call of one of our methods, from its beginning to its end."""

    method: str
    """As it travels, such as `/lookalike.v1.MatchService/Verify`."""
    context: grpc.aio.ServicerContext[Any, Any]
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
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

    @property
    def caller(self) -> str:
        """Who calls, by name; empty where nobody has to say."""
        return self.principal.name


CURRENT: ContextVar[Call | None] = ContextVar("call", default=None)
"""The call that the running task serves; None outside of one."""


def request_id() -> str:
    """The id of the call being served; empty outside of one."""
    call = CURRENT.get()
    return "" if call is None else call.request_id


def principal() -> Principal:
    """Who makes the call being served; anybody outside of one."""
    call = CURRENT.get()
    return ANYBODY if call is None else call.principal
