"""Work of many callers that waits its turn: round robin between callers, first come first served within one."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class FairQueue(Generic[T]):
    """Whoever has much waiting delays himself, and others by one piece of work a turn. Not bounded: see `Room`.

    Pieces of work are told apart by their hash, and each may wait but once.
    """

    def __init__(self) -> None:
        self._turns: OrderedDict[str, OrderedDict[T, None]] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def put(self, caller: str, work: T) -> None:
        """Append to what this caller has waiting."""
        self._turns.setdefault(caller, OrderedDict())[work] = None
        self._size += 1

    def take(self) -> tuple[str, T] | None:
        """The oldest work of the caller whose turn it is, and that caller; None when nothing waits."""
        if not self._size:
            return None
        caller = next(iter(self._turns))
        work = self.take_of(caller)
        assert work is not None
        if caller in self._turns:
            self._turns.move_to_end(caller)
        return caller, work

    def take_of(self, caller: str) -> T | None:
        """The oldest work of this caller, out of turn; None when it has none waiting."""
        waiting = self._turns.get(caller)
        if waiting is None:
            return None
        work, _ = waiting.popitem(last=False)
        self._removed(caller, waiting)
        return work

    def discard(self, caller: str, work: T) -> None:
        """Forget work that nobody wants any more; nothing happens where it does not wait."""
        waiting = self._turns.get(caller)
        if waiting is not None and work in waiting:
            del waiting[work]
            self._removed(caller, waiting)

    def _removed(self, caller: str, waiting: OrderedDict[T, None]) -> None:
        self._size -= 1
        if not waiting:
            del self._turns[caller]
