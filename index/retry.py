"""Background work that failed is tried again by itself, at growing intervals."""

from __future__ import annotations

import threading
from collections.abc import Callable

RETRY_SECONDS = 60.0
"""Between the first failure and the next attempt; twice as long after each that fails as well."""

_LONGEST_SECONDS = 3600.0


class Retry:
    """Runs one action again, in a thread of its own; not to be called by two threads at once."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action = action
        self._seconds = RETRY_SECONDS
        self.waiting: threading.Thread | None = None
        """What waits for the next attempt and makes it, or has."""
        self.stop: Callable[[], None] = lambda: None
        """Make no attempt that has not begun."""

    def later(self) -> None:
        """Run it once the interval has passed, which is longer the next time."""
        self.stop()
        timer = threading.Timer(self._seconds, self._action)
        timer.daemon = True
        timer.start()
        self.waiting, self.stop = timer, timer.cancel
        self._seconds = min(2 * self._seconds, _LONGEST_SECONDS)

    def reset(self) -> None:
        """It is not needed any more; the next interval is the shortest again."""
        self.stop()
        self._seconds = RETRY_SECONDS
