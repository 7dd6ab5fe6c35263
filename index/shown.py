"""What has been shown to readers, and for how long they may still read it."""

from __future__ import annotations

import time
import weakref
from collections import deque

from index.snapshot import Snapshot

FOLLOWED_SECONDS = 10.0
"""How long what died is kept for readers in other processes: the most that one of their searches may take."""


class Shown:
    """Every snapshot that a reader may still use; for one writer at a time."""

    def __init__(self, *, followed: bool) -> None:
        self._followed = followed
        self._shown: list[weakref.ref[Snapshot]] = []
        self._lately: deque[tuple[float, Snapshot]] = deque()
        """What followers in other processes may still use, with the time from when on they see a later one."""

    def add(self, snapshot: Snapshot, *, replaced: Snapshot | None) -> None:
        """Note that readers are about to see this one."""
        self._shown.append(weakref.ref(snapshot))
        if self._followed and replaced is not None:
            now = time.monotonic()
            self._lately.append((now, replaced))  # a follower may have taken it until this moment
            while self._lately[0][0] < now - FOLLOWED_SECONDS:
                self._lately.popleft()

    def oldest(self) -> int:
        """The oldest generation that a reader may still use; there is one, the newest."""
        self._shown = [shown for shown in self._shown if shown() is not None]
        return min(snapshot.generation for shown in self._shown if (snapshot := shown()) is not None)
