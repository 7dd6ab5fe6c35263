"""Memory that a burst of calls took, given back to the system once it is over.

A server tells its allocator to keep what is freed, which makes the next batch faster (`tune_malloc`); of large requests
that come at once gigabytes would stay for good. So the process is looked at every few seconds: where it has grown by
much, and little has been in flight for a while, what is free goes back.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import structlog

from embedding.runtime import trim_malloc

LOOK_SECONDS = 5.0
"""Between two looks, some ten microseconds each."""

QUIET_LOOKS = 6
"""So many in a row must have found little in flight: who sends a batch now and then shall find its memory there."""

QUIET_BYTES = 2**20
"""Of requests and answers in flight that count as little."""

WORTH_BYTES = 128 * 2**20
"""By which the process must have grown."""

_STATM = Path("/proc/self/statm")

_log = structlog.get_logger(__name__)


class GivenBack:
    """Looks at one process. For one event loop."""

    def __init__(
        self,
        in_flight: Callable[[], int],
        *,
        resident: Callable[[], int] | None = None,
        give_back: Callable[[], None] = trim_malloc,
    ) -> None:
        """`in_flight` says how many bytes of requests and answers are held now."""
        self._in_flight = in_flight
        self._resident = resident or _resident
        self._give_back = give_back
        self._least = self._resident()
        self._quiet = 0

    async def look(self) -> None:
        """Give back what is free where it is worth it."""
        resident = self._resident()
        self._least = min(self._least, resident)
        self._quiet = self._quiet + 1 if self._in_flight() <= QUIET_BYTES else 0
        if self._quiet < QUIET_LOOKS or resident - self._least < WORTH_BYTES:
            return
        await asyncio.to_thread(self._give_back)
        self._least, self._quiet = self._resident(), 0  # what remains is in use, and no reason to try again
        _log.info("memory given back", megabytes=round((resident - self._least) / 2**20))

    async def go_on(self) -> None:
        """Look until cancelled."""
        while self._least:
            await asyncio.sleep(LOOK_SECONDS)
            await self.look()


def _resident() -> int:
    """Bytes of memory of the process that no file stands for; 0 where the system does not tell."""
    try:
        _, resident, shared = map(int, _STATM.read_text().split()[:3])
    except OSError:
        return 0
    return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
