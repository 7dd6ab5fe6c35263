"""Who is told how far long work on a gallery is, and may end it."""

from __future__ import annotations

import time
from collections.abc import Callable

from embedding.errors import NotFound
from index.engine import OnProgress, Progress
from index.sums import OnBytes

LOOK_SECONDS = 0.1
"""How often long work tells how far it is, and looks whether it is still wanted."""


class Steps:
    """Passes on how far long work on a gallery is, and ends it when `is_closed` says so."""

    def __init__(self, gallery_id: str, is_closed: Callable[[], bool], on_progress: OnProgress | None) -> None:
        self._gallery_id = gallery_id
        self._is_closed = is_closed
        self._on_progress = on_progress
        self._told = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._is_closed():
            raise NotFound(f"gallery {self._gallery_id!r} has been deleted or closed")
        if self._on_progress and time.monotonic() - self._told >= LOOK_SECONDS:
            self._told = time.monotonic()
            self._on_progress(Progress(stage=stage, done=done, total=total))


def counted(step: Steps, stage: str, total: int) -> OnBytes:
    """Tells `step` how many of the bytes of a stage have been read."""
    done = 0

    def more(count: int) -> None:
        nonlocal done
        done += count
        step(stage, done, total)

    return more
