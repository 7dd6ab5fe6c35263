"""The call being served, known to whatever works for it."""

from __future__ import annotations

import re
import time
import uuid
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from service.stages import Observer

REQUEST_ID = "x-request-id"
"""The metadata that carries a request id, both ways."""

# It is written to logs and sent back: nothing that could end a line or forge another, and not long.
_SANE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/+=-]{0,127}")


@dataclass(eq=False)
class Call:
    """One call of one of our methods, from its beginning to its end."""

    method: str
    """As it travels, such as `/lookalike.v1.MatchService/Verify`."""
    context: grpc.aio.ServicerContext[Any, Any]
    request_id: str = ""
    """What finds the call's log lines: what the caller sent as `x-request-id`, or else made here."""
    started: float = field(default_factory=time.perf_counter)
    trace_id: str = ""
    """Of the trace that the call belongs to, in hexadecimal; empty where none is made."""
    observers: list[Observer] = field(default_factory=list)
    """Who is told of the call's stages."""
    engines: list[Any] = field(default_factory=list)
    """The engines that it uses, which are not freed before it has ended."""
    over: bool = False
    """Whether it has ended; what still works for it then takes nothing more in its name."""

    def __post_init__(self) -> None:
        self.request_id = self.request_id or self._wished_id() or uuid.uuid4().hex

    def metadata(self, name: str) -> str:
        """The first text that the caller sent under this name; empty where there is none."""
        for key, value in self.context.invocation_metadata() or ():
            if key == name and isinstance(value, str):
                return value
        return ""

    def _wished_id(self) -> str:
        wished = self.metadata(REQUEST_ID)
        return wished if _SANE_ID.fullmatch(wished) else ""


CURRENT: ContextVar[Call | None] = ContextVar("call", default=None)
"""The call that the running task serves; None outside of one."""


def request_id() -> str:
    """The id of the call being served; empty outside of one."""
    call = CURRENT.get()
    return "" if call is None else call.request_id
