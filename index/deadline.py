"""When to give up a search: at a time, or because the caller has gone."""

from __future__ import annotations

import time

from embedding.errors import Cancelled, DeadlineExceeded


class Deadline:
    """Ends work in another thread: engines call `check` at least every 50 ms while they search.

    Make one for each call; `seconds` from now it expires, None for never, and `cancel` ends it at once.
    """

    def __init__(self, seconds: float | None = None) -> None:
        self._ends = None if seconds is None else time.monotonic() + seconds
        self._cancelled = False  # an event takes longer to make than a call has time to spare

    def cancel(self) -> None:
        """Make every later `check` raise Cancelled; any thread may call it, any number of times."""
        self._cancelled = True

    def check(self) -> None:
        """Raises Cancelled or DeadlineExceeded when the work is no longer wanted."""
        if self._cancelled:
            raise Cancelled("the call was cancelled; nothing was changed")
        if self._ends is not None and time.monotonic() >= self._ends:
            raise DeadlineExceeded("the time limit has passed; allow more time, ask for fewer results or lower recall")

    @property
    def seconds_left(self) -> float | None:
        """Until it expires, at least 0; None for no limit."""
        return None if self._ends is None else max(0.0, self._ends - time.monotonic())
