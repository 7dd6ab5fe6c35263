"""When nothing more comes at the same time: what has arrived together is told to the event loop one by one."""

from __future__ import annotations

QUIET_TURNS = 6
"""Turns of the event loop, a few microseconds each, without anything new, after which nobody is waited for any more.
gRPC takes five for a call, by way of another thread, and hands over one call after the other."""


class Quiet:
    """Counts the turns since something came."""

    __slots__ = ("_turns",)

    def __init__(self) -> None:
        self._turns = 0

    def came(self) -> None:
        """Something has come: the count begins anew."""
        self._turns = 0

    def after_turn(self) -> bool:
        """Count a turn; whether nothing more is to be expected."""
        self._turns += 1
        return self._turns > QUIET_TURNS
