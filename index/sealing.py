"""What a new segment is written from: which segments are merged, and their rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from index.exact import Keys
from index.halves import Stored
from index.progress import Steps
from index.room import room
from index.segments import ROWS_AT_ONCE, Blocks
from index.snapshot import Part, Snapshot

_DEAD_SHARE = 0.25  # of a segment, from which it is written anew
_LIKE_SIZE = 3  # a segment smaller than this many times what follows it is merged with that


def is_dying(part: Part, seal_after: int) -> bool:
    """Whether so much of it is dead that it is worth writing anew, where so many fresh rows are worth a segment."""
    return len(part.dead_R) > max(seal_after, _DEAD_SHARE * len(part.keys_N))


def merge_from(snapshot: Snapshot, seal_after: int) -> int:
    """The first segment to be written anew with all that follow."""
    parts = snapshot.parts[:-1]
    start, following = len(parts), snapshot.fresh.size
    while start and parts[start - 1].size < _LIKE_SIZE * following:
        start -= 1
        following += parts[start].size
    dying = [at for at, part in enumerate(parts) if is_dying(part, seal_after)]
    return min([start, *dying])


def moved_most(parts: Sequence[Part]) -> float:
    """How far rounding has moved any row of these parts at most."""
    return max((part.segment.manifest.moved for part in parts if part.segment), default=0.0)


def living_rows(parts: Sequence[Part], step: Steps) -> Iterator[tuple[Keys, Stored]]:
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


def told(blocks: Blocks, total: int, step: Steps) -> Iterator[tuple[Keys, Stored]]:
    """The same blocks, telling how many of `total` rows have gone by."""
    done = 0
    for keys_N, vectors_ND in blocks:
        step("copying", done, total)
        done += len(keys_N)
        yield keys_N, vectors_ND
