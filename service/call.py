"""The call being served, known to whatever works for it."""

from __future__ import annotations

import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import grpc


@dataclass(eq=False)
class Call:
    """One call of one of our methods, from its beginning to its end."""

    method: str
    """As it travels, such as `/lookalike.v1.MatchService/Verify`."""
    context: grpc.aio.ServicerContext[Any, Any]
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)
    started: float = field(default_factory=time.perf_counter)
    engines: list[Any] = field(default_factory=list)
    """The engines that it uses, which are not freed before it has ended."""


CURRENT: ContextVar[Call | None] = ContextVar("call", default=None)
"""The call that the running task serves; None outside of one."""


def request_id() -> str:
    """The id of the call being served; empty outside of one."""
    call = CURRENT.get()
    return "" if call is None else call.request_id
