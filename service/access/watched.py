"""A file that is read anew when it changes."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import structlog

from embedding.errors import LookalikeError

LOOK_SECONDS = 1.0
"""How often a file is looked at: a revoked key is refused at the latest so long after."""

T = TypeVar("T")

_log = structlog.get_logger(__name__)


class Watched:
    """Tells of a change once, of a file that is missing too; looks once in `LOOK_SECONDS`. For one event loop."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._looked = time.monotonic()
        self._stamp = self._state()
        self._unread = False  # though it is there
        self._said = ""  # why it could not be used

    def has_changed(self, *, at_once: bool = False) -> bool:
        """Whether it is not what it was when last looked at; `at_once` looks whatever the time."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS and not at_once:
            return False
        self._looked = now
        before, self._stamp = self._stamp, self._state()
        unread, self._unread = self._unread, False
        return unread or self._stamp != before

    def read_again(self, read: Callable[[Path], T], *, failed: str) -> T | None:
        """What `read` makes of it now; None where it raises LookalikeError, which is logged as `failed`, once."""
        try:
            found = read(self.path)
        except LookalikeError as error:
            # What the disk refused may be read at the next look, and a revocation may stand in it.
            self._unread = isinstance(error.__cause__, OSError)
            if str(error) != self._said:
                _log.error(failed, reason=str(error))
                self._said = str(error)
            return None
        self._said = ""
        return found

    def _state(self) -> tuple[int, int, int, int] | None:
        try:
            state = self.path.stat()
        except OSError:
            return None
        # With the time of the last change of mode or owner: a file that was refused for these may count now.
        return state.st_ctime_ns, state.st_mtime_ns, state.st_size, state.st_ino
