"""When a call is sent again: after a failure (`Retry`), or beside a slow first try (hedging).

What ends with UNAVAILABLE is repeated by gRPC itself, by a service config (gRFC A6) made here. It waits as long as the
server asks for, and knows no status details, which is why refusals for want of room are waited out here instead. It
sends the same bytes again, which is why waits for an operation, which get shorter, are repeated here too. gRPC's core
does not implement the hedging of A6, so that is done by the clients as well.
"""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass
from typing import Any

import grpc
from google.longrunning import operations_pb2

from lookalike._calls.items import GALLERY
from lookalike._calls.upkeep import OPERATIONS
from lookalike.errors import CallFailed, ResourceExhausted
from lookalike.v1 import alias_pb2, feedback_pb2, gallery_pb2, match_pb2, model_pb2, search_pb2, upkeep_pb2

_METHODS = [
    (service.full_name, method.name)
    for module in (alias_pb2, feedback_pb2, gallery_pb2, match_pb2, model_pb2, operations_pb2, search_pb2, upkeep_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]

# Reads may be repeated; and so may writes, because each carries a request_id under which the server does it once and
# answers a repetition as the first time. An import tells how far it came: to begin again is the caller's decision.
_NEVER_REPEATED = {(GALLERY, "ImportItems"), (OPERATIONS, "DeleteOperation")}

REPEATED_HERE = frozenset({f"{OPERATIONS}/WaitOperation"})
"""Calls that the clients repeat when they end with UNAVAILABLE: gRPC would ask for the whole wait again."""

_READS = ("Get", "List", "Search", "Verify", "Embed", "BatchSearch", "BatchVerify", "BatchEmbed")
_NOT_HEDGED = {"SearchMatches", "VerifyGallery"}  # a stream, and one that may mend
HEDGED = frozenset(
    f"{service}/{method}" for service, method in _METHODS if method.startswith(_READS) and method not in _NOT_HEDGED
)
"""Calls that only read and give one answer."""

_ROOM = frozenset({"OVERLOADED", "RATE_LIMITED"})
"""Reasons of refusals before anything was begun, which waiting mends; a full disk is none of them."""

LONGEST = 1_000_000_000
"""Seconds; gRPC counts nanoseconds in 64 bits, and takes what is beyond, infinity too, for a time that has passed."""

_SHORTEST_BACKOFF = 0.002
"""Seconds; gRPC jitters pauses by a fifth and counts them in whole milliseconds: from one of none it does not come
back, and the call ends with its deadline."""

_MOST_GROWTH = 1000

_SPREAD = 0.25
"""Who is told to wait waits up to this share longer, so that not all come back at the same moment."""

_HEDGES = 10
_HEDGE_SHARE = 0.1
"""At most so many second copies in a row, and of all calls this share: a server that is slow because it has too much to
do must not get twice as much."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Retry:
    """How often and how fast calls are repeated, within their timeout.

    A call that ends with UNAVAILABLE is repeated after a pause that grows by `multiplier` and is jittered, or the one
    that the server asks for. One that is refused for want of room (OVERLOADED, RATE_LIMITED) is repeated after the
    pause that the server asks for, when that ends before the timeout; one that a server gave up before it could look at
    it (ResourceExhausted with the code CANCELLED) after a pause that grows.
    """

    attempts: int = 4
    """Tries in all, 2 to 5."""
    initial_backoff: float = 0.1
    """First pause, in seconds; at least 0.002."""
    max_backoff: float = 2.0
    """Longest pause, in seconds."""
    multiplier: float = 3.0
    """1 to 1,000."""
    budget: int = 10
    """Failures in a row after which nothing is repeated: when most calls fail, repeating them would only load a
    struggling server further. At most 500."""
    refund: float = 0.5
    """What a call that succeeds gives back to the budget: repetitions stay below this share of all calls."""

    def __post_init__(self) -> None:
        if not isinstance(self.attempts, int) or not 2 <= self.attempts <= 5:
            raise ValueError(
                "attempts is a whole number between 2 and 5, gRPC's own bound (retry=None for no retries); "
                f"got {self.attempts}"
            )
        if not _SHORTEST_BACKOFF <= self.initial_backoff <= self.max_backoff <= LONGEST:
            raise ValueError(
                f"initial_backoff lies between {_SHORTEST_BACKOFF} s and max_backoff, and this between it and "
                f"{LONGEST:,} s; got {self.initial_backoff} and {self.max_backoff}"
            )
        if not 1 <= self.multiplier <= _MOST_GROWTH:
            raise ValueError(f"multiplier lies between 1 and {_MOST_GROWTH:,}; got {self.multiplier}")
        if not isinstance(self.budget, int) or not 1 <= self.budget <= 500:
            raise ValueError(f"budget is a whole number between 1 and 500; got {self.budget}")
        if not 0.001 <= self.refund <= self.budget:
            raise ValueError(f"refund lies between 0.001 and budget, {self.budget}; got {self.refund}")


def service_config(retry: Retry) -> dict[str, Any]:
    """The service config of a channel, as gRFC A6 has it: repetitions stop while half of `maxTokens` are gone."""
    return {
        "methodConfig": [
            {
                "name": [
                    {"service": service, "method": method}
                    for service, method in _METHODS
                    if (service, method) not in _NEVER_REPEATED and f"{service}/{method}" not in REPEATED_HERE
                ],
                "retryPolicy": {
                    "maxAttempts": retry.attempts,
                    "initialBackoff": f"{retry.initial_backoff:.9f}s",
                    "maxBackoff": f"{retry.max_backoff:.9f}s",
                    "backoffMultiplier": retry.multiplier,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ],
        "retryThrottling": {"maxTokens": 2 * retry.budget, "tokenRatio": retry.refund},
    }


class Budget:
    """A bucket of tokens, full at first; for use from any thread."""

    def __init__(self, most: float, refund: float) -> None:
        self._most = self._tokens = most
        self._refund = refund
        self._lock = threading.Lock()

    def take(self) -> bool:
        """Take a token, if one is there."""
        with self._lock:
            if self._tokens < 1:
                return False
            self._tokens -= 1
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._tokens = min(self._most, self._tokens + self._refund)


class Patience:
    """What a client knows of all its calls when it decides to send one again."""

    def __init__(self, retry: Retry | None, hedge_after: float | None) -> None:
        """Raises ValueError for a `hedge_after` that is no time to wait."""
        if hedge_after is not None and not 0 < hedge_after <= LONGEST:
            raise ValueError(
                f"hedge_after must be positive and at most {LONGEST:,}, in seconds, or None; got {hedge_after}"
            )
        self._retry = retry
        self._hedge_after = hedge_after
        self._retries = Budget(retry.budget, retry.refund) if retry else None
        self._hedges = Budget(_HEDGES, _HEDGE_SHARE)

    def succeeded(self) -> None:
        if self._retries is not None:
            self._retries.succeeded()
        self._hedges.succeeded()

    def pause(self, failed: CallFailed, attempt: int, seconds_left: float, method: str = "") -> float | None:
        """Seconds after which a call that failed in this attempt, from 1, is sent again; None when it is not."""
        if self._retry is None or self._retries is None or attempt >= self._retry.attempts:
            return None
        seconds = self._asked_for(failed, attempt, self._retry, method)
        if seconds is None:
            return None
        seconds *= random.uniform(1, 1 + _SPREAD)
        return seconds if seconds < seconds_left and self._retries.take() else None

    @staticmethod
    def _asked_for(failed: CallFailed, attempt: int, retry: Retry, method: str) -> float | None:
        grown = min(retry.initial_backoff * retry.multiplier ** (attempt - 1), retry.max_backoff)
        if failed.code is grpc.StatusCode.CANCELLED and isinstance(failed, ResourceExhausted):
            # Refused before anybody who could say how long looked at it; gRPC does not repeat what ends so.
            return grown
        if failed.code is grpc.StatusCode.UNAVAILABLE and method in REPEATED_HERE:
            return grown if failed.retry_after is None else failed.retry_after
        is_full = failed.code is grpc.StatusCode.RESOURCE_EXHAUSTED and failed.reason in _ROOM
        return failed.retry_after if is_full else None

    def hedge_after(self, method: str) -> float | None:
        """Seconds after which a second copy of a call may be sent; None for never."""
        return self._hedge_after if method in HEDGED else None

    def may_hedge(self) -> bool:
        return self._hedges.take()


def is_final(code: grpc.StatusCode) -> bool:
    """Whether what ended with this code leaves nothing to wait for from the other copy of the call."""
    return code not in {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
        grpc.StatusCode.CANCELLED,  # by a server that was too busy: copies are given up here only once one is final
    }
