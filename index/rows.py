"""The writer's side of a snapshot: sealed segments, and append-only memory for fresh rows and for deaths.

Appending never moves what a published snapshot looks at: its views end before the new rows, and a full buffer is
replaced by a larger copy while the old one lives on in the snapshots that use it. One writer at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from embedding.decision import Vectors
from index.exact import Keys, squared_lengths
from index.room import room
from index.segments import Segment
from index.snapshot import Part, Snapshot

_KILLED_AT_ONCE = 2**15  # keys, so that what is made of them on the way stays small


class Growable:
    """An array that grows along its first axis in amortised constant time."""

    def __init__(self, dtype: DTypeLike, *row_shape: int) -> None:
        self._buffer: NDArray[Any] = np.empty((0, *row_shape), dtype)
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def reserve(self, more: int) -> None:
        """Make room for `more` rows, so that extending by them cannot fail for want of memory."""
        needed = self._length + more
        if needed > len(self._buffer):
            larger = room((max(needed, 2 * len(self._buffer)), *self._buffer.shape[1:]), self._buffer.dtype)
            larger[: self._length] = self._buffer[: self._length]
            self._buffer = larger

    def extend(self, rows: NDArray[Any]) -> None:
        self.reserve(len(rows))
        self._buffer[self._length : self._length + len(rows)] = rows
        self._length += len(rows)

    def view(self) -> NDArray[Any]:
        """The rows so far, read-only; later rows do not show in it."""
        rows = self._buffer[: self._length]
        rows.flags.writeable = False
        return rows


class LiveRows:
    """All rows of a gallery, to which the writer adds; `snapshot` is what readers get."""

    def __init__(self, segments: Sequence[Segment], embedding_dim: int) -> None:
        self.segments = tuple(segments)
        self._width = embedding_dim
        self._keys = Growable(np.int64)
        self._vectors = Growable(np.float32, embedding_dim)
        self._norms = Growable(np.float32)
        self._dead = [Growable(np.intp) for _ in range(len(segments) + 1)]  # of each segment, then of fresh rows
        nobody_R = np.empty(0, np.intp)
        self._sealed = [
            Part(keys_N=s.keys_N, vectors_ND=s.vectors_ND, norms_N=s.norms_N, dead_R=nobody_R, segment=s)
            for s in segments
        ]

    def reserve(self, more: int, *, deaths: int) -> None:
        """Make room for `more` rows and `deaths`, before the store commits what memory must then follow."""
        for array in (self._keys, self._vectors, self._norms):
            array.reserve(more)
        for dead in self._dead:
            dead.reserve(deaths)

    def append(self, keys_N: Keys, vectors_ND: Vectors) -> None:
        """Add living rows; keys rise, and are larger than any before."""
        self._keys.extend(keys_N)
        self._vectors.extend(vectors_ND)
        self._norms.extend(squared_lengths(vectors_ND))

    def kill(self, keys_R: Keys) -> None:
        """Mark the rows of these keys as dead; each key at most once, and unknown keys are left out."""
        parts = [*self._sealed, self._fresh()]
        for start in range(0, len(keys_R), _KILLED_AT_ONCE):
            for part, dead in zip(parts, self._dead, strict=True):
                rows_R = part.rows_of(keys_R[start : start + _KILLED_AT_ONCE])
                if len(rows_R):
                    dead.extend(rows_R)

    def snapshot(self, generation: int) -> Snapshot:
        """An immutable view of all rows so far, without copying any."""
        for at, (part, dead) in enumerate(zip(self._sealed, self._dead, strict=False)):
            if len(part.dead_R) != len(dead):  # else the part keeps what it has made for searches
                self._sealed[at] = Part(
                    keys_N=part.keys_N,
                    vectors_ND=part.vectors_ND,
                    norms_N=part.norms_N,
                    dead_R=dead.view(),
                    segment=part.segment,
                )
        return Snapshot(generation, [*self._sealed, self._fresh()])

    def resealed(self, segments: Sequence[Segment], *, since: Snapshot) -> LiveRows:
        """The same living rows over new segments, which hold exactly the living rows of `since`."""
        now = self.snapshot(0)
        rows = LiveRows(segments, self._width)
        first = len(since.fresh.keys_N)
        rows.append(now.fresh.keys_N[first:], now.fresh.vectors_ND[first:])
        for part in now.parts:
            for start in range(0, len(part.dead_R), _KILLED_AT_ONCE):
                rows.kill(part.keys_N[part.dead_R[start : start + _KILLED_AT_ONCE]])
        return rows

    def _fresh(self) -> Part:
        return Part(
            keys_N=self._keys.view(),
            vectors_ND=self._vectors.view(),
            norms_N=self._norms.view(),
            dead_R=self._dead[-1].view(),
        )
