"""Who may hold how much of the server at once, and what is said to those who come when it is full.

Memory and waiting are bounded at three doors: calls and the bytes of their requests (`Admission`), images on their way
through the encoder, and work of galleries. Work is refused at the first door that it meets and never half done.

Answers are bounded one by one as they are formed (`encoded`, `pages`), by as many threads as form them at once, and
all together from when they are formed until they are sent: `Admission.answers`.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from types import TracebackType
from typing import Self

import grpc
from google.protobuf.message import Message

from embedding.errors import Overloaded
from service.call import Call
from service.calls import Hook

GREED = 8
"""A caller may hold this many times what is left free: alone 8/9 of a room, and whoever comes finds some left."""

LEAST_RETRY_SECONDS = 0.05
MOST_RETRY_SECONDS = 30.0

FORGOTTEN_SECONDS = 5.0
"""After so long without new work a pace says nothing any more: refusing by it would keep it from being corrected."""

_WEIGHT = 0.1  # of the newest piece of work in its moving average


class Pace:
    """Seconds that a piece of work takes lately: a moving average, each piece weighing the same."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._until = 0.0

    @property
    def seconds(self) -> float:
        """Of one piece; 0 while nothing is known."""
        return self._seconds if time.monotonic() < self._until else 0.0

    @property
    def latest(self) -> float:
        """The same, however long ago it was measured: for what nobody is refused by."""
        return self._seconds

    def record(self, seconds: float, pieces: int = 1) -> None:
        """`pieces` were done in `seconds`, together or one after the other."""
        known = self.seconds
        kept = (1 - _WEIGHT) ** pieces if known else 0.0
        self._seconds = kept * known + (1 - kept) * seconds / pieces
        self._until = time.monotonic() + FORGOTTEN_SECONDS


class Room:
    """What callers hold of something that has bounds; use it on one event loop.

    A caller may hold `GREED` times what is free, by count and by bytes (dynamic thresholds, Choudhury and Hahne 1998):
    no reservation for anybody, and nobody can take all. An empty room takes anything, however large.
    """

    def __init__(
        self,
        subject: str,
        *,
        most: int,
        most_bytes: int | None = None,
        most_seconds: float | None = None,
        free_of_time: int = 0,
        seconds_each: Callable[[], float] | None = None,
    ) -> None:
        """`subject` says in the plural what is held. Where `seconds_each` tells how long one takes, nobody enters who
        would wait longer than `most_seconds`, or than he has; the first `free_of_time` are not judged by time."""
        self._subject = subject
        self._most = most
        self._most_bytes = most_bytes
        self._most_seconds = most_seconds
        self._free_of_time = free_of_time
        self._seconds_each = seconds_each
        self._held: dict[str, tuple[int, int]] = {}
        self._count = 0
        self._bytes = 0
        self._patient: OrderedDict[str, OrderedDict[asyncio.Future[Ticket], int]] = OrderedDict()
        self._patient_count = 0

    @property
    def count(self) -> int:
        """How many are held by all."""
        return self._count

    @property
    def bytes(self) -> int:
        """How many bytes are held by all."""
        return self._bytes

    @property
    def most_bytes(self) -> int | None:
        """How many bytes may be held; None for any number."""
        return self._most_bytes

    @property
    def patient(self) -> int:
        """How many wait to enter."""
        return self._patient_count

    def enter(
        self,
        caller: str,
        count: int = 1,
        size: int = 0,
        *,
        seconds_left: float | None = None,
        then_seconds: float = 0.0,
    ) -> Ticket:
        """Hold `count` and `size` bytes; `then_seconds` are to be waited for something else afterwards, within the
        `seconds_left`. Raises Overloaded."""
        self.check(caller, count, size)
        self._check_time(caller, count, seconds_left, then_seconds)
        return Ticket(self, caller, count, size)

    def check(self, caller: str, count: int = 1, size: int = 1) -> None:
        """Raises Overloaded where this caller could not hold so many more, and so many bytes."""
        if self._is_full(caller, count, size):
            raise self._overloaded(
                caller, f"it holds as many {self._subject} as it takes on from one caller, or from all"
            )

    async def enter_patiently(self, caller: str, size: int = 0) -> Ticket:
        """Hold one, and `size` bytes, as soon as there is room: for those whose own caller is held back meanwhile.

        One at a time, because larger room would never come free while others take it in small pieces.
        """
        if not self._patient and not self._is_full(caller, 1, size):
            return Ticket(self, caller, 1, size)
        turn: asyncio.Future[Ticket] = asyncio.get_running_loop().create_future()
        self._patient.setdefault(caller, OrderedDict())[turn] = size
        self._patient_count += 1
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                turn.result().close()  # it was let in and does not come any more
            else:
                self._not_patient(caller, turn)
            raise

    def seconds_ahead(self, caller: str) -> float:
        """How long what this caller brings next would wait, where callers take turns."""
        own, _ = self._held.get(caller, (0, 0))
        others = len(self._held) - (caller in self._held)
        each = 0.0 if self._seconds_each is None else self._seconds_each()
        return each * min(self._count, own + others * (own + 1))

    def _is_full(self, caller: str, count: int, size: int) -> bool:
        if not self._count:
            return False
        own, own_bytes = self._held.get(caller, (0, 0))
        if self._count + count > self._most or own >= GREED * (self._most - self._count):
            return True
        return (
            self._most_bytes is not None
            and size > 0
            and (self._bytes + size > self._most_bytes or own_bytes >= GREED * (self._most_bytes - self._bytes))
        )

    def _check_time(self, caller: str, count: int, seconds_left: float | None, then_seconds: float) -> None:
        if self._seconds_each is None or not self._count or self._count + count <= self._free_of_time:
            return
        ahead = self.seconds_ahead(caller)
        if self._most_seconds is not None and ahead > self._most_seconds:
            raise self._overloaded(caller, f"about {ahead:.2g} seconds of {self._subject} are ahead")
        if seconds_left is not None and ahead + then_seconds > seconds_left:
            and_then = f", {then_seconds:.2g} of other work" if then_seconds else ""
            raise self._overloaded(
                caller, f"about {ahead:.2g} seconds of {self._subject} are ahead{and_then}, and the deadline is earlier"
            )

    def _overloaded(self, caller: str, what: str) -> Overloaded:
        # Rounded, and nothing else that varies is said: the status of a refusal is made once and kept.
        wait = float(f"{min(max(self.seconds_ahead(caller), LEAST_RETRY_SECONDS), MOST_RETRY_SECONDS):.2g}")
        return Overloaded(
            f"the server is busy: {what}; try again in {wait:.2g} seconds", subject=self._subject, retry_seconds=wait
        )

    def _take(self, caller: str, count: int, size: int) -> None:
        own, own_bytes = self._held.get(caller, (0, 0))
        self._held[caller] = (own + count, own_bytes + size)
        self._count += count
        self._bytes += size

    def _give_back(self, caller: str, count: int, size: int) -> None:
        own, own_bytes = self._held[caller]
        if own == count:
            del self._held[caller]
        else:
            self._held[caller] = (own - count, own_bytes - size)
        self._count -= count
        self._bytes -= size
        self._let_in()

    def _let_in(self) -> None:
        """Give the room there is to those who wait for it, caller by caller."""
        admitted = bool(self._patient)
        while admitted:
            admitted = False
            for caller in list(self._patient):
                turn, size = next(iter(self._patient[caller].items()))
                if self._is_full(caller, 1, size):
                    continue
                self._not_patient(caller, turn)
                if caller in self._patient:
                    self._patient.move_to_end(caller)
                if not turn.done():
                    turn.set_result(Ticket(self, caller, 1, size))
                    admitted = True

    def _not_patient(self, caller: str, turn: asyncio.Future[Ticket]) -> None:
        waiting = self._patient.get(caller)
        if waiting is not None and waiting.pop(turn, None) is not None:
            self._patient_count -= 1
            if not waiting:
                del self._patient[caller]


