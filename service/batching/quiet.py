"""When nothing more comes at the same time: what has arrived together is told to the event loop one by one."""

from __future__ import annotations

import os
from collections.abc import Callable

QUIET_TURNS = 8
"""Turns of the event loop, a few microseconds each, without anything new, after which nobody is waited for any more.
gRPC takes five for a call, by way of another thread, and hands over one call after the other."""

_let_others_run: Callable[[], None] = getattr(os, "sched_yield", lambda: None)
"""gRPC's thread, which may have to wait for the same core."""


class Quiet:
    """Counts the turns since something came."""

    __slots__ = ("_turns",)

    def __init__(self) -> None:
        self._turns = 0

    def came(self) -> None:
        """Something has come: the count begins anew."""
        self._turns = 0

    def after_turn(self) -> bool:
        """Count a turn; whether nothing more is to be expected. Where it is, what brings it gets to run."""
        self._turns += 1
        if self._turns > QUIET_TURNS:
            return True
        _let_others_run()
        return False
