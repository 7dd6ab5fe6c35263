"""Group commit: writers queue, and the first that gets hold of the lock commits for all that wait, in one go."""

from __future__ import annotations

import copy
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from embedding.errors import LookalikeError
from index.deadline import Deadline
from index.store import Outcome, Purge, Write, Written

_MOST_WRITES = 1024  # in one transaction
_LOOK_SECONDS = 0.02  # between two looks at the deadline of a write that waits

# How long the leader of a group waits for more: at most this long, and this share of what the last commit took.
_GATHER_SECONDS, _GATHER_SHARE, _GATHER_STEP = 0.002, 0.2, 2e-5

_Refusal = TypeVar("_Refusal", bound=LookalikeError | sqlite3.Error | MemoryError)

Commit = Callable[[Sequence[Write]], Sequence[Outcome]]
"""Carries out writes in their order, durably, and gives what became of each; raises what refuses all of them."""


class WriteQueue:
    """The writes of one gallery that wait, and the lock that they are committed under; for any thread."""

    def __init__(self) -> None:
        self._writing = threading.Lock()
        self._waiting: deque[_Ticket] = deque()
        self._last_group, self._last_seconds = 1, 0.0

    def __len__(self) -> int:
        """Writes that wait."""
        return len(self._waiting)

    def carry_out(self, write: Write, commit: Commit, deadline: Deadline | None = None) -> Written:
        """What came of a write that was committed together with those of other threads.

        Raises what refused it, or what the deadline raises where it passes before the write's turn comes.
        """
        ticket = _Ticket(write)
        self._waiting.append(ticket)
        while ticket.outcome is None:
            if self._writing.acquire(blocking=False):
                try:
                    if ticket.outcome is None:
                        self._commit_waiting(commit)
                except BaseException:
                    with suppress(ValueError):
                        self._waiting.remove(ticket)  # its caller is told; left there, it would be woken for the others
                    raise
                finally:
                    self._writing.release()
                    self._wake_next()
            elif deadline is None:
                ticket.woken.acquire()
            elif not ticket.woken.acquire(timeout=_LOOK_SECONDS):
                self._withdraw_if_late(ticket, deadline)
        if isinstance(ticket.outcome, Written):
            return ticket.outcome
        raise ticket.outcome

    @contextmanager
    def held(self) -> Iterator[None]:
        """The write lock: nothing is committed within."""
        try:
            with self._writing:
                yield
        finally:
            self._wake_next()

    def _withdraw_if_late(self, ticket: _Ticket, deadline: Deadline) -> None:
        try:
            deadline.check()
        except LookalikeError:
            try:
                self._waiting.remove(ticket)
            except ValueError:
                return  # it is being carried out, and looks at the deadline by itself
            self._wake_next()
            raise

    def _wake_next(self) -> None:
        """Have a write that waits try to lead; called whenever the write lock has been released."""
        with suppress(IndexError):
            self._waiting[0].wake()

    def _commit_waiting(self, commit: Commit) -> None:
        """Commit what waits, for all; the caller holds the write lock."""
        self._gather()
        batch: list[_Ticket] = []
        while self._waiting and len(batch) < _MOST_WRITES:
            # A purge goes alone: to undo it within a transaction would take as long as it took.
            if batch and any(isinstance(each.write, Purge) for each in (batch[-1], self._waiting[0])):
                break
            batch.append(self._waiting.popleft())
        begun = time.monotonic()
        try:
            outcomes: Sequence[Outcome | MemoryError] = commit([ticket.write for ticket in batch])
        except (LookalikeError, sqlite3.Error, MemoryError) as error:
            outcomes = [_copied(error) for _ in batch]
        except BaseException:
            self._waiting.extendleft(reversed(batch))  # their own threads will try
            raise
        self._last_group, self._last_seconds = len(batch), time.monotonic() - begun
        for ticket, outcome in zip(batch, outcomes, strict=True):
            ticket.outcome = outcome
            ticket.wake()

    def _gather(self) -> None:
        """Wait a little for the writers of the last group to come again: one sync of the disk serves them all."""
        until = time.monotonic() + min(_GATHER_SECONDS, _GATHER_SHARE * self._last_seconds)
        while len(self._waiting) < self._last_group and time.monotonic() < until:
            time.sleep(_GATHER_STEP)


class _Ticket:
    """A write that waits, and what became of it."""

    __slots__ = ("outcome", "woken", "write")

    def __init__(self, write: Write) -> None:
        self.write = write
        self.outcome: Outcome | MemoryError | None = None
        self.woken = threading.Lock()
        """Held until the ticket's thread should look again; a lock is the cheapest event."""
        self.woken.acquire()

    def wake(self) -> None:
        with suppress(RuntimeError):  # it is awake already
            self.woken.release()


def _copied(error: _Refusal) -> _Refusal:
    """The same error for another thread: threads that raise one error write into one traceback."""
    copied = copy.copy(error)
    copied.__cause__ = error.__cause__
    return copied
