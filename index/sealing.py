"""What a new segment is written from, and who is told how far it is."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from embedding.errors import NotFound
from index.engine import OnProgress, Progress
from index.exact import Keys
from index.halves import Stored
from index.room import room
from index.segments import ROWS_AT_ONCE, Blocks
from index.snapshot import Part

_TELL_EVERY = 0.1  # seconds


class Telling:
    """Passes on how far the sealing of a gallery is, and ends it when `is_closed` says so."""

    def __init__(self, gallery_id: str, is_closed: Callable[[], bool], on_progress: OnProgress | None) -> None:
        self._gallery_id = gallery_id
        self._is_closed = is_closed
        self._on_progress = on_progress
        self._told = 0.0

    def __call__(self, stage: str, done: int, total: int) -> None:
        if self._is_closed():
            raise NotFound(f"gallery {self._gallery_id!r} has been deleted or closed")
        if self._on_progress and time.monotonic() - self._told >= _TELL_EVERY:
            self._told = time.monotonic()
            self._on_progress(Progress(stage=stage, done=done, total=total))


def moved_most(parts: Sequence[Part]) -> float:
    """How far rounding has moved any row of these parts at most."""
    return max((part.segment.manifest.moved for part in parts if part.segment), default=0.0)


def living_rows(parts: Sequence[Part], step: Telling) -> Iterator[tuple[Keys, Stored]]:
    """Keys and vectors of what lives in these parts, as they keep it, a block at a time."""
    total, done = sum(len(part.keys_N) for part in parts), 0
    for part in parts:
        living_N = room((len(part.keys_N),), np.bool_)
        living_N[:] = True
        living_N[part.dead_R] = False
        for start in range(0, len(living_N), ROWS_AT_ONCE):
            step("copying", done, total)
            here = slice(start, start + ROWS_AT_ONCE)
            keep_n = living_N[here]
            done += len(keep_n)
            yield part.keys_N[here][keep_n], part.vectors_ND[here][keep_n]


def told(blocks: Blocks, total: int, step: Telling) -> Iterator[tuple[Keys, Stored]]:
    """The same blocks, telling how many of `total` rows have gone by."""
    done = 0
    for keys_N, vectors_ND in blocks:
        step("copying", done, total)
        done += len(keys_N)
        yield keys_N, vectors_ND
