"""What an image is on its way to its embedding, and who waits for it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field

from embedding.images import Pixels
from service.sources import Embedded
from service.stages import Shared, Work


class Waiter:
    """One who waits for several images: one future for all, so that it is woken once."""

    __slots__ = ("_left", "over")

    def __init__(self) -> None:
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done with the last image; cancelled when one is given up."""
        self._left = 0

    def expect(self) -> None:
        """One image more."""
        self._left += 1

    def one_is_done(self) -> None:
        self._left -= 1
        if not self._left and not self.over.done():
            self.over.set_result(None)


@dataclass(eq=False, slots=True)
class Image:
    """One content on its way, for all who wait for it."""

    key: bytes
    caller: str
    data: bytes
    work: Shared = field(init=False)
    """Of all who wait."""
    waiters: dict[Waiter, Work] = field(default_factory=dict)
    """Who wait, each with what its call is told by."""
    ends: float | None = 0.0
    """When its last waiter gives up, in the time of `time.monotonic`; None for never."""
    pixels: Pixels | None = None
    outcome: Embedded | Exception | None = None
    """None until it is known."""

    def __post_init__(self) -> None:
        self.work = Shared(self.waiters)

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for what is not known yet."""
        return self.outcome is None and bool(self.waiters)

    def join(self, waiter: Waiter, ends: float | None) -> None:
        """Let this one wait for it too, until `ends`; in the name of the current call."""
        waiter.expect()
        self.waiters[waiter] = Work()
        if self.ends is not None:
            self.ends = None if ends is None else max(ends, self.ends)

    def cannot_be_ready_in(self, seconds: float) -> bool:
        """Whether all who wait will have given up by then."""
        return self.ends is not None and time.monotonic() + seconds > self.ends

    def finish(self, outcome: Embedded | Exception) -> None:
        """Tell those who wait; only the first outcome counts."""
        if self.outcome is None:
            self.outcome = outcome
            for waiter in self.waiters:
                waiter.one_is_done()

    def give_up(self) -> None:
        """Cancel those who wait."""
        for waiter in self.waiters:
            waiter.over.cancel()
