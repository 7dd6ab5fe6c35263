"""How often each caller may call: token buckets, in memory.

A call takes one token, and so does each further element of a batch. A call is admitted while there is a whole token;
what a batch takes beyond what is there is owed, and calls are refused until it is paid. So a batch larger than the
bucket passes, and the long-run rate still holds. A stream that owes is held back rather than refused.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

from embedding.errors import RateLimited
from service.access.principal import Principal

MAX_CALLERS = 10_000
"""Buckets remembered; the one unused for longest is forgotten first, and would be full again or soon."""


class RateLimits:
    """The buckets of one server, by the name of the caller; belongs to one event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when they were counted

    def admit(self, principal: Principal) -> None:
        """Take one token. Raises RateLimited when there is none."""
        if principal.per_second is None:
            return
        tokens = self._tokens(principal, principal.per_second)
        if tokens < 1:
            raise RateLimited(
                f"{principal.name!r} may make {principal.per_second:g} calls a second, {principal.burst:,} at once",
                subject=f"caller:{principal.name}",
                retry_seconds=(1 - tokens) / principal.per_second,
            )
        self._keep(principal, tokens - 1)

    def charge(self, principal: Principal, elements: int) -> float:
        """Take so many tokens, on credit where need be; the seconds until what is owed is paid, else 0."""
        if principal.per_second is None or elements <= 0:
            return 0.0
        tokens = self._tokens(principal, principal.per_second) - elements
        self._keep(principal, tokens)
        return max(0.0, -tokens / principal.per_second)

    def _tokens(self, principal: Principal, per_second: float) -> float:
        now = self._clock()
        tokens, counted = self._buckets.get(principal.name, (float(principal.burst), now))
        return min(float(principal.burst), tokens + (now - counted) * per_second)

    def _keep(self, principal: Principal, tokens: float) -> None:
        self._buckets[principal.name] = (tokens, self._clock())
        self._buckets.move_to_end(principal.name)
        if len(self._buckets) > MAX_CALLERS:
            self._buckets.popitem(last=False)
