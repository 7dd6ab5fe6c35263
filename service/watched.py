"""A file that is read anew when it changes."""

from __future__ import annotations

import time
from pathlib import Path

LOOK_SECONDS = 1.0
"""How often a file is looked at: a revoked key is refused at the latest so long after."""


class Watched:
    """Tells of a change once, of a file that is missing too; looks once in `LOOK_SECONDS`. For one event loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._looked = time.monotonic()
        self._stamp = self._state()
        self._unread = False

    def has_changed(self, *, at_once: bool = False) -> bool:
        """Whether it is not what it was when last looked at; `at_once` looks whatever the time."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS and not at_once:
            return False
        self._looked = now
        before, self._stamp = self._stamp, self._state()
        unread, self._unread = self._unread, False
        return unread or self._stamp != before

    def forget(self) -> None:
        """It could not be read though it is there: tell of a change at the next look, until it can."""
        self._unread = True

    def _state(self) -> tuple[int, int, int, int] | None:
        try:
            state = self.path.stat()
        except OSError:
            return None
        # With the time of the last change of mode or owner: a file that was refused for these may count now.
        return state.st_ctime_ns, state.st_mtime_ns, state.st_size, state.st_ino