class Ticket:
    """What one piece of work holds of a room, until it is closed or its `with` statement ends."""

    def __init__(self, room: Room, caller: str, count: int, size: int) -> None:
        self._room = room
        self._holds = (caller, count, size)
        self._closed = False
        room._take(caller, count, size)

    def close(self) -> None:
        """Give back what is held; closing again does nothing."""
        if not self._closed:
            self._closed = True
            self._room._give_back(*self._holds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class Admission(Hook):
    """Bounds the calls in flight and the bytes of their requests; each caller's share follows from `Room`.

    The elements of streams are bounded by their windows (see `streams.py`).
    """

    def __init__(self, *, most_calls: int, most_bytes: int, most_answer_bytes: int) -> None:
        self.answers = Room("answers", most=8 * most_calls, most_bytes=most_answer_bytes)
        """Large answers, until they are sent, which may be long after their calls have ended here."""
        self.calls = Room("calls", most=most_calls)
        self.requests = Room("requests", most=2 * most_calls, most_bytes=most_bytes)
        self._tickets: dict[Call, list[Ticket]] = {}

    def begun(self, call: Call) -> None:
        self._tickets[call] = [self.calls.enter(call.payer)]
        if not call.streams:
            self.requests.check(call.payer)  # its request would be refused, and is not taken in for that

    def received(self, call: Call, request: Message) -> None:
        if not call.streams:
            self._tickets[call].append(self.requests.enter(call.payer, 1, request.ByteSize()))

    def answered(self, call: Call, size: int) -> None:
        ticket = self.answers.enter(call.payer, 1, size)
        call.context.add_done_callback(lambda _: ticket.close())  # type: ignore[arg-type]  # a class without a base

    def ended(self, call: Call, code: grpc.StatusCode) -> None:
        for ticket in self._tickets.pop(call, []):
            ticket.close()
